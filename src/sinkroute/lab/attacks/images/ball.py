"""Where an adversarial image may lie: an L∞ ball around the image, in one of two spaces.

With x a pixel in [0, 1] and s_c the standard deviation by which a classifier divides channel c:

- "pixel": |x' − x| ≤ ε and 0 ≤ x' ≤ 1, so that x' is an image again;
- "normalised": |x' − x| / s_c ≤ ε and no other bound. This is an attack on the classifier's normalised input, and x'
  may be no image. The mean cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkroute._errors import require_numbers, unknown_name

__all__ = ["Ball"]

_SPACES = ("normalised", "pixel")


@dataclass(frozen=True)
class Ball:
    """The allowed images around a batch, in pixels.

    Attributes:
        space: "pixel" or "normalised".
        epsilon: the radius in units of the space (not of 1/255).
        unit: (C, 1, 1), one unit of the space in pixels: 1, or the channel's standard deviation.
        low, high: (B, C, H, W), the least and the greatest value of each pixel.
    """

    space: str
    epsilon: float
    unit: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, images: Tensor, epsilon: float, space: str = "pixel", std: Sequence[float] | None = None) -> Ball:
        """The ball of radius epsilon / 255.

        Raises:
            ValueError: `epsilon` is negative or not finite, `space` is unknown, or "normalised" without a positive
                standard deviation for each channel.
            TypeError: `epsilon` is no number.

        >>> ball = Ball.around(torch.tensor([0.0, 0.5]).view(1, 1, 1, 2), epsilon=51)
        >>> ball.low.flatten().tolist(), ball.high.flatten().tolist()
        ([0.0, 0.30000001192092896], [0.20000000298023224, 0.699999988079071])
        """
        require_numbers(epsilon=epsilon)
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon: expected a finite number of 0 or more, in units of 1/255, got {epsilon}")
        if space not in _SPACES:
            raise unknown_name("space", space, _SPACES)
        channels = images.shape[1]
        unit_C = images.new_ones(channels)
        if space == "normalised":
            if std is None or len(std) != channels or not all(0 < value < math.inf for value in std):
                raise ValueError(
                    f"std: space='normalised' needs the {channels} positive standard deviations, one for each channel, "
                    f"by which the classifier divides; got {std}"
                )
            unit_C = images.new_tensor(std)
        unit = unit_C.view(channels, 1, 1)
        radius = unit * (epsilon / 255)
        low, high = images - radius, images + radius
        if space == "pixel":
            low, high = low.clamp(min=0), high.clamp(max=1)
        return cls(space, epsilon / 255, unit, low, high)

    def project(self, images: Tensor) -> Tensor:
        """The nearest allowed images."""
        return torch.clamp(images, self.low, self.high)
