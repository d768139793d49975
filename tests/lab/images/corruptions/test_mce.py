"""Mean corruption errors by hand, and of a published model."""

import pytest

from sinkroute.lab.images.corruptions import (
    ALEXNET,
    list_corruptions,
    mce,
    mean_corruption_error,
    relative_mce,
)

# Top-1 accuracy in % of torchvision's ResNet-50 on ImageNet-C, with the mCE that its authors computed: Rusak et al.,
# https://github.com/bethgelab/game-of-noise, Results/clean_results.txt.
RESNET50 = {
    "gaussian_noise": 29.29,
    "shot_noise": 27.03,
    "impulse_noise": 23.81,
    "defocus_blur": 38.75,
    "glass_blur": 26.79,
    "motion_blur": 38.67,
    "zoom_blur": 36.24,
    "snow": 32.53,
    "frost": 38.14,
    "fog": 45.83,
    "brightness": 68.02,
    "contrast": 39.06,
    "elastic_transform": 45.25,
    "pixelate": 44.79,
    "jpeg_compression": 53.41,
}
ERRORS = {name: 100 - accuracy for name, accuracy in RESNET50.items()}


def test_the_published_mce_of_resnet50_comes_out():
    assert mce(ERRORS) == pytest.approx(76.70, abs=0.01)


def test_the_published_mean_accuracy_of_resnet50_comes_out():
    assert 100 - mean_corruption_error(ERRORS) == pytest.approx(39.17, abs=0.01)


@pytest.mark.parametrize(("name", "published"), [("fog", 66.11), ("glass_blur", 88.61), ("jpeg_compression", 76.82)])
def test_the_published_errors_of_resnet50_in_shares_of_alexnets_come_out(name, published):
    assert mce({name: ERRORS[name]}, {name: ALEXNET[name]}) == pytest.approx(published, abs=0.02)


def test_alexnets_own_mce_is_100():
    assert mce(ALEXNET) == pytest.approx(100)
    assert relative_mce(ALEXNET, 43.45) == pytest.approx(100)


def test_the_baseline_has_the_15_corruptions():
    assert list(ALEXNET) == list_corruptions()


def test_errors_are_summed_over_severities_before_they_are_divided():
    # fog: (10 + 50) / (20 + 60) = 0.75, not the mean 0.67 of 1/2 and 5/6; snow: 30 / 20 = 1.5.
    assert mce({"fog": [10, 50], "snow": [30, 30]}, {"fog": [20, 60], "snow": 20}) == pytest.approx(112.5)


def test_the_relative_error_counts_what_corruption_adds():
    # fog adds 20 to 10 where the baseline adds 40 to 20; snow adds 5 where it adds 20: (0.5 + 0.25) / 2.
    found = relative_mce({"fog": 30, "snow": 15}, 10, {"fog": 60, "snow": 40}, 20)
    assert found == pytest.approx(37.5)


def test_corruptions_outside_the_baseline_do_not_count():
    assert mce({**ALEXNET, "saturate": 0}) == pytest.approx(100)


def test_the_unnormalised_error_is_the_mean_of_the_means():
    assert mean_corruption_error({"fog": [0, 100], "snow": [10, 10, 10]}) == pytest.approx(30)


def test_a_missing_corruption_is_named():
    with pytest.raises(ValueError, match="got none for 'frost'"):
        mce({name: error for name, error in ERRORS.items() if name != "frost"})


@pytest.mark.parametrize("value", [-1, 101, float("nan"), [5, 200]])
def test_an_error_outside_0_to_100_is_refused(value):
    with pytest.raises(ValueError, match="fog: expected an error in % from 0 to 100"):
        mean_corruption_error({"fog": value})


def test_no_errors_at_all_are_refused():
    with pytest.raises(ValueError, match="errors: expected at least one corruption"):
        mean_corruption_error({})
    with pytest.raises(ValueError, match="one number a severity for 'fog', got none"):
        mean_corruption_error({"fog": []})


def test_a_baseline_without_errors_is_refused():
    with pytest.raises(ValueError, match=r"baseline: expected an error above 0 .* for 'fog'"):
        mce({"fog": 1}, {"fog": 0})
    with pytest.raises(ValueError, match=r"baseline: expected an error above 0 .* for 'fog'"):
        relative_mce({"fog": 30}, 10, {"fog": 20}, 20)


@pytest.mark.parametrize("clean", [-1, 101])
def test_a_clean_error_outside_0_to_100_is_refused(clean):
    with pytest.raises(ValueError, match="clean_error: expected an error in % from 0 to 100"):
        relative_mce({"fog": 30}, clean, {"fog": 60}, 20)
