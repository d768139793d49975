"""Mixup, cutmix and soft targets against numbers worked by hand, and their draws by statistics."""

import numpy as np
import pytest
import torch

from sinkroute.lab.images import Augment, BatchMixing
from sinkroute.lab.images.transforms.mixing import cutmix, cutmix_box, mixup, soft_targets

IMAGES = torch.tensor([0.0, 10.0, 20.0, 30.0]).reshape(4, 1, 1, 1).expand(4, 1, 6, 8)
LABELS = torch.tensor([0, 1, 2, 0])


def test_mixup_mixes_with_the_mirrored_place_of_the_batch():
    # λ = 0.75: 0.75 · 0 + 0.25 · 30 = 7.5, 0.75 · 10 + 0.25 · 20 = 12.5, and back.
    assert mixup(IMAGES, 0.75)[:, 0, 0, 0].tolist() == [7.5, 12.5, 17.5, 22.5]


def test_cutmix_puts_in_the_rectangle_of_the_mirrored_place():
    mixed = cutmix(IMAGES, (1, 2, 4, 7))
    expected = torch.zeros(6, 8)
    expected[1:4, 2:7] = 30
    assert torch.equal(mixed[0, 0], expected)
    assert torch.equal(mixed[3, 0], 30 - expected)


def test_smoothing_is_spread_over_all_classes():
    # 0.1 / 4 = 0.025 for each, and 0.9 more for the label.
    assert soft_targets(torch.tensor([2]), 4, 0.1).tolist() == [pytest.approx([0.025, 0.025, 0.925, 0.025])]


def test_targets_are_mixed_as_the_images_are():
    mixing = BatchMixing(Augment(mixup=0.8), classes=3, seed=0)
    for step in range(20):
        images, targets = mixing(IMAGES, LABELS, step)
        share = 1 - images[0, 0, 0, 0].item() / 30  # of an image of 0, mixed with one of 30
        # Image 1 (class 1) is mixed with image 2 (class 2), image 0 with image 3, of the same class.
        assert targets[0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
        assert targets[1].tolist() == pytest.approx([0, share, 1 - share], abs=1e-6)
        assert targets[2].tolist() == pytest.approx([0, 1 - share, share], abs=1e-6)


def test_the_share_of_cutmix_is_that_of_the_area_that_stays():
    mixing, shares = BatchMixing(Augment(cutmix=1.0, smoothing=0.1), classes=3, seed=0), []
    for step in range(50):
        images, targets = mixing(IMAGES, LABELS, step)
        stays = (images[1] == 10).float().mean().item()
        shares.append(stays)
        assert (images[1] == 20).float().mean().item() == pytest.approx(1 - stays)
        smooth = 0.1 / 3
        assert targets[1].tolist() == pytest.approx(
            [smooth, smooth + 0.9 * stays, smooth + 0.9 * (1 - stays)], abs=1e-6
        )
    assert min(shares) <= 0.5 < max(shares)


@pytest.mark.parametrize(
    ("augment", "by_cutmix"),
    [
        (Augment(mixup=0.8, cutmix=1.0), 0.5),
        (Augment(mixup=0.8, cutmix=1.0, switch=0.2), 0.2),
        (Augment(mixup=0.8), 0),
        (Augment(cutmix=1.0, switch=0.2), 1),
    ],
)
def test_batches_are_mixed_by_one_of_both_in_their_shares(augment, by_cutmix):
    mixing = BatchMixing(augment, classes=3, seed=0)
    # Mixup changes every pixel; cutmix leaves each 10 or 20.
    cut = [
        bool(torch.isin(mixing(IMAGES, LABELS, step)[0][1], torch.tensor([10.0, 20.0])).all()) for step in range(1000)
    ]
    assert np.mean(cut) == pytest.approx(by_cutmix, abs=0.05)


@pytest.mark.parametrize("alpha", [0.8, 3.0])
def test_the_share_of_mixup_is_beta_distributed(alpha):
    mixing = BatchMixing(Augment(mixup=alpha), classes=3, seed=0)
    shares = np.array([1 - mixing(IMAGES, LABELS, step)[0][0, 0, 0, 0].item() / 30 for step in range(3000)])
    # Beta(α, α): mean 1/2, variance 1 / (4 (2α + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_boxes_have_their_area_where_they_are_not_cut_off():
    keyed = np.random.default_rng(0)
    boxes = np.array([cutmix_box(100, 200, 0.75, keyed) for _ in range(2000)])
    top, left, bottom, right = boxes.T
    assert boxes.min() == 0 and bottom.max() == 100 and right.max() == 200
    inside = (top > 0) & (left > 0) & (bottom < 100) & (right < 200)
    # √(1 − 0.75) = 1/2 of each side.
    assert set((bottom - top)[inside]) == {50} and set((right - left)[inside]) == {100}
    # Centres are uniform: half of them lie in the middle half, which is where a box is not cut off vertically.
    assert ((top > 0) & (bottom < 100)).mean() == pytest.approx(0.5, abs=0.04)


def test_a_box_may_be_empty_or_the_whole():
    keyed = np.random.default_rng(0)
    top, left, bottom, right = cutmix_box(8, 8, 1.0, keyed)
    assert (bottom - top) * (right - left) == 0
    top, left, bottom, right = cutmix_box(8, 8, 0.0, keyed)
    assert (bottom - top) * (right - left) >= 16  # a quarter, when the centre is a corner


def test_the_draws_are_keyed_by_seed_step_and_micro_batch():
    def shown(seed, step, micro_batch):
        images, targets = BatchMixing(Augment(mixup=0.8, cutmix=1.0), 3, seed)(IMAGES, LABELS, step, micro_batch)
        return images.numpy().tobytes() + targets.numpy().tobytes()

    assert shown(0, 1, 2) == shown(0, 1, 2)
    assert len({shown(0, 1, 2), shown(1, 1, 2), shown(0, 2, 2), shown(0, 1, 3)}) == 4


def test_without_mixing_images_stay_and_targets_are_soft():
    images, targets = BatchMixing(Augment(smoothing=0.3), classes=3, seed=0)(IMAGES, LABELS, 0)
    assert images is IMAGES
    assert targets.dtype == torch.float32
    assert targets[3].tolist() == pytest.approx([0.8, 0.1, 0.1])


def test_the_middle_of_an_odd_batch_stays_as_it_is():
    images, targets = BatchMixing(Augment(mixup=1.0), classes=3, seed=0)(IMAGES[:3], LABELS[:3], 0)
    assert torch.allclose(images[1], IMAGES[1])
    assert targets[1].tolist() == pytest.approx([0, 1, 0])


def test_neither_images_nor_labels_are_changed():
    images, labels = IMAGES.clone(), LABELS.clone()
    for step in range(10):
        BatchMixing(Augment(mixup=0.8, cutmix=1.0), 3, 0)(images, labels, step)
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
