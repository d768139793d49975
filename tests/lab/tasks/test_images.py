"""Classifying images: the loss, the mixing, and an evaluation that agrees with one image at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinkroute.lab.config import Config, from_mapping
from sinkroute.lab.evaluation import Evaluation
from sinkroute.lab.images import Augment, BatchMixing, ImageData, load_images
from sinkroute.lab.images.corruptions import corrupt, list_corruptions, mce
from sinkroute.lab.models import SparseModel, make_model
from sinkroute.lab.run_folder import prepare_folder
from sinkroute.lab.tasks import load_data, make_task
from sinkroute.lab.tasks.images import ImageTask
from sinkroute.lab.training import train


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits")


def config(augment: dict | None = None, **changes: Any) -> Config:
    model = {"image_size": 8, "channels": 1, "classes": 10, "patch": 4, "layers": 2, "d_model": 16, "heads": 2}
    return from_mapping(
        Config,
        {
            "data": {"name": "digits", "augment": augment or {}},
            "model": {"name": "vit", **model, "d_hidden": 16, "moe_from": 1, "experts": 4, **changes.pop("model", {})},
            "router": {"name": "ssr-s", "options": {"probability": 0.3}},
            "train": {"steps": 6, "batch": 8, "warmup": 2, "log_every": 1, "checkpoint_every": 3, **changes},
            "eval": {"batch": 64},
        },
    )


@pytest.fixture(scope="module")
def model() -> SparseModel:
    """Untrained, with a head large enough to tell images apart."""
    made = make_model(config())
    with torch.no_grad():
        made.head.weight.mul_(50)
        made.patches.weight.mul_(3)
    return made


def assert_found(
    found: Evaluation, model: SparseModel, data: ImageData, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """An evaluation is that of these images, of 0 to 255, shown to the model one at a time."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.mean, data.std))
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(((image / 255 - mean) / std)[None]) for image in images])
    nats = -scores.double().log_softmax(-1)[torch.arange(len(labels)), labels]
    assert (found.count, found.wrong) == (len(labels), int((scores.argmax(-1) != labels).sum()))
    assert found.nats == pytest.approx(nats.mean().item(), rel=1e-5)


# -- training --


def test_the_loss_is_cross_entropy_with_smoothed_targets(digits: ImageData) -> None:
    task = ImageTask(config({"smoothing": 0.2}), digits)
    scores = torch.randn(8, 10)
    batch = {"images": torch.zeros(8, 1, 8, 8), "labels": torch.arange(8)}
    loss = task.loss(lambda images: scores, batch, 0, 0)
    logs = scores.double().log_softmax(-1)
    # 0.8 for the label and 0.02 for each of the ten classes.
    by_hand = -(0.8 * logs[torch.arange(8), torch.arange(8)] + 0.02 * logs.sum(-1)).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_batches_are_mixed_by_seed_step_and_micro_batch(digits: ImageData) -> None:
    task = ImageTask(config({"mixup": 0.8, "cutmix": 1.0}), digits)
    batch = {"images": torch.randn(8, 1, 8, 8), "labels": torch.arange(8)}
    seen = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 10)

    for step, part in ((0, 0), (0, 1), (1, 0), (0, 0)):
        task.loss(model, batch, step, part)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    mixing = BatchMixing(Augment(mixup=0.8, cutmix=1.0), 10, seed=0)
    assert torch.equal(seen[1], mixing(batch["images"], batch["labels"], 0, 1)[0])


