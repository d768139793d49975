"""Images in one folder per class, the form in which ImageNet and most other sets are kept on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.images.decoding import SUFFIXES, decode

__all__ = ["FolderImages", "class_folders", "is_image"]


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root` that are not hidden, sorted: the classes, in the order of their labels."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """The images ROOT/CLASS/FILE, decoded when asked for; classes in their order, the files of each sorted by name.

    Args:
        root: the folder of class folders.
        labels: label of each class folder.

    Raises:
        ValueError: a class folder is in `root` and not in `labels`, or holds no image.
    """

    def __init__(self, root: Path, labels: Mapping[str, int]) -> None:
        self.root = root
        names, numbers = [], []
        for folder in class_folders(root):
            if folder not in labels:
                raise ValueError(f"path: {root / folder} is a folder of no known class; move it elsewhere")
            with os.scandir(root / folder) as entries:
                files = sorted(entry.name for entry in entries if is_image(entry.name))
            if not files:
                raise ValueError(f"path: {root / folder} holds no image ({', '.join(sorted(SUFFIXES))})")
            names += [f"{folder}/{file}" for file in files]
            numbers += [labels[folder]] * len(files)
        # One block of memory: processes that load in parallel would copy a million Python strings, by counting who
        # refers to them.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels: Tensor = torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in colour, and its label.

        Raises:
            ValueError: the file is no image, is cut short, or is damaged.
        """
        file = self.root / os.fsdecode(bytes(self.names[index]))
        return decode(file.read_bytes(), str(file)), int(self.labels[index])
