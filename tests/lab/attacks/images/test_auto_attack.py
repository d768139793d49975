"""AutoAttack: by pyautoattack where it is installed, and what is said where it is not."""

import sys

import pytest
import torch

from sinkroute.lab.attacks.images import attack_images


def test_without_the_package_the_cure_is_named(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed; cure: pip install .sinkroute\[lab\]"):
        attack_images("auto-attack", digits.model, digits.images, digits.labels, 0)


@pytest.fixture
def installed():
    pytest.importorskip("pyautoattack")


@pytest.mark.usefixtures("installed")
def test_the_normalised_space_is_refused(digits):
    with pytest.raises(ValueError, match=r"space: 'auto-attack' clips images to \[0, 1\] itself.*got 'normalised'"):
        attack_images("auto-attack", digits.model, digits.images, digits.labels, 0, space="normalised", std=(0.5,))


@pytest.mark.usefixtures("installed")
def test_three_classes_are_refused(linear):
    model = linear(classes=3, seed=0)
    with pytest.raises(ValueError, match="'auto-attack' needs 4 classes or more for its targeted loss, got 3"):
        attack_images("auto-attack", model, model.images, model.labels, 0)


@pytest.mark.usefixtures("installed")
def test_logits_that_are_not_finite_are_refused(linear):
    model = linear(classes=4, seed=0)
    with pytest.raises(ValueError, match="predict: the logits of 9 of 9 images are NaN"):
        attack_images("auto-attack", lambda x: model(x) * torch.nan, model.images, model.labels, 0)


@pytest.mark.usefixtures("installed")
def test_what_it_finds_is_within_the_ball_and_the_rest_is_unchanged(linear):
    # Four classes: fewer than the nine targets that it takes by default.
    model, epsilon = linear(classes=4, seed=0), 20.0
    found = attack_images("auto-attack", model, model.images, model.labels, 0, epsilon=epsilon)
    broken = model(found).argmax(dim=1) != model.labels
    least = model.least_margins(
        (model.images - epsilon / 255).clamp(min=0), (model.images + epsilon / 255).clamp(max=1)
    )
    assert broken.any() and not broken.all()
    assert torch.equal(broken, least < 0)  # all that can be broken
    assert torch.equal(found[~broken], model.images[~broken])
    assert (found - model.images).abs().max() <= epsilon / 255 + 1e-7
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_parameters_generators_and_a_trace_are_left_alone_and_the_seed_decides(digits, mode):
    def run(seed):
        with mode():
            return attack_images("auto-attack", digits.model, digits.images[:4], digits.labels[:4], seed, epsilon=30)

    def trace(frame, event, argument):
        return None

    before, traced = torch.random.get_rng_state(), sys.gettrace()
    sys.settrace(trace)
    try:
        first = run(0)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(traced)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in digits.model.parameters())
    torch.rand(5)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_it_leaves_no_more_right_than_pgd_and_pgd_than_fgsm(digits):
    right = {
        name: digits.accuracy(attack_images(name, digits.model, digits.images, digits.labels, 0, epsilon=20))
        for name in ("fgsm", "pgd", "auto-attack")
    }
    assert right["fgsm"] >= right["pgd"] >= right["auto-attack"]
    assert right["fgsm"] > right["auto-attack"]
