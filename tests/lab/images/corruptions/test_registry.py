"""The one entrance to the corruptions."""

import numpy as np
import pytest
import torch

from sinkroute.lab.images.corruptions import CORRUPTIONS, corrupt, list_corruptions
from sinkroute.lab.images.corruptions.registry import Corruption

NAMES = list_corruptions(extra=True)


def pictures(shape, seed=0):
    """Smooth random pictures with detail, (B, C, H, W) uint8."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.normal(size=(*shape[:2], 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic").numpy()
    return torch.from_numpy(np.clip(120 + 60 * smooth + generator.normal(size=shape) * 8, 0, 255).astype(np.uint8))


def test_the_benchmark_has_15_corruptions_in_the_published_order_and_4_extra():
    assert list_corruptions() == [
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    ]
    assert NAMES[15:] == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 8), (2, 1, 28, 28), (1, 3, 33, 20), (1, 3, 50, 97)])
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_stay_at_every_severity(name, shape):
    images = pictures(shape)
    for severity in range(1, 6):
        corrupted = corrupt(name, images, severity, seed=0)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_the_given_images_are_not_changed(name):
    images = pictures((1, 3, 32, 32))
    before = images.clone()
    corrupt(name, images, 5, seed=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_in_any_batch_and_as_an_array(name):
    images = pictures((3, 3, 16, 16))
    whole = corrupt(name, images, 3, seed=7)
    assert torch.equal(corrupt(name, images[2:], 3, seed=7, first_index=2), whole[2:])
    array = corrupt(name, images[1].permute(1, 2, 0).numpy(), 3, seed=7, first_index=1)
    assert np.array_equal(array, whole[1].permute(1, 2, 0).numpy())


RANDOM = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost"),
    *("fog", "elastic_transform", "spatter"),
]


@pytest.mark.parametrize("name", NAMES)
def test_draws_differ_between_images_and_between_seeds_where_there_are_draws(name):
    same = pictures((1, 3, 32, 32)).expand(2, -1, -1, -1)
    first, second = corrupt(name, same, 5, seed=0)
    (other,) = corrupt(name, same[:1], 5, seed=1)
    assert torch.equal(first, second) == (name not in RANDOM)
    assert torch.equal(first, other) == (name not in RANDOM)


def test_draws_differ_between_corruptions_and_between_severities(monkeypatch):
    def draw(x_HWC, generator):
        return np.full_like(x_HWC, generator.random())

    for name in ("first", "second"):
        monkeypatch.setitem(CORRUPTIONS, name, Corruption(draw, large=((),) * 5, middle=((),) * 5, small=((),) * 5))
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    found = {corrupt(name, image, severity, 0)[0, 0, 0] for name in ("first", "second") for severity in range(1, 6)}
    assert len(found) == 10


@pytest.mark.parametrize("side", [28, 64, 128])
@pytest.mark.parametrize("name", list_corruptions())
def test_the_hardest_severity_is_further_from_the_picture_than_the_mildest(name, side):
    images = pictures((4, 3, side, side))
    errors = [((corrupt(name, images, severity, seed=0).double() - images.double()) ** 2).mean() for severity in (1, 5)]
    if name == "elastic_transform":  # Published so: from stretching the whole picture to shaking its pixels.
        assert min(errors) > 0
    else:
        assert errors[1] > errors[0]


@pytest.mark.parametrize(
    "name",
    [
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "brightness", "contrast"),
        *("jpeg_compression", "speckle_noise", "gaussian_blur"),
    ],
)
def test_each_severity_is_further_from_the_picture_than_the_one_before(name):
    images = pictures((4, 3, 128, 128))
    errors = [
        ((corrupt(name, images, severity, seed=0).double() - images.double()) ** 2).mean() for severity in range(1, 6)
    ]
    assert errors == sorted(errors)


def test_the_shorter_side_chooses_the_table():
    corruption = CORRUPTIONS["gaussian_noise"]
    assert [corruption.parameters(side, 5) for side in (8, 48, 49, 96, 97)] == [
        (0.1,),
        (0.1,),
        (0.18,),
        (0.18,),
        (0.38,),
    ]
    # 0.3 of 255 is 76.5 and 0.5 of it 127.5.
    for shape, brightest in (((48, 120, 1), 76), ((120, 48, 1), 76), ((49, 120, 1), 127)):
        assert corrupt("brightness", np.zeros(shape, dtype=np.uint8), 5, seed=0).max() == brightest


def test_fractions_are_cut_off():
    # 0.05 of 255 is 12.75.
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    assert corrupt("brightness", black, 1, seed=0).max() == 12


def test_a_whole_value_stays_whole(monkeypatch):
    monkeypatch.setitem(
        CORRUPTIONS, "almost", Corruption(lambda x_HWC, generator: x_HWC - 1e-15, ((),) * 5, ((),) * 5, ((),) * 5)
    )
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(corrupt("almost", image, 1, seed=0), image)


def test_an_empty_batch_stays_empty():
    assert corrupt("fog", torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 1, seed=0).shape == (0, 3, 8, 8)


def test_a_strided_batch_is_taken_as_it_is():
    images = pictures((4, 3, 16, 16))
    assert torch.equal(corrupt("contrast", images[::2], 2, seed=0), corrupt("contrast", images[::2].clone(), 2, seed=0))


def test_an_unknown_corruption_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"):
        corrupt("gausian_noise", np.zeros((8, 8, 3), dtype=np.uint8), 1, seed=0)


def test_an_unknown_option_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown frost option 'folders'; did you mean 'folder'"):
        corrupt("frost", np.zeros((8, 8, 3), dtype=np.uint8), 1, seed=0, folders=".")


def test_a_severity_is_no_option():
    with pytest.raises(ValueError, match="unknown fog option 'density'"):
        corrupt("fog", np.zeros((8, 8, 3), dtype=np.uint8), 1, seed=0, density=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"severity": 0}, "severity must be an integer from 1 to 5, got 0"),
        ({"severity": 6}, "severity must be an integer from 1 to 5, got 6"),
        ({"severity": 1.5}, "severity must be an integer from 1 to 5, got 1.5"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"first_index": -1}, "first_index must be an integer of 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt("fog", np.zeros((8, 8, 3), dtype=np.uint8), **{"severity": 1, "seed": 0, **arguments})


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((7, 8, 3), dtype=np.uint8),
        np.zeros((8, 7, 3), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 7, dtype=torch.uint8),
    ],
)
def test_another_shape_is_refused(images):
    with pytest.raises(ValueError, match=r"images: expected .*\(\(B, C, H, W\)|images: expected (shape )?\("):
        corrupt("fog", images, 1, seed=0)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((8, 8, 3)), "got float64"),
        (torch.zeros(1, 3, 8, 8), r"got torch\.float32"),
        ([[0]], "got list"),
    ],
)
def test_other_values_than_uint8_are_refused(images, found):
    with pytest.raises(TypeError, match=f"images: expected .*uint8.*{found}"):
        corrupt("fog", images, 1, seed=0)
