"""The settings of augmentation."""

import dataclasses

import pytest

from sinkroute.lab.images import DEIT, Augment
from sinkroute.lab.images.policy import Policy, parse_policy


def test_all_is_off_by_default():
    augment = Augment()
    assert (augment.crop, augment.randaugment, augment.repeats) == ("none", None, 1)
    assert augment.flip == augment.erasing == augment.mixup == augment.cutmix == augment.smoothing == 0
    assert not augment.mixes


def test_deit_is_the_recipe_of_the_paper():
    # arXiv 2012.12877, table 9: Rand Augment 9/0.5, mixup 0.8, cutmix 1.0, erasing 0.25, smoothing 0.1, repeated.
    assert dataclasses.asdict(DEIT) == {
        "crop": "resized",
        "padding": 2,
        "min_area": 0.08,
        "flip": 0.5,
        "randaugment": "rand-m9-mstd0.5-inc1",
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "switch": 0.5,
        "smoothing": 0.1,
        "repeats": 3,
    }


@pytest.mark.parametrize("name", ["min_area", "flip", "erasing", "switch", "smoothing"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be from 0 to 1, got {value}"):
        Augment(**{name: value})


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_an_alpha_that_is_no_parameter_of_a_beta_distribution_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of 0 or more, got {value}"):
        Augment(**{name: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop", "center", "unknown value of data.augment.crop: 'center'.*Known: none, pad, resized"),
        ("padding", -1, r"data\.augment\.padding must be 0 or more, got -1"),
        ("repeats", 0, r"data\.augment\.repeats must be 1 or more, got 0"),
        ("min_area", 0, "min_area must be above 0"),
        ("randaugment", "m9", "randaugment: expected rand-m<magnitude>.*got 'm9'"),
    ],
)
def test_a_value_out_of_range_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Augment(**{field: value})


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"data\.augment\.erasing must be float, got 'much' \(str\)"):
        Augment(erasing="much")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("rand-m9-mstd0.5-inc1", Policy(9, 0.5, 2)),
        ("rand-m7-inc1", Policy(7, 0, 2)),
        ("rand-m6.5-n3-mstd1-inc1", Policy(6.5, 1, 3)),
    ],
)
def test_policies_are_read(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    "text", ["", "rand-m9", "rand-m9-mstd0.5-inc0", "rand-inc1", "augmix-m3-inc1", "rand-m9-inc1-x"]
)
def test_other_policies_are_refused_with_the_form(text):
    with pytest.raises(ValueError, match=r"such as 'rand-m9-mstd0\.5-inc1', got"):
        parse_policy(text)


def test_a_magnitude_above_10_is_refused():
    with pytest.raises(ValueError, match="expected a magnitude from 0 to 10, got 11"):
        parse_policy("rand-m11-inc1")
