"""The one entrance: what every attack keeps to, and what it refuses."""

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.lab.attacks.images import IMAGE_ATTACKS, attack_images, list_image_attacks

FAST = {"fgsm": {}, "pgd": {}, "spsa": {"iterations": 5, "samples": 8}}
EPSILON = 8.0
STD = (0.5, 2.0)


def brighter_left(pixels):
    """Class 1 is an image whose left half is brighter."""
    left, right = pixels.chunk(2, dim=-1)
    return torch.stack([right.sum((1, 2, 3)), left.sum((1, 2, 3))], dim=1)


@pytest.mark.parametrize("name", FAST)
def test_every_pixel_stays_within_epsilon_and_the_range_of_images(linear, name):
    model = linear(classes=5, seed=0)
    found = attack_images(name, model, model.images, model.labels, 0, epsilon=EPSILON, **FAST[name])
    assert found.dtype == torch.float32
    assert found.shape == model.images.shape
    assert (found - model.images).abs().max() <= EPSILON / 255 + 1e-7
    assert (found - model.images).abs().max() >= EPSILON / 255 - 1e-7  # and uses it
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("name", FAST)
def test_the_normalised_space_has_a_radius_for_each_channel_and_does_not_clip(linear, name):
    model = linear(classes=5, seed=0)
    options = {"epsilon": EPSILON, "space": "normalised", "std": STD, **FAST[name]}
    found = attack_images(name, model, model.images, model.labels, 0, **options)
    largest_C = ((found - model.images).abs().amax((0, 2, 3)) / torch.tensor(STD) * 255).tolist()
    assert largest_C == pytest.approx([EPSILON, EPSILON], abs=1e-4)
    assert found.min() < 0
    assert found.max() > 1