def test_it_trains_and_a_resumed_run_continues_with_the_same_bits(digits: ImageData, tmp_path: Path) -> None:
    settings = config({"crop": "pad", "mixup": 0.5}, average=0.9, model={"drop_path": 0.3}, accumulation=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare_folder(settings, digits, whole)
    expected = train(settings, digits, whole).state_dict()
    prepare_folder(settings, digits, parts)
    train(settings, digits, parts)
    for path in (parts / "checkpoints" / "step-000006").iterdir():
        path.unlink()
    (parts / "checkpoints" / "step-000006").rmdir()  # as if it had been killed before its last checkpoint
    resumed = train(settings, digits, parts).state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    # 8 images of 4 patches and a class token, top-2, in the one mixture.
    assert [sum(map(sum, line["load"])) for line in lines] == [8 * 5 * 2] * 6


def test_it_learns(digits: ImageData, tmp_path: Path) -> None:
    settings = config(steps=60, batch=32, lr=1e-2, log_every=20, checkpoint_every=60)
    prepare_folder(settings, digits, tmp_path)
    train(settings, digits, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0] < 0.8 * 2.4


def test_a_configuration_finds_its_images_and_its_task() -> None:
    data = load_data(config(model={"image_size": 16}))
    assert isinstance(data, ImageData) and data.shape == (1, 16, 16)
    task = make_task(config(model={"image_size": 16}), data)
    assert (task.name, task.metric, task.items_each) == ("images", "error", 1)


# -- evaluation --


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_error_is_that_of_one_image_at_a_time(digits: ImageData, model: SparseModel, split: str) -> None:
    found = ImageTask(config(), digits).evaluate(model.train(), split)
    images, labels = getattr(digits, split).images, getattr(digits, split).labels
    assert_found(found, model, digits, images, labels)
    assert found.count == 179
    assert 0 < found.wrong < 179
    assert found.load_LE.sum() == 179 * 5 * 2
    quality = ImageTask(config(), digits).quality(found)
    assert quality["error"] == pytest.approx(100 * found.wrong / 179)
    assert quality["images"] == 179


def test_an_evaluation_leaves_the_mode_and_reports_how_far_it_is(digits: ImageData, model: SparseModel) -> None:
    told: list[tuple[int, int]] = []
    ImageTask(config(), digits).evaluate(model.train(), "valid", on_batch=lambda *done: told.append(done))
    assert model.training
    assert told == [(64, 179), (128, 179), (179, 179)]


def test_fgsm_is_one_step_along_the_sign_of_the_gradient_in_pixels(digits: ImageData, model: SparseModel) -> None:
    found = ImageTask(config(), digits).evaluate(model, "test", ("fgsm", {"epsilon": 8}))
    mean, std = (torch.tensor(value)[:, None, None] for value in (digits.mean, digits.std))
    pixels = (digits.test.images / 255).requires_grad_()
    scores = model.eval()((pixels - mean) / std)
    torch.nn.functional.cross_entropy(scores, digits.test.labels, reduction="sum").backward()
    attacked = (pixels.detach() + 8 / 255 * pixels.grad.sign()).clamp(0, 1)
    assert_found(found, model, digits, attacked * 255, digits.test.labels)
    assert found.nats > ImageTask(config(), digits).evaluate(model, "test").nats
    # The load is that of the answers that count, not of the attack's own passes.
    assert found.load_LE.sum() == 179 * 5 * 2


def test_an_attack_touches_no_gradient_of_the_model(digits: ImageData, model: SparseModel) -> None:
    model.zero_grad()
    ImageTask(config(), digits).evaluate(model, "test", ("pgd", {"epsilon": 8, "steps": 2, "limit": 20}))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_are_attacked_with_draws_of_their_own_and_the_same_ones_again(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, model: SparseModel
) -> None:
    seeds: list[int] = []

    def attack(
        name: str, predict: object, images: torch.Tensor, labels: object, seed: int, **options: object
    ) -> object:
        seeds.append(seed)
        return images

    monkeypatch.setattr("sinkroute.lab.tasks.images.attack_images", attack)
    task = ImageTask(config(), digits)
    for _ in range(2):
        task.evaluate(model, "test", ("pgd", {"epsilon": 8}))
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:]


def test_a_limit_takes_images_from_all_over_the_split(digits: ImageData, model: SparseModel) -> None:
    found = ImageTask(config(), digits).evaluate(
        model, "test", ("corruption", {"name": "fog", "severity": 1, "limit": 3})
    )
    places = [0, 59, 119]  # thirds of 179
    foggy = corrupt("fog", digits.test.images[places], 1, 0)
    assert_found(found, model, digits, foggy, digits.test.labels[places])
    settings = config()
    limited = ImageTask(replace(settings, eval=replace(settings.eval, limit=3)), digits)
    clean = limited.evaluate(model, "test")
    assert_found(clean, model, digits, digits.test.images[places], digits.test.labels[places])
    many = limited.evaluate(model, "test", ("fgsm", {"limit": 10**6}))
    assert many.count == 179


