"""What is done to training images, as settings. All is off by default; `DEIT` is the published recipe.

The recipe is that of DeiT (Touvron et al. 2021, arXiv 2012.12877, table 9). Evaluation does not augment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkroute._errors import require_count, require_numbers

__all__ = ["DEIT", "Augment"]


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images.

    Raises:
        ValueError, TypeError: a field is out of its range, by name.

    >>> Augment(mixup=0.8, smoothing=0.1).mixes
    True
    >>> Augment(erasing=2)
    Traceback (most recent call last):
    ValueError: erasing must be from 0 to 1, got 2
    """

    crop: Literal["none", "pad", "resized"] = "none"
    """"resized": a random part of the image, resized (photographs); "pad": pad and crop at a random place (small
    images); "none": as in evaluation."""
    padding: int = 2
    """Pixels that the crop "pad" adds to each side."""
    min_area: float = 0.08
    """Smallest share of the area that the crop "resized" takes."""
    flip: float = 0.0
    """Probability of a horizontal flip. Never for digits, which it makes others."""
    randaugment: str | None = None
    """A RandAugment policy in the notation of timm, such as "rand-m9-mstd0.5-inc1"; None: none."""
    erasing: float = 0.0
    """Probability that a random rectangle becomes noise."""
    mixup: float = 0.0
    """α of mixup's Beta(α, α); 0: no mixup."""
    cutmix: float = 0.0
    """α of cutmix's Beta(α, α); 0: no cutmix."""
    switch: float = 0.5
    """Share of the batches mixed by cutmix where both are on."""
    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    repeats: int = 1
    """How often a pass over the data shows each image, each time augmented anew."""

    def __post_init__(self) -> None:
        from sinkroute.lab.images.policy import parse_policy

        if self.crop not in ("none", "pad", "resized"):
            raise ValueError(f"crop must be one of 'none', 'pad', 'resized', got {self.crop!r}")
        names = ("min_area", "flip", "erasing", "switch", "smoothing", "mixup", "cutmix")
        require_numbers(**{name: getattr(self, name) for name in names})
        for name in names[:5]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.min_area == 0:
            raise ValueError("min_area must be above 0, got 0: a crop has at least one pixel")
        for name in names[5:]:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        require_count("padding", self.padding, 0)
        require_count("repeats", self.repeats, 1)
        if self.randaugment is not None:
            parse_policy(self.randaugment)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


DEIT = Augment(
    crop="resized",
    flip=0.5,
    randaugment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    repeats=3,
)
"""DeiT's recipe for ImageNet-1K."""
