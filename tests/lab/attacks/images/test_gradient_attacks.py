"""FGSM and PGD: the closed form of a linear classifier, and foolbox's attacks."""

import copy

import pytest
import torch

from sinkroute.lab.attacks.images import attack_images
from sinkroute.lab.attacks.images.classifier import ascent_direction

EPSILON = 8.0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "options"), [("fgsm", {}), ("pgd", {}), ("pgd", {"random_start": False})])
def test_a_linear_classifier_of_two_classes_is_led_to_its_worst_case(linear, name, options, seed):
    model = linear(classes=2, seed=seed)
    found = attack_images(name, model, model.images, model.labels, seed, epsilon=EPSILON, **options)
    radius = EPSILON / 255
    expected = model.worst_images((model.images - radius).clamp(min=0), (model.images + radius).clamp(max=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_the_worst_case_in_normalised_space_is_not_clipped(linear, name):
    model, std = linear(classes=2, seed=0), torch.tensor([0.5, 0.25])
    options = {"epsilon": EPSILON, "space": "normalised", "std": std.tolist()}
    found = attack_images(name, model, model.images, model.labels, 0, **options)
    radius = EPSILON / 255 * std.view(2, 1, 1)
    torch.testing.assert_close(
        found, model.worst_images(model.images - radius, model.images + radius), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_a_classifier_that_is_too_sure_for_float32_is_led_there_as_well(linear, name):
    # Margins up to the hundreds: cross-entropy's own gradient is 0, or points the wrong way, where p_y rounds to 1.
    model = linear(classes=2, seed=0, scale=100.0)
    assert model.margins(model.images).max() > 200
    found = attack_images(name, model, model.images, model.labels, 0, epsilon=EPSILON)
    radius = EPSILON / 255
    expected = model.worst_images((model.images - radius).clamp(min=0), (model.images + radius).clamp(max=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_step_follows_the_gradient_of_cross_entropy(linear):
    model = linear(classes=5, seed=3, scale=0.3)
    leaf = model.images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(leaf), model.labels).backward()
    expected = (model.images + EPSILON / 255 * leaf.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(attack_images("fgsm", model, model.images, model.labels, 0, epsilon=EPSILON), expected)


def test_the_direction_is_found_where_gradients_are_switched_off(linear):
    model = linear(classes=2, seed=0)
    with torch.no_grad():
        direction = ascent_direction(model, model.images, model.labels)
    assert torch.equal(direction, (model.weights[1 - model.labels] - model.weights[model.labels]).sign())


def test_the_direction_is_that_of_cross_entropy_in_float64_where_float32_loses_it(digits):
    def signs(model, images):
        leaf = images.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf), digits.labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0].sign()

    exact = signs(copy.deepcopy(digits.model).double(), digits.images.double())
    found = ascent_direction(digits.model, digits.images, digits.labels)
    plain = signs(digits.model, digits.images)
    print(f"\nwrong signs of {exact.numel()}: ours {(found != exact).sum()}, cross-entropy's {(plain != exact).sum()}")
    assert (found != exact).sum() <= 3
    assert (plain != exact).sum() > 10


def test_labels_are_the_given_ones_not_the_predicted(linear):
    model = linear(classes=2, seed=0)
    model.labels = 1 - model.labels
    found = attack_images("fgsm", model, model.images, model.labels, 0, epsilon=EPSILON)
    assert (model.margins(found) < model.margins(model.images)).all()


def test_one_step_of_the_whole_radius_from_the_image_is_fgsm(digits):
    one = {"steps": 1, "step_size": 1.0, "random_start": False}
    found = attack_images("pgd", digits.model, digits.images, digits.labels, 0, epsilon=20, **one)
    expected = attack_images("fgsm", digits.model, digits.images, digits.labels, 0, epsilon=20)
    torch.testing.assert_close(found, expected)


def test_the_step_size_is_a_share_of_the_radius(linear):
    model = linear(classes=2, seed=0)
    model.images = model.images.clamp(0.2, 0.8)
    two = {"steps": 2, "step_size": 0.25, "random_start": False}
    found = attack_images("pgd", model, model.images, model.labels, 0, epsilon=EPSILON, **two)
    moved = (found - model.images).abs() * 255
    torch.testing.assert_close(moved, torch.full_like(moved, EPSILON / 2), rtol=0, atol=1e-4)


def test_a_random_start_is_uniform_in_the_ball():
    # A step too small to see: what comes back is where it began.
    images = torch.full((4, 3, 50, 50), 0.5)
    found = attack_images(
        "pgd",
        lambda pixels: pixels.mean((2, 3)),
        images,
        torch.zeros(4, dtype=torch.int64),
        0,
        epsilon=51,
        steps=1,
        step_size=1e-6,
    )
    share = (found - images) / 0.2
    assert share.abs().max() <= 1 + 1e-5
    assert share.mean().item() == pytest.approx(0, abs=0.02)  # 30 000 draws: 6 standard errors
    assert share.square().mean().item() == pytest.approx(1 / 3, abs=0.015)


@pytest.mark.parametrize("epsilon", [10, 30])
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_foolbox_finds_the_same_images(digits, name, epsilon):
    foolbox = pytest.importorskip("foolbox")
    # In float64: in float32, its cross-entropy gets the sign wrong in pixels of images whose class is sure.
    theirs = foolbox.PyTorchModel(copy.deepcopy(digits.model).double(), bounds=(0, 1), device="cpu")
    radius = epsilon / 255
    attack, options = {
        "fgsm": (foolbox.attacks.FGSM(), {}),
        "pgd": (
            foolbox.attacks.LinfPGD(abs_stepsize=0.15 * radius, steps=20, random_start=False),
            {"random_start": False},
        ),
    }[name]
    expected, _, _ = attack(theirs, digits.images.double(), digits.labels, epsilons=radius)
    found = attack_images(name, digits.model, digits.images, digits.labels, 0, epsilon=epsilon, **options)
    differ = (found - expected).abs() > 1e-6
    assert differ.float().mean() <= 1e-3  # gradients within rounding of 0, if any


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_from_random_starts_foolbox_leaves_as_many_right(digits, seed):
    foolbox = pytest.importorskip("foolbox")
    theirs = foolbox.PyTorchModel(copy.deepcopy(digits.model), bounds=(0, 1), device="cpu")
    radius = 20 / 255
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=0.15 * radius, steps=20)
        expected, _, _ = attack(theirs, digits.images, digits.labels, epsilons=radius)
    found = attack_images("pgd", digits.model, digits.images, digits.labels, seed, epsilon=20)
    assert digits.accuracy(found) == pytest.approx(digits.accuracy(expected), abs=0.02)