def test_a_corruption_is_that_of_the_whole_split_whatever_the_batch(digits: ImageData, model: SparseModel) -> None:
    attack = ("corruption", {"name": "gaussian_noise", "severity": 3})
    settings = config()
    found = [
        ImageTask(replace(settings, eval=replace(settings.eval, batch=batch)), digits).evaluate(model, "test", attack)
        for batch in (64, 179)
    ]
    noisy = corrupt("gaussian_noise", digits.test.images, 3, 0)
    for evaluation in found:
        assert_found(evaluation, model, digits, noisy, digits.test.labels)


def test_all_corruptions_together_are_their_mean(digits: ImageData, model: SparseModel) -> None:
    task = ImageTask(config(), digits)
    quality = task.quality(task.evaluate(model, "test", ("corruptions", {"limit": 12})))
    each = {
        name: [
            task.evaluate(model, "test", ("corruption", {"name": name, "severity": severity, "limit": 12}))
            for severity in range(1, 6)
        ]
        for name in list_corruptions()
    }
    errors = {name: [found.error for found in evaluations] for name, evaluations in each.items()}
    assert quality["nats"] == pytest.approx(np.mean([[found.nats for found in row] for row in each.values()]))
    assert quality["images"] == 12 * 15 * 5
    assert quality["error"] == pytest.approx(np.mean(list(errors.values())))
    assert {name: quality[f"error {name}"] for name in errors} == pytest.approx(
        {name: np.mean(each) for name, each in errors.items()}
    )
    assert "mce" not in quality  # AlexNet's errors are those on ImageNet
    imagenet = ImageTask(config(), replace(digits, name="imagenet-1k"))
    again = imagenet.quality(imagenet.evaluate(model, "test", ("corruptions", {"limit": 12})))
    assert again["mce"] == pytest.approx(mce(errors))


def test_four_more_corruptions_come_on_request(digits: ImageData, model: SparseModel) -> None:
    task = ImageTask(config(), digits)
    quality = task.quality(task.evaluate(model, "test", ("corruptions", {"limit": 1, "extra": True})))
    assert quality["images"] == 19 * 5
    assert "error spatter" in quality


# -- bad input --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 3}, "model.channels must be 1 like that of the images 'digits', got 3"),
        ({"image_size": 12}, "model.image_size must be 8"),
        ({"classes": 9}, "model.classes must be 10"),
        ({"moe_from": 2}, "model.moe_from must be below model.layers=2, got 2"),
    ],
)
def test_a_model_that_does_not_fit_the_images_is_refused(digits: ImageData, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTask(config(model=change), digits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fgms", {}, "unknown attack on images 'fgms'; did you mean 'fgsm'.*corruption, corruptions"),
        ("fgsm", {"epsilom": 1}, "unknown fgsm option 'epsilom'; did you mean 'epsilon'"),
        ("pgd", {"epsilon": -1}, "epsilon"),
        ("pgd", {"steps": 0}, "steps must be an integer of 1 or more"),
        ("fgsm", {"limit": 0}, "limit must be an integer of 1 or more, got 0"),
        ("corruption", {"name": "fogg", "severity": 1}, "unknown corruption 'fogg'; did you mean 'fog'"),
        ("corruption", {"name": "fog"}, "corruption needs the option 'severity'"),
        ("corruption", {"name": "fog", "severity": 6}, "severity must be an integer from 1 to 5, got 6"),
        ("corruptions", {"extras": True}, "unknown corruptions option 'extras'; did you mean 'extra'"),
    ],
)
def test_a_misspelt_attack_is_refused_before_training(
    digits: ImageData, name: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTask(config(), digits).check_attack(name, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fgsm", {"epsilon": 2}),
        ("pgd", {"space": "normalised", "limit": 5}),
        ("corruptions", {"limit": 2, "extra": True}),
    ],
)
def test_attacks_that_are_right_pass_the_check(digits: ImageData, name: str, options: dict) -> None:
    ImageTask(config(), digits).check_attack(name, options)


def test_augmentation_is_read_from_a_configuration_and_checked() -> None:
    assert config({"mixup": 0.8, "randaugment": "rand-m9-mstd0.5-inc1"}).data.augment.mixup == 0.8
    with pytest.raises(ValueError, match=r"unknown key in data\.augment 'mixupp'; did you mean 'mixup'"):
        config({"mixupp": 0.8})
    with pytest.raises(ValueError, match="erasing must be from 0 to 1, got 2"):
        config({"erasing": 2})
