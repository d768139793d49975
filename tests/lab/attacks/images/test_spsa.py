"""SPSA: what it estimates, and how near it comes to a known worst case."""

import pytest
import torch

from sinkroute.lab.attacks.images import attack_images


@pytest.mark.parametrize("classes", [2, 5])
def test_a_linear_classifier_is_led_near_to_its_worst_case(linear, classes):
    model, radius = linear(classes, seed=0), 8 / 255
    found = attack_images("spsa", model, model.images, model.labels, 0, epsilon=8.0, samples=32)
    least = model.least_margins((model.images - radius).clamp(min=0), (model.images + radius).clamp(max=1))
    clean = model.margins(model.images)
    share = (clean - model.margins(found)) / (clean - least)
    assert share.min() > 0.85
    assert share.mean() > 0.95


def test_a_classifier_without_gradients_is_misled():
    # Its logits are steps of the pixels, 0.004 wide: their gradient is 0 wherever it exists.
    def predict(pixels):
        left, right = (pixels * 250).round().div(250).chunk(2, dim=-1)
        return torch.stack([right.mean((1, 2, 3)), left.mean((1, 2, 3))], dim=1)

    images, labels = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 1, 0])
    options = {"epsilon": 8.0, "iterations": 10, "samples": 32}
    found = attack_images("spsa", predict, images, labels, 0, **options)
    before, after = predict(images), predict(found)
    sign = 1 - 2 * labels
    fall = ((before[:, 0] - before[:, 1]) - (after[:, 0] - after[:, 1])) * sign
    assert (fall > 0.8 * 2 * 8 / 255).all()


def test_the_first_step_is_adams_along_the_estimate_worked_by_hand():
    # One direction v: the estimate is df v / (2 δ), and Adam's first step is −lr · sign of it: all pixels move by lr,
    # together with v or against it.
    def predict(pixels):
        return torch.stack([pixels.sum((1, 2, 3)), torch.zeros(len(pixels))], dim=1)

    images, labels = torch.full((6, 1, 2, 2), 0.5), torch.zeros(6, dtype=torch.int64)
    options = {"epsilon": 25.5, "iterations": 1, "samples": 1, "lr": 0.02}
    moved = attack_images("spsa", predict, images, labels, 0, **options) - images
    sums = moved.sum((1, 2, 3))
    moves = moved.abs()
    assert (sums <= 1e-6).all()  # downhill, or across where v sums to 0
    assert ((moves - 0.02).abs() < 1e-4)[sums < -1e-6].all()
    assert (moves[sums.abs() <= 1e-6] < 0.021).all()


def test_each_step_of_adam_starts_from_the_projected_image():
    # One pixel, whose margin has the slope 1 for three iterations and −1 for five: SPSA's estimate is exact.
    calls, radius, lr = 0, 0.02, 0.02

    def predict(pixels):
        nonlocal calls
        slope, calls = (1 if calls < 3 * 2 else -1), calls + 1
        return torch.stack([slope * pixels[:, 0, 0, 0], torch.zeros(len(pixels))], dim=1)

    options = {"epsilon": 255 * radius, "iterations": 8, "samples": 1, "lr": lr}
    found = attack_images("spsa", predict, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), 0, **options)
    offset = first = second = 0.0
    for t, gradient in enumerate([1, 1, 1, -1, -1, -1, -1, -1], start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = lr * (first / (1 - 0.9**t)) / (second / (1 - 0.999**t)) ** 0.5
        offset = max(-radius, min(radius, offset - step))
    assert -radius < offset < 0  # back from the border
    assert found.item() - 0.5 == pytest.approx(offset, abs=1e-5)


def test_delta_and_the_number_of_passes_are_as_stated():
    seen = []

    def predict(pixels):
        seen.append(pixels)
        return torch.stack([pixels[:, 0, 0, 0], pixels[:, 0, 0, 1]], dim=1)

    image = torch.full((1, 1, 1, 2), 0.5)
    attack_images("spsa", predict, image, torch.tensor([0]), 0, iterations=3, samples=4, delta=0.05)
    assert len(seen) == 2 * 3 * 4
    first = torch.cat(seen[:8])
    torch.testing.assert_close((first - image).abs(), torch.full_like(first, 0.05))
    torch.testing.assert_close((first[::2] + first[1::2]) / 2, image.expand(4, 1, 1, 2))


def test_each_image_has_directions_of_its_own():
    seen = []

    def predict(pixels):
        seen.append(pixels)
        return pixels.mean((2, 3))

    images = torch.full((2, 3, 8, 8), 0.5)
    attack_images("spsa", predict, images, torch.tensor([0, 1]), 0, iterations=1, samples=1)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_more_samples_leave_fewer_right(digits):
    def accuracy(samples):
        return digits.accuracy(
            attack_images("spsa", digits.model, digits.images, digits.labels, 0, epsilon=20, samples=samples)
        )

    assert digits.accuracy(digits.images) > accuracy(1) > accuracy(32)
