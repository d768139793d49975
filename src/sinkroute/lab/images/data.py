"""A data set of images: three splits of (image, label), and what a model must know of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageData", "Split", "TensorImages", "split_images"]


class Split(Protocol):
    """Images by number: uint8 tensors (C, H, W) of one size, or PIL images of any; `labels` are (N,) int64."""

    labels: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor | Image.Image, int]: ...


@dataclass(frozen=True)
class ImageData:
    """Images in three splits. Two data sets are equal when name, source, digest and shape are.

    Attributes:
        name: The registry name.
        source: Where the images came from, in human words.
        sha256: Hex digest that identifies the content: of all pixels and labels for sets held in memory, of all names
            and labels for those that stay on disk.
        classes: How many classes there are; labels are 0 to classes - 1.
        shape: (C, H, W) of the images that a model gets.
        mean: per channel, of pixels in [0, 1], over the training images.
        std: likewise.
        train, valid, test: the splits.
    """

    name: str
    source: str
    sha256: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = field(compare=False)
    std: tuple[float, ...] = field(compare=False)
    # The digest already speaks for the content.
    train: Split = field(compare=False, repr=False)
    valid: Split = field(compare=False, repr=False)
    test: Split = field(compare=False, repr=False)


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory.

    Args:
        images: (N, C, H, W) uint8. Not copied.
        labels: (N,) int64.

    >>> split = TensorImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([3, 1]))
    >>> image, label = split[0]
    >>> image.shape, label
    (torch.Size([1, 4, 4]), 3)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def split_images(
    name: str,
    source: str,
    images: np.ndarray,
    labels: np.ndarray,
    size: int | None = None,
    expected: str | None = None,
) -> ImageData:
    """Cut images into 80 % for training, 10 % for validation and 10 % for the test, class by class.

    The SHA-256 of "name:number", number being an image's place in the data set, is its draw: in the order of these, the
    first tenth of a class, rounded, goes to validation, the next to the test, and read backwards they give the order
    within a split. No generator of random numbers is in it, so the splits stay the same forever.

    Args:
        name: The registry name.
        source: Where the images came from.
        images: (N, C, H, W) uint8.
        labels: (N,) integers from 0 on.
        size: Rows and columns to resize the images to (bicubic); None: as they are.
        expected: The SHA-256 that images and labels must have; None: any.

    Raises:
        ValueError: the content is not the one expected.
    """
    sha256 = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    if expected is not None and sha256 != expected:
        raise ValueError(
            f"images {name!r} ({source}): found other content than that which published numbers were measured on: "
            f"expected sha256 {expected}, found {sha256}; install the version of the package that is tested"
        )
    draws = [hashlib.sha256(f"{name}:{number}".encode()).digest() for number in range(len(labels))]
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(labels):
        numbers = sorted(np.flatnonzero(labels == label).tolist(), key=lambda number: draws[number])
        tenth = round(len(numbers) / 10)
        for part, some in zip(parts, (numbers[2 * tenth :], numbers[:tenth], numbers[tenth : 2 * tenth]), strict=True):
            part += some
    whole = torch.from_numpy(np.ascontiguousarray(images))
    if size is not None:
        whole = _resized(whole, size)
    train, valid, test = (_part(whole, labels, sorted(part, key=lambda number: draws[number][::-1])) for part in parts)
    mean, std = _statistics(train.images)
    return ImageData(
        name=name,
        source=source,
        sha256=sha256,
        classes=int(labels.max()) + 1,
        shape=(whole.shape[1], whole.shape[2], whole.shape[3]),
        mean=mean,
        std=std,
        train=train,
        valid=valid,
        test=test,
    )


def _part(images: Tensor, labels: np.ndarray, numbers: list[int]) -> TensorImages:
    return TensorImages(images[torch.tensor(numbers)], torch.from_numpy(labels[numbers].astype(np.int64)))


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Sums of integers: the same numbers whatever the order of the additions.
    pixels = images.long().transpose(0, 1).flatten(1)
    count = pixels.shape[1]
    means = [total / count for total in pixels.sum(1).tolist()]
    squares = [total / count for total in pixels.square().sum(1).tolist()]
    deviations = [math.sqrt(square - mean**2) for square, mean in zip(squares, means, strict=True)]
    return tuple(mean / 255 for mean in means), tuple(deviation / 255 for deviation in deviations)


def _resized(images: Tensor, size: int) -> Tensor:
    from sinkroute.lab.images.transforms.pixels import to_pil, to_tensor
    from sinkroute.lab.images.transforms.resize import resize

    return torch.stack([to_tensor(resize(to_pil(image), (size, size))) for image in images])
