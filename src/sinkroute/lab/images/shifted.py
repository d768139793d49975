"""ImageNet-C, -A, -R and -O: images that a classifier of ImageNet-1K is evaluated on, and which of its classes count.

| name | images | classes | measure | source |
|---|---|---|---|---|
| imagenet-c | 50,000 for each corruption and severity | 1000 | error | Hendrycks, Dietterich 2019, arXiv 1903.12261 |
| imagenet-a | 7,500 | 200 | top-1 among the 200 | Hendrycks et al. 2019, arXiv 1907.07174 |
| imagenet-r | 30,000 | 200 | top-1 among the 200 | Hendrycks et al. 2020, arXiv 2006.16241 |
| imagenet-o | 2,000, outside the 1000 classes | 200 | AUPR among the 200 | Hendrycks et al. 2019, arXiv 1907.07174 |

A label of ImageNet-1K is the place of its WordNet id among the sorted 1000, so the 200 classes are found by the names
of the class folders, given the 1000 ids: `read_wnids`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from sinkroute._errors import require_count, unknown_name
from sinkroute.lab.images.data import Split
from sinkroute.lab.images.folder import FolderImages, class_folders
from sinkroute.lab.images.imagenet import CLASSES

__all__ = ["SHIFTED", "Shifted", "ShiftedSet", "load_shifted", "read_wnids"]

_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Shifted:
    """What a set must hold.

    Attributes:
        images, classes: how many there are.
        source: where to get it.
        margin: whether evaluation cuts the middle out of a larger image; those of ImageNet-C are cut out already.
        corrupted: whether it lies in folders CORRUPTION/SEVERITY.
    """

    images: int
    classes: int
    source: str
    margin: bool = True
    corrupted: bool = False


SHIFTED = {
    "imagenet-a": Shifted(7_500, 200, "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet-c": Shifted(50_000, 1000, "https://zenodo.org/records/2235448", margin=False, corrupted=True),
    "imagenet-o": Shifted(2_000, 200, "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet-r": Shifted(30_000, 200, "https://github.com/hendrycks/imagenet-r"),
}
"""Name -> what the set must hold."""


@dataclass(frozen=True)
class ShiftedSet:
    """Images for evaluation only.

    Attributes:
        name: of the set, with corruption and severity where it has them.
        images: PIL images with labels from 0 to 999 (for ImageNet-O those of the folders, not the true ones).
        classes: (V,) int64, sorted: the labels that count; a model's other logits are left out.
        margin: for `EvaluationImages`.
    """

    name: str
    images: Split = field(repr=False)
    classes: Tensor = field(repr=False)
    margin: bool = True

    def errors(self, logits_BV: Tensor, labels_B: Tensor) -> Tensor:
        """(B,) bool: where the largest logit among `classes` is not that of the label.

        Args:
            logits_BV: (B, 1000).
            labels_B: (B,) int64, each one of `classes`.
        """
        classes = self.classes.to(logits_BV.device)
        return classes[logits_BV[:, classes].argmax(1)] != labels_B

    def known(self, split: Split) -> Subset[tuple[object, int]]:
        """The images of `split` whose label is one of `classes`: the known ones that ImageNet-O is told apart from.

        Args:
            split: of ImageNet-1K, such as `data.valid`.
        """
        return Subset(split, torch.isin(split.labels, self.classes).nonzero()[:, 0].tolist())  # type: ignore[arg-type]


def read_wnids(path: str | Path) -> list[str]:
    """The 1000 WordNet ids of ImageNet-1K, sorted: the label of a class is its place.

    Args:
        path: a text file whose lines begin with an id (such as LOC_synset_mapping.txt), a folder with one folder per
            class, or a folder that holds such a folder as `train` or `val`.

    Raises:
        ValueError: these are not 1000 ids.
        FileNotFoundError: nothing is at `path`.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"wnids: found nothing at {str(path)!r}; pass a list of the 1000 class ids, or ImageNet"
        )
    if place.is_dir():
        inner = next((place / name for name in ("train", "val") if (place / name).is_dir()), place)
        names = class_folders(inner)
    else:
        names = [line.split(maxsplit=1)[0] for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = sorted({name for name in names if _WNID.fullmatch(name)})
    if len(found) != CLASSES or len(names) != CLASSES:
        raise ValueError(
            f"wnids: {place} names {len(found):,} different class ids (n and 8 digits) among {len(names):,}, expected "
            f"{CLASSES:,}; pass a text file with one at the head of each line, or the folder of ImageNet-1K"
        )
    return found


def load_shifted(
    name: str,
    path: str | Path,
    wnids: Sequence[str],
    corruption: str | None = None,
    severity: int | None = None,
) -> ShiftedSet:
    """Open one of the sets in `SHIFTED`.

    Args:
        name: "imagenet-a", "imagenet-c", "imagenet-o" or "imagenet-r".
        path: the folder that the archive unpacks to: with one folder per class; for "imagenet-c", with
            CORRUPTION/SEVERITY/CLASS.
        wnids: the sorted 1000 ids, as `read_wnids` gives them.
        corruption: for "imagenet-c": a folder's name, such as "gaussian_noise".
        severity: for "imagenet-c": 1 to 5.

    Raises:
        ValueError: `name`, `corruption` or `severity` is unknown, missing or too much; the folder does not hold what
            the set has; a class is not of ImageNet-1K.
        FileNotFoundError: nothing is at `path`.
    """
    if name not in SHIFTED:
        raise unknown_name("shifted images", name, SHIFTED)
    shifted = SHIFTED[name]
    root, called = Path(path), name
    if not root.is_dir():
        raise FileNotFoundError(f"path: found no folder at {str(path)!r}; get {name} from {shifted.source}")
    if shifted.corrupted:
        if corruption is None or severity is None:
            raise ValueError(f"corruption, severity: {name} needs both, got {corruption!r} and {severity!r}")
        known = class_folders(root)
        if corruption not in known:
            raise unknown_name(f"corruption in {root}", corruption, known)
        require_count("severity", severity, 1, 5)
        root, called = root / corruption / str(severity), f"{name}/{corruption}/{severity}"
        if not root.is_dir():
            raise FileNotFoundError(f"path: found no folder at {str(root)!r}; get {name} from {shifted.source}")
    elif corruption is not None or severity is not None:
        raise ValueError(f"corruption, severity: {name} has none, got {corruption!r} and {severity!r}")
    images = FolderImages(root, {wnid: label for label, wnid in enumerate(wnids)})
    classes = images.labels.unique()
    if len(images) != shifted.images or len(classes) != shifted.classes:
        raise ValueError(
            f"path: {root} is not {called}: found {len(images):,} images of {len(classes):,} classes, expected "
            f"{shifted.images:,} of {shifted.classes:,}; get it from {shifted.source}"
        )
    return ShiftedSet(called, images, classes, shifted.margin)
