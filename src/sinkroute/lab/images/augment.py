"""What is done to training images, as settings. All is off by default; `DEIT` is the published recipe.

The recipe is that of DeiT (Touvron et al. 2021, arXiv 2012.12877, table 9). Evaluation does not augment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from sinkroute.lab.images.policy import parse_policy
from sinkroute.lab.settings import Count, Natural, Number, Share, settings

__all__ = ["DEIT", "Augment"]


@settings("data.augment", frozen=True)
class Augment:
    """Augmentation of training images.

    Raises:
        ValueError: a field is of another type or out of its range, by name.

    >>> Augment(mixup=0.8, smoothing=0.1).mixes
    True
    >>> Augment(erasing=2)
    Traceback (most recent call last):
    ValueError: data.augment.erasing must be from 0 to 1, got 2
    """

    crop: Literal["none", "pad", "resized"] = "none"
    """"resized": a random part of the image, resized (photographs); "pad": pad and crop at a random place (small
    images); "none": as in evaluation."""
    padding: Natural = 2
    """Pixels that the crop "pad" adds to each side."""
    min_area: Share = 0.08
    """Smallest share of the area that the crop "resized" takes."""
    flip: Share = 0.0
    """Probability of a horizontal flip. Never for digits, which it makes others."""
    randaugment: str | None = None
    """A RandAugment policy in the notation of timm, such as "rand-m9-mstd0.5-inc1"; None: none."""
    erasing: Share = 0.0
    """Probability that a random rectangle becomes noise."""
    mixup: Annotated[Number, Field(ge=0)] = 0.0
    """α of mixup's Beta(α, α); 0: no mixup."""
    cutmix: Annotated[Number, Field(ge=0)] = 0.0
    """α of cutmix's Beta(α, α); 0: no cutmix."""
    switch: Share = 0.5
    """Share of the batches mixed by cutmix where both are on."""
    smoothing: Share = 0.0
    """Share of the target that is spread evenly over all classes."""
    repeats: Count = 1
    """How often a pass over the data shows each image, each time augmented anew."""

    @field_validator("min_area")
    @classmethod
    def _is_some(cls, value: float) -> float:
        if not value:
            raise ValueError("must be above 0, got 0: a crop has at least one pixel")
        return value

    @field_validator("randaugment")
    @classmethod
    def _is_policy(cls, value: str | None) -> str | None:
        if value is not None:
            parse_policy(value)
        return value

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
