"""The data sets of images by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sinkroute._errors import require_count, unknown_name
from sinkroute.lab.images.data import ImageData
from sinkroute.lab.images.digits import load_digits
from sinkroute.lab.images.imagenet import load_imagenet
from sinkroute.lab.images.mnist import load_mnist_5k

__all__ = ["IMAGES", "list_images", "load_images"]

IMAGES: dict[str, Callable[[str | Path | None, int | None], ImageData]] = {
    "digits": load_digits,
    "imagenet-1k": load_imagenet,
    "mnist-5k": load_mnist_5k,
}
"""Name -> loader; a loader takes the `path` and the `size` of `load_images` and returns an `ImageData`."""


def list_images() -> list[str]:
    """The names that `load_images` knows, sorted.

    >>> list_images()
    ['digits', 'imagenet-1k', 'mnist-5k']
    """
    return sorted(IMAGES)


def load_images(name: str, path: str | Path | None = None, size: int | None = None) -> ImageData:
    """Load a data set of images by name.

    Args:
        name: "digits" or "mnist-5k", which ship inside packages and need no path; or "imagenet-1k".
        path: Where the images are: for "imagenet-1k" a folder, or "hf" for the Hugging Face Hub.
        size: Rows and columns of the images that a model gets; None: the data set's own (8, 28, 224).

    Raises:
        ValueError: `name` is unknown; `size` is below 1; `path` is missing, or given where none is taken; the content
            is not what the name promises.
        FileNotFoundError: nothing is at `path`.
        PermissionError: the Hub gives no access.
        ModuleNotFoundError: a package that holds or reads the images is not installed.

    >>> data = load_images("digits")
    >>> data.shape, data.classes, len(data.train), len(data.valid), len(data.test)
    ((1, 8, 8), 10, 1439, 179, 179)
    """
    if name not in IMAGES:
        raise unknown_name("images", name, IMAGES)
    if size is not None:
        require_count("size", size, 1)
    return IMAGES[name](path, size)