@pytest.mark.parametrize("name", FAST)
def test_an_attack_in_normalised_space_is_that_on_the_classifier_behind_the_normalisation(linear, name):
    # On inputs that are normalised already, as the literature attacks: a ball of one radius, and no clipping. A
    # standard deviation of 1 makes these inputs the pixels of a classifier that does not normalise.
    std, mean = torch.tensor(STD).view(2, 1, 1), torch.tensor([0.25, 0.125]).view(2, 1, 1)
    behind = linear(classes=5, seed=1)
    inputs = torch.rand(9, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    pixels = (inputs * std + mean).clamp(0, 1)
    inputs = (pixels - mean) / std
    options = {"epsilon": EPSILON, "space": "normalised", **FAST[name]}
    found = attack_images(name, lambda x: behind((x - mean) / std), pixels, behind.labels, 3, std=STD, **options)
    expected = attack_images(name, behind, inputs, behind.labels, 3, std=(1, 1), **options)
    torch.testing.assert_close((found - mean) / std, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_no_attack_goes_below_the_least_margin_there_is(linear, name):
    model = linear(classes=5, seed=2)
    found = attack_images(name, model, model.images, model.labels, 0, epsilon=EPSILON, **FAST[name])
    low = (model.images - EPSILON / 255).clamp(min=0)
    high = (model.images + EPSILON / 255).clamp(max=1)
    assert (model.margins(found) >= model.least_margins(low, high) - 1e-5).all()
    assert (model.margins(found) < model.margins(model.images)).all()


@pytest.mark.parametrize("name", FAST)
def test_the_images_parameters_and_global_generator_are_left_alone(digits, name):
    before, state = digits.images.clone(), torch.random.get_rng_state()
    attack_images(name, digits.model, digits.images, digits.labels, 0, **FAST[name])
    assert torch.equal(digits.images, before)
    assert not digits.images.requires_grad
    assert all(parameter.grad is None for parameter in digits.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_without_gradients_attacks_as_well(digits, name, mode):
    expected = attack_images(name, digits.model, digits.images, digits.labels, 0, **FAST[name])
    with mode():
        found = attack_images(name, digits.model, digits.images * 1, digits.labels * 1, 0, **FAST[name])
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize(("name", "random"), [("fgsm", False), ("pgd", True), ("spsa", True)])
def test_the_seed_alone_decides_the_draws(digits, name, random):
    def run(seed):
        return attack_images(name, digits.model, digits.images, digits.labels, seed, **FAST[name])

    assert torch.equal(run(0), run(0))
    assert torch.equal(run(0), run(1)) != random


@pytest.mark.parametrize("name", FAST)
def test_a_radius_of_zero_gives_the_images_back(digits, name):
    found = attack_images(name, digits.model, digits.images, digits.labels, 0, epsilon=0, **FAST[name])
    assert torch.equal(found, digits.images)


@pytest.mark.parametrize("name", FAST)
def test_one_image_is_a_batch(name):
    image = torch.full((1, 1, 2, 2), 0.5)
    found = attack_images(name, brighter_left, image, torch.tensor([1]), 0, epsilon=5.1, **FAST[name])
    torch.testing.assert_close(found, torch.tensor([[[[0.48, 0.52], [0.48, 0.52]]]]))


@pytest.mark.parametrize("name", sorted(IMAGE_ATTACKS))
def test_an_empty_batch_stays_empty_and_is_not_predicted(name):
    found = attack_images(name, None, torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), 0)
    assert found.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_a_mixture_of_experts_is_attacked_image_by_image_and_not_changed(name):
    # In evaluation each token is routed by itself, so the other images of a batch do not matter.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixture = sinkroute.MoE(d_model=12, d_hidden=16, num_experts=4, top_k=2, router="ssr-s", activation="gelu")
        model = nn.Sequential(nn.Flatten(2), mixture, nn.Flatten(), nn.Linear(24, 3)).eval()
    images = torch.rand(5, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(dim=1).detach()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {} if name == "fgsm" else {"random_start": False}
    together = attack_images(name, model, images, labels, 0, epsilon=EPSILON, **options)
    alone = [
        attack_images(name, model, images[i : i + 1], labels[i : i + 1], 0, epsilon=EPSILON, **options)
        for i in range(len(images))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.equal(together, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_more_steps_leave_no_more_right_than_one_and_a_larger_ball_fewer(digits):
    def accuracy(name, epsilon):
        return digits.accuracy(attack_images(name, digits.model, digits.images, digits.labels, 0, epsilon=epsilon))

    clean = digits.accuracy(digits.images)
    assert clean > 0.9
    assert clean > accuracy("fgsm", 10) > accuracy("fgsm", 20) > accuracy("fgsm", 30)
    assert all(accuracy("pgd", epsilon) <= accuracy("fgsm", epsilon) for epsilon in (10, 20, 30))


def test_a_registered_attack_gets_its_options_the_ball_and_a_generator_of_the_seed(monkeypatch):
    def shift(predict, images, labels, ball, generator, *, by=1.0):
        assert generator.initial_seed() == 7
        return ball.project(images + by)

    monkeypatch.setitem(IMAGE_ATTACKS, "shift", shift)
    assert "shift" in list_image_attacks()
    found = attack_images("shift", None, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), 7, epsilon=51, by=0.1)
    assert found.item() == pytest.approx(0.6)


# --- what is refused


def call(name="fgsm", predict=brighter_left, images=None, labels=None, seed=0, **options):
    images = torch.full((2, 1, 2, 2), 0.5) if images is None else images
    labels = torch.tensor([0, 1]) if labels is None else labels
    return attack_images(name, predict, images, labels, seed, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fgms"}, "unknown image attack 'fgms'; did you mean 'fgsm'"),
        ({"name": "pgd", "step": 3}, "unknown pgd option 'step'; did you mean 'steps'"),
        ({"eps": 3}, "unknown fgsm option 'eps'.* Known: epsilon, space, std"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"epsilon": -1.0}, "epsilon: expected a finite number of 0 or more, in units of 1/255, got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: expected a finite number"),
        ({"space": "normalized"}, "unknown space 'normalized'; did you mean 'normalised'"),
        ({"space": "normalised"}, "std: space='normalised' needs the 1 positive standard deviations.* got None"),
        ({"space": "normalised", "std": (1.0, 1.0)}, "std: .* needs the 1 positive"),
        ({"space": "normalised", "std": (0.0,)}, r"std: .* got \(0.0,\)"),
        ({"images": torch.zeros(2, 4)}, r"images: expected the shape \(B, C, H, W\), got \(2, 4\)"),
        (
            {"images": torch.full((2, 1, 2, 2), 1.5)},
            "images: expected pixels in .0, 1., got 1.5 to 1.5; normalise inside",
        ),
        ({"images": torch.full((2, 1, 2, 2), torch.nan)}, "images: expected pixels in .0, 1., got nan"),
        ({"labels": torch.tensor([0])}, r"labels: expected one for each of 2 images, got the shape \(1,\)"),
        ({"labels": torch.tensor([0, -1])}, "labels: expected 0 or more, got -1"),
        ({"labels": torch.tensor([0, 2])}, "labels: predict knows the classes 0 to 1, got a label 2"),
        ({"name": "pgd", "steps": 0}, "steps must be an integer of 1 or more, got 0"),
        (
            {"name": "pgd", "step_size": 0.0},
            "step_size: expected a finite number above 0, in units of epsilon, got 0.0",
        ),
        ({"name": "spsa", "iterations": 0}, "iterations must be an integer of 1 or more, got 0"),
        ({"name": "spsa", "samples": 1.5}, "samples must be an integer of 1 or more, got 1.5"),
        ({"name": "spsa", "delta": 0.0}, "delta: expected a finite number above 0, got 0.0"),
        ({"name": "spsa", "lr": float("inf")}, "lr: expected a finite number above 0, got inf"),
    ],
)
def test_a_wrong_value_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)}, "images: expected float32 in .0, 1., got torch.uint8"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels: expected int64, got torch.float32"),
        ({"epsilon": "2"}, "epsilon must be a number, got '2'"),
        ({"name": "pgd", "step_size": None}, "step_size must be a number, got None"),
    ],
)
def test_a_wrong_type_is_refused_by_name(arguments, message):
    with pytest.raises(TypeError, match=message):
        call(**arguments)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused_with_the_first_image(name, bad):
    def predict(pixels):
        return brighter_left(pixels) + torch.tensor([[0.0, 0.0], [0.0, bad]])

    with pytest.raises(
        ValueError, match=r"predict: the logits of 1 of 2 images are NaN or infinite \(first: image 1\)"
    ):
        call(name, predict)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1), (2, 3, 4)])
def test_logits_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"predict: expected logits of shape \(2, classes\) with 2 classes or more"):
        call(name, lambda pixels: pixels.sum() + torch.zeros(shape))


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_classifier_without_gradients_is_refused_by_the_attacks_that_need_them(name, mode):
    with pytest.raises(
        ValueError, match=r"predict: its logits have no gradient for the images.*'spsa', which needs none"
    ):
        call(name, mode()(brighter_left))


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_a_gradient_that_is_not_finite_is_refused(name):
    def predict(pixels):  # 0 with an infinite slope
        return torch.stack([(pixels - pixels).abs().sqrt().sum((1, 2, 3)), pixels.sum((1, 2, 3))], dim=1)

    with pytest.raises(ValueError, match="predict: the gradient of its logits for the images is NaN or infinite"):
        call(name, predict)
