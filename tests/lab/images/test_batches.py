"""The keyed order of training images, and evaluation that sees each once."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset

from sinkroute.lab.images import DEIT, Augment, ImageBatches, ImageData, evaluation_batches, normalise, scale
from sinkroute.lab.images.batches import EvaluationImages
from sinkroute.lab.images.data import TensorImages


def made_up(count=10, side=8, channels=1):
    """Image i holds the value i everywhere, its label is i mod 3; mean 0.5, deviation 0.25."""
    values = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, channels, side, side).clone()
    split = TensorImages(values, torch.arange(count) % 3)
    return ImageData(
        "made up", "by hand", "0", 3, (channels, side, side), (0.5,) * channels, (0.25,) * channels, split, split, split
    )


class Photographs:
    """PIL images of 20 × 30 pixels; image i is of the grey i."""

    labels = torch.arange(6)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.new("RGB", (20, 30), (index,) * 3), index


def value(item):
    """The byte that a plain image of `made_up` holds."""
    return round((item["images"].flatten()[0].item() * 0.25 + 0.5) * 255)


def test_an_item_is_a_normalised_image_and_its_label():
    batches = ImageBatches(made_up(), batch=5, seed=0, steps=2)
    item = batches[7]
    source = batches.source(7)
    assert item["images"].dtype == torch.float32
    assert torch.allclose(item["images"], torch.full((1, 8, 8), (source / 255 - 0.5) / 0.25))
    assert item["labels"].item() == source % 3
    assert item["labels"].dtype == torch.int64


@given(count=st.integers(1, 12), repeats=st.integers(1, 3), seed=st.integers(0, 3), number=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_pass_shows_each_image_as_often_as_asked(count, repeats, seed, number):
    batches = ImageBatches(made_up(count), 1, seed, steps=1000, augment=Augment(repeats=repeats))
    one = count * repeats
    shown = [batches.source(index) for index in range(number * one, (number + 1) * one)]
    assert sorted(shown) == sorted(list(range(count)) * repeats)


def test_repeats_of_an_image_follow_one_another_and_differ():
    data = made_up(side=16)
    noise = torch.from_numpy(np.random.default_rng(0).integers(256, size=(10, 1, 16, 16), dtype=np.uint8))
    data = dataclasses.replace(data, train=TensorImages(noise, data.train.labels))
    batches = ImageBatches(data, 3, 0, 10, Augment(crop="pad", padding=4, repeats=3))
    for first in range(0, 30, 3):
        assert batches.source(first) == batches.source(first + 1) == batches.source(first + 2)
        images = [batches[first + copy]["images"] for copy in range(3)]
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_the_order_differs_between_passes_and_between_seeds():
    orders = [
        [ImageBatches(made_up(50), 50, seed, 4).source(number * 50 + place) for place in range(50)]
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) != order for order in orders)


def test_an_item_is_the_same_whatever_was_read_before():
    data = made_up(side=12, channels=3)
    noise = torch.from_numpy(np.random.default_rng(0).integers(256, size=(10, 3, 12, 12), dtype=np.uint8))
    data = dataclasses.replace(data, train=TensorImages(noise, data.train.labels))
    whole = ImageBatches(data, 4, 3, 20, DEIT)
    in_order = [whole[index] for index in range(80)]
    other = ImageBatches(data, 4, 3, 20, DEIT)
    for index in np.random.default_rng(0).permutation(80):
        item = other[int(index)]
        assert torch.equal(item["images"], in_order[index]["images"])
        assert torch.equal(item["labels"], in_order[index]["labels"])


def test_another_seed_augments_otherwise():
    data = made_up(count=1, side=12)
    noise = torch.from_numpy(np.random.default_rng(0).integers(256, size=(1, 1, 12, 12), dtype=np.uint8))
    data = dataclasses.replace(data, train=TensorImages(noise, torch.zeros(1, dtype=torch.int64)))
    one, two = (ImageBatches(data, 20, seed, 1, Augment(crop="pad", padding=5)) for seed in (0, 1))
    assert any(not torch.equal(one[i]["images"], two[i]["images"]) for i in range(20))


def test_a_resumed_loader_yields_what_the_first_had_left():
    augment = Augment(crop="pad", erasing=0.5, repeats=2)
    whole = list(DataLoader(ImageBatches(made_up(), 6, 1, 10, augment), batch_size=6))
    rest = DataLoader(Subset(ImageBatches(made_up(), 6, 1, 10, augment), range(24, 60)), batch_size=6)
    for one, two in zip(whole[4:], rest, strict=True):
        assert torch.equal(one["images"], two["images"])
        assert torch.equal(one["labels"], two["labels"])


def test_a_larger_batch_holds_the_items_of_the_smaller_ones():
    small = DataLoader(ImageBatches(made_up(), 4, 1, 6, Augment(erasing=0.5)), batch_size=4)
    large = DataLoader(ImageBatches(made_up(), 12, 1, 2, Augment(erasing=0.5)), batch_size=12)
    assert torch.equal(torch.cat([b["images"] for b in small]), torch.cat([b["images"] for b in large]))


def test_erasing_is_done_after_normalisation():
    batches = ImageBatches(made_up(side=32), 1, 0, 200, Augment(erasing=1))
    plain = ImageBatches(made_up(side=32), 1, 0, 200)
    noise = torch.cat(
        [(a := batches[i]["images"])[a != plain[i]["images"]] for i in range(200)]
    )  # what erasing has overwritten
    assert len(noise) > 10_000
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("augment", [Augment(), Augment(crop="resized"), DEIT])
def test_photographs_of_any_size_come_out_in_one(augment):
    data = dataclasses.replace(made_up(), shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, train=Photographs())
    batch = next(iter(DataLoader(ImageBatches(data, 6, 0, 1, augment), batch_size=6)))
    assert batch["images"].shape == (6, 3, 16, 16)


def test_without_augmentation_a_photograph_is_seen_as_in_evaluation():
    class Gradient(Photographs):
        def __getitem__(self, index):
            rows = np.arange(30, dtype=np.uint8)[:, None, None].repeat(20, 1).repeat(3, 2)
            return Image.fromarray(rows * 8), index

    data = dataclasses.replace(made_up(), shape=(3, 14, 14), mean=(0.5,) * 3, std=(0.25,) * 3, train=Gradient())
    batches = ImageBatches(data, 1, 0, 1)
    seen = EvaluationImages(data.train, 14)[batches.source(0)]["images"]
    assert torch.equal(batches[0]["images"], normalise(scale(seen), data.mean, data.std))


def test_evaluation_shows_each_image_once_in_its_order():
    batches = list(evaluation_batches(made_up(10), "valid", batch=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.cat([labels for _, labels in batches]).tolist() == [i % 3 for i in range(10)]


def test_evaluation_reads_the_split_it_is_asked_for():
    data = made_up()
    data = dataclasses.replace(data, test=TensorImages(data.train.images[:3], data.train.labels[:3]))
    assert sum(len(labels) for _, labels in evaluation_batches(data, "test", 4)) == 3


def test_evaluation_resizes_the_shorter_side_and_cuts_the_middle():
    data = dataclasses.replace(made_up(), shape=(3, 14, 14), valid=Photographs())
    (images, labels), *rest = evaluation_batches(data, "valid", 6)
    assert not rest and images.shape == (6, 3, 14, 14)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == list(range(6))


@pytest.mark.parametrize(("argument", "number"), [("batch", 0), ("seed", -1), ("steps", -1)])
def test_an_argument_out_of_range_is_named(argument, number):
    arguments = {"batch": 1, "seed": 0, "steps": 1, argument: number}
    with pytest.raises(ValueError, match=f"{argument} must be an integer of . or more, got {number}"):
        ImageBatches(made_up(), **arguments)


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_out_of_range_is_named_with_the_count(index):
    with pytest.raises(IndexError, match=rf"0 <= index < 6 \(steps \* batch\), got {index}"):
        ImageBatches(made_up(), 3, 0, 2)[index]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: expected 'train', 'valid' or 'test', got 'validation'"):
        evaluation_batches(made_up(), "validation", 4)
