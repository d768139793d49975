"""A classifier on shifted sets: whose answers count, the mean over corruptions, the detection of unknown classes."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from sinkroute.lab.config import Config, RouterConfig, VisionConfig
from sinkroute.lab.images.data import ImageData, TensorImages
from sinkroute.lab.images.shifted import ShiftedSet
from sinkroute.lab.models import make_model
from sinkroute.lab.tasks import shifted as module
from sinkroute.lab.tasks.shifted import evaluate_shifted

CLASSES = 6
VISION = VisionConfig(
    image_size=8,
    channels=1,
    classes=CLASSES,
    patch=4,
    layers=2,
    d_model=16,
    heads=2,
    d_hidden=16,
    moe_from=1,
    experts=4,
)


def images(count, seed, classes):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.tensor([classes[place % len(classes)] for place in range(count)]))


@pytest.fixture
def model():
    model = make_model(Config(model=VISION, router=RouterConfig("softmax")))
    with torch.no_grad():  # at first its answers are all but equal
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model


@pytest.fixture
def data():
    valid = images(12, 1, range(CLASSES))
    return ImageData("tiny", "here", "0", CLASSES, (1, 8, 8), (0.5,), (0.25,), valid, valid, valid)


@pytest.fixture
def opened(monkeypatch):
    """Every set has the same images of classes 1 and 4, those of a corruption differ by its name and severity."""
    asked = []

    def load(name, path, wnids, corruption=None, severity=None):
        asked.append((corruption, severity))
        seed = 7 if corruption is None else 100 * len(corruption) + severity
        return ShiftedSet(name, images(10, seed, (1, 4)), torch.tensor([1, 4]), margin=False)

    monkeypatch.setattr(module, "load_shifted", load)
    monkeypatch.setattr(module, "read_wnids", lambda path: ["n00000000"])
    return asked


def logits(model, split):
    pixels = (split.images.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        return model.eval()(pixels)


def test_only_the_classes_of_the_set_can_be_answers(model, data, opened):
    found = evaluate_shifted(model, data, "imagenet-r", "there", "wnids", batch=4)
    split = images(10, 7, (1, 4))
    answers = torch.tensor([1, 4])[logits(model, split)[:, [1, 4]].argmax(1)]
    assert found == {"error": pytest.approx(100 * (answers != split.labels).double().mean().item())}


def test_the_error_under_corruption_is_the_mean_over_all_of_them(model, data, opened):
    found = evaluate_shifted(model, data, "imagenet-c", "there", "wnids", batch=5)
    assert len(opened) == 75 and len(set(opened)) == 75
    assert len(found["errors"]) == 15 and {len(each) for each in found["errors"].values()} == {5}
    assert found["error"] == pytest.approx(sum(map(sum, found["errors"].values())) / 75)
    assert found["mce"] > 0


def test_unknown_images_are_told_from_known_ones_by_the_largest_probability(model, data, opened):
    found = evaluate_shifted(model, data, "imagenet-o", "there", "wnids", batch=3)
    known = data.valid.images[torch.isin(data.valid.labels, torch.tensor([1, 4]))]
    both = TensorImages(torch.cat((known, images(10, 7, (1, 4)).images)), torch.zeros(len(known) + 10))
    score = -logits(model, both)[:, [1, 4]].softmax(1).amax(1)
    positive = [0] * len(known) + [1] * 10
    assert found == {"aupr": pytest.approx(average_precision_score(positive, score))}


def test_the_model_is_left_in_the_mode_that_it_was_in(model, data, opened):
    model.train()
    evaluate_shifted(model, data, "imagenet-a", "there", "wnids", batch=4)
    assert model.training
