"""The order in which a model sees images: for training a function of (seed, index), for evaluation each image once."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinkroute._errors import require_count
from sinkroute.lab.images.augment import Augment
from sinkroute.lab.images.data import ImageData, Split
from sinkroute.lab.images.policy import parse_policy
from sinkroute.lab.images.transforms.crop import random_resized_crop
from sinkroute.lab.images.transforms.erasing import erase_
from sinkroute.lab.images.transforms.flip import random_flip
from sinkroute.lab.images.transforms.pad_crop import pad_crop
from sinkroute.lab.images.transforms.pixels import to_pil, to_tensor
from sinkroute.lab.images.transforms.randaugment import randaugment
from sinkroute.lab.images.transforms.resize import central_part
from sinkroute.lab.images.transforms.scaling import normalise, scale

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EvaluationImages", "ImageBatches", "evaluation_batches"]

# The first number after the seed keeps the draws of order, augmentation and mixing (3) apart.
_ORDER, _AUGMENT = 1, 2


class ImageBatches(Dataset[dict[str, Tensor]]):
    """Augmented training images in a keyed order: item i is the same whatever was read before.

    Item `step * batch + row` stands in row `row` of the batch of step `step`: read with
    `DataLoader(..., batch_size=batch)`, from `Subset(..., range(step * batch, len(...)))` to resume.

    A pass over N images has N × `augment.repeats` items, ordered by a random permutation keyed by (seed, pass); the
    repeats of an image follow one another, so that they stand in one batch (repeated augmentation: Hoffer et al. 2019,
    arXiv 1901.09335). Each item's augmentation is keyed by (seed, index): crop, flip, RandAugment, and, once the image
    is normalised, erasing. DeiT's sampler ends a pass after N items, hence shows a random third of the images three
    times; here a pass ends when each image was shown `repeats` times.

    Args:
        data: its training split is read.
        batch: items in a step's batch, at least 1.
        seed: key of order and augmentation, at least 0.
        steps: of the training, at least 0.
        augment: all off by default. Mixing is left to `BatchMixing`.

    >>> from sinkroute.lab.images import load_images
    >>> batches = ImageBatches(load_images("digits"), batch=32, seed=0, steps=100, augment=Augment(crop="pad"))
    >>> item = batches[42]
    >>> len(batches), item["images"].shape, item["images"].dtype, item["labels"].dtype
    (3200, torch.Size([1, 8, 8]), torch.float32, torch.int64)
    """

    def __init__(self, data: ImageData, batch: int, seed: int, steps: int, augment: Augment | None = None) -> None:
        require_count("batch", batch, 1)
        require_count("seed", seed, 0)
        require_count("steps", steps, 0)
        self.data = data
        self.seed = seed
        self.count = steps * batch
        self.augment = Augment() if augment is None else augment
        self._policy = None if self.augment.randaugment is None else parse_policy(self.augment.randaugment)
        self._fill = tuple(round(255 * mean) for mean in data.mean)
        self._pass = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index`: {"images": (C, H, W) float32, normalised, "labels": () int64}.

        Raises:
            IndexError: `index` is outside [0, steps * batch); negative indices are not counted from the end.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The items of one batch, scaled at once; `torch.utils.data.DataLoader` calls this by itself."""
        pixels, labels, generators = [], [], []
        for index in map(operator.index, indices):
            image, label = self.data.train[self.source(index)]
            generators.append(np.random.default_rng([self.seed, _AUGMENT, index]))
            pixels.append(self._augmented(image, generators[-1]))
            labels.append(label)
        images = normalise(scale(torch.stack(pixels)), self.data.mean, self.data.std)
        if self.augment.erasing:
            for image, generator in zip(images, generators, strict=True):
                erase_(image, self.augment.erasing, generator)
        return [{"images": image, "labels": label} for image, label in zip(images, torch.tensor(labels), strict=True)]

    def source(self, index: int) -> int:
        """Which image of the training split item `index` shows.

        Raises:
            IndexError: `index` is outside [0, steps * batch).
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0 <= index < {self.count} (steps * batch), got {index}")
        images = len(self.data.train)
        number, position = divmod(index, images * self.augment.repeats)
        if number != self._pass:
            self._order = np.random.default_rng([self.seed, _ORDER, number]).permutation(images)
            self._pass = number
        return int(self._order[position // self.augment.repeats])

    def _augmented(self, image: Tensor | Image.Image, generator: np.random.Generator) -> Tensor:
        augment = self.augment
        if not isinstance(image, Tensor) or augment.crop == "resized" or augment.flip or self._policy is not None:
            picture = to_pil(image) if isinstance(image, Tensor) else image
            if augment.crop == "resized":
                picture = random_resized_crop(picture, self.data.shape[1], generator, augment.min_area)
            elif not isinstance(image, Tensor):
                picture = central_part(picture, self.data.shape[1])
            picture = random_flip(picture, augment.flip, generator)
            if self._policy is not None:
                picture = randaugment(picture, self._policy, generator, self._fill)
            image = to_tensor(picture)
        return pad_crop(image, augment.padding, generator) if augment.crop == "pad" else image


class EvaluationImages(Dataset[dict[str, Tensor]]):
    """A split as a model is evaluated on it: {"images": (C, H, W) uint8, "labels": () int64}, in the split's own order.

    Args:
        split: images as tensors, which stay as they are, or as PIL images.
        size: rows and columns of the part that `central_part` cuts out of a PIL image.
        margin: passed on to it.
    """

    def __init__(self, split: Split, size: int, margin: bool = True) -> None:
        self.split = split
        self.size = size
        self.margin = margin

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.split[index]
        pixels = image if isinstance(image, Tensor) else to_tensor(central_part(image, self.size, self.margin))
        return {"images": pixels, "labels": torch.tensor(label)}


def evaluation_batches(data: ImageData, split: str, batch: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image of a split once, in its order: (B, C, H, W) uint8 and (B,) int64; the last batch may be smaller.

    Args:
        data: the images.
        split: "train", "valid" or "test".
        batch: images in a batch, at least 1.
        workers: processes that decode; 0: this one.

    Raises:
        ValueError: `split` has another name.

    >>> from sinkroute.lab.images import load_images
    >>> [len(labels) for images, labels in evaluation_batches(load_images("digits"), "valid", batch=100)]
    [100, 79]
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split: expected 'train', 'valid' or 'test', got {split!r}")
    require_count("batch", batch, 1)
    images = EvaluationImages(getattr(data, split), data.shape[1])
    loader = DataLoader(images, batch_size=batch, num_workers=workers)
    return ((part["images"], part["labels"]) for part in loader)
