"""ImageNet-1K (Russakovsky et al. 2014, arXiv 1409.0575): 1,281,167 images to train on, 50,000 to validate on.

Whoever uses it brings a copy, in any of the three forms that people have, or access to the Hugging Face Hub. The labels
of the test images are not public: as everywhere, the validation images serve for the test too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from sinkroute.lab.images.data import ImageData
from sinkroute.lab.images.folder import FolderImages, class_folders, is_image
from sinkroute.lab.images.parquet import TableImages, read_hub, read_parquet
from sinkroute.lab.images.webdataset import ShardImages, read_shards

__all__ = ["COUNTS", "HUB_NAME", "load_imagenet"]

HUB_NAME = "ILSVRC/imagenet-1k"
CLASSES = 1000
COUNTS = {"train": 1_281_167, "validation": 50_000}
"""Images per split."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_CURE = (
    "ImageNet-1K comes from https://image-net.org/download or, after asking for access there, from "
    f"https://huggingface.co/datasets/{HUB_NAME}; pass path= a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, "
    "with the Hub's train-*.parquet and validation-*.parquet, or with the shards *train*.tar and *val*.tar of "
    "timm/imagenet-1k-wds; or path='hf' to load it from the Hub"
)

_DiskSplit: TypeAlias = FolderImages | TableImages | ShardImages


def load_imagenet(path: str | Path | None = None, size: int | None = None) -> ImageData:
    """ImageNet-1K, decoded image by image when asked for; the form is told by what is in the folder.

    Args:
        path: a folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, with the parquet files of ILSVRC/imagenet-1k
            (also in `data/`), or with the shards of timm/imagenet-1k-wds; "hf": the Hugging Face Hub.
        size: rows and columns of the part that a model gets; None: 224.

    Raises:
        ValueError: `path` is None, a folder of another form, or not the whole of ImageNet-1K.
        FileNotFoundError: nothing is at `path`.
        PermissionError: the Hub gives no access.
    """
    if path is None:
        raise ValueError(f"path: images 'imagenet-1k' need a folder, got None; {_CURE}")
    train: _DiskSplit
    valid: _DiskSplit
    if str(path) == "hf":
        source, (train, valid) = f"Hugging Face Hub: {HUB_NAME}", read_hub(HUB_NAME)
    else:
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"path: found no folder at {str(path)!r}; {_CURE}")
        form, read = _form(root)
        source, (train, valid) = f"{form} {root}", read(root)
    _require("train", train)
    _require("validation", valid)
    size = 224 if size is None else size
    return ImageData(
        name="imagenet-1k",
        source=source,
        sha256=_digest(train, valid),
        classes=CLASSES,
        shape=(3, size, size),
        mean=_MEAN,
        std=_STD,
        train=train,
        valid=valid,
        test=valid,
    )


def _form(root: Path) -> tuple[str, Callable[[Path], tuple[_DiskSplit, _DiskSplit]]]:
    if (root / "train").is_dir() and (root / "val").is_dir():
        return "folder", _read_folder
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        return "parquet files in", read_parquet
    if any(root.glob("*.tar")):
        return "webdataset shards in", read_shards
    raise ValueError(f"path: {str(root)!r} holds ImageNet-1K in no known form; {_CURE}")


def _read_folder(root: Path) -> tuple[FolderImages, FolderImages]:
    classes = class_folders(root / "train")
    if not class_folders(root / "val") and any(is_image(name) for name in os.listdir(root / "val")):
        raise ValueError(
            f"path: the images of {root / 'val'} lie side by side, which does not tell their classes; move each into a "
            "folder named by its class, as in train/ (the script valprep.sh, to which the ImageNet example of PyTorch "
            "points, does it)"
        )
    if (found := class_folders(root / "val")) != classes:
        odd = sorted(set(found) ^ set(classes))[0]
        raise ValueError(
            f"path: {root} has {len(classes)} classes in train/ and {len(found)} in val/, and {odd!r} is in one only; "
            "the labels are the places of the sorted class folders, so both must have the same"
        )
    labels = {name: label for label, name in enumerate(classes)}
    return FolderImages(root / "train", labels), FolderImages(root / "val", labels)


def _require(split: str, images: _DiskSplit) -> None:
    found = images.labels.unique().tolist()
    if len(images) != COUNTS[split] or found != list(range(CLASSES)):
        raise ValueError(
            f"path: not the whole of ImageNet-1K: found {len(images):,} {split} images of {len(found):,} classes, "
            f"expected {COUNTS[split]:,} of {CLASSES:,}; get what is missing, or remove what is no part of it. {_CURE}"
        )


def _digest(train: _DiskSplit, valid: _DiskSplit) -> str:
    digest = hashlib.sha256()
    for split in (train, valid):
        for name, label in zip(split.names, split.labels.tolist(), strict=True):
            digest.update(b"%s %d\n" % (bytes(name), label))
    return digest.hexdigest()
