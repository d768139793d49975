"""Tiny images in the forms that ImageNet has on disk: 3 classes stand for its 1000."""

import io

import pytest
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02084071")
TRAIN, VALID = 4, 2  # images per class


def jpeg(label, number, size=(40, 32), mode="RGB"):
    """A plain image whose colour tells its class and its number."""
    colour = (60 * label + 20, 30 * number + 20, 128)
    stream = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def told(image):
    """(class, number) that the colour of an image tells."""
    red, green, _ = image.convert("RGB").getpixel((0, 0))
    return round((red - 20) / 60), round((green - 20) / 30)


def write_folders(root, count, wnids=WNIDS, suffix="JPEG"):
    """ROOT/WNID/WNID_NUMBER.JPEG"""
    for label, wnid in enumerate(wnids):
        (root / wnid).mkdir(parents=True)
        for number in range(count):
            (root / wnid / f"{wnid}_{number}.{suffix}").write_bytes(jpeg(label, number))
    return root


@pytest.fixture
def three_classes(monkeypatch):
    """ImageNet-1K has 3 classes, 12 training and 6 validation images."""
    monkeypatch.setattr("sinkroute.lab.images.imagenet.CLASSES", 3)
    monkeypatch.setattr("sinkroute.lab.images.imagenet.COUNTS", {"train": 3 * TRAIN, "validation": 3 * VALID})


@pytest.fixture
def imagenet_folder(tmp_path):
    write_folders(tmp_path / "imagenet" / "train", TRAIN)
    write_folders(tmp_path / "imagenet" / "val", VALID)
    return tmp_path / "imagenet"
