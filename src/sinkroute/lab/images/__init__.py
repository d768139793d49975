"""Images to train and test on: data sets, their augmentation, and the order in which a model sees them.

- `load_images(name, path, size)` reads one of the data sets that `list_images()` names, as `ImageData`.
- `ImageBatches` serves augmented training images in an order that depends on (seed, index) alone.
- `BatchMixing` mixes the images of a batch (mixup, cutmix) and makes soft targets.
- `evaluation_batches` serves each image of a split once, as uint8; `normalise(scale(...))` is what a model reads.
- `Augment` holds the settings of all that; `DEIT` is the published recipe.
- `load_shifted` opens ImageNet-C, -A, -R and -O; `EvaluationImages` and `detection_aupr` measure on them.

Shapes: B images of a batch, C channels, H rows, W columns. A new data set is one file with a loader and one line in
`registry.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute._lazy import lazily

if TYPE_CHECKING:
    from sinkroute.lab.images.augment import DEIT, Augment
    from sinkroute.lab.images.average_precision import detection_aupr
    from sinkroute.lab.images.batches import EvaluationImages, ImageBatches, evaluation_batches
    from sinkroute.lab.images.data import ImageData
    from sinkroute.lab.images.registry import IMAGES, list_images, load_images
    from sinkroute.lab.images.shifted import load_shifted, read_wnids
    from sinkroute.lab.images.transforms.mixing import BatchMixing
    from sinkroute.lab.images.transforms.scaling import normalise, scale

__all__ = [
    "DEIT",
    "IMAGES",
    "Augment",
    "BatchMixing",
    "EvaluationImages",
    "ImageBatches",
    "ImageData",
    "detection_aupr",
    "evaluation_batches",
    "list_images",
    "load_images",
    "load_shifted",
    "normalise",
    "read_wnids",
    "scale",
]

# Loaded when first asked for: the configuration needs `Augment`, and the command line's help no torch.
__getattr__ = lazily(
    __name__,
    {
        "DEIT": "augment",
        "IMAGES": "registry",
        "Augment": "augment",
        "BatchMixing": "transforms.mixing",
        "EvaluationImages": "batches",
        "ImageBatches": "batches",
        "ImageData": "data",
        "detection_aupr": "average_precision",
        "evaluation_batches": "batches",
        "list_images": "registry",
        "load_images": "registry",
        "load_shifted": "shifted",
        "normalise": "transforms.scaling",
        "read_wnids": "shifted",
        "scale": "transforms.scaling",
    },
)
