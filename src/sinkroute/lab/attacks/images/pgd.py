"""PGD: many small steps along the sign of the gradient, each projected back (Madry et al., arXiv 1706.06083, 2.1).

The number of steps and their size are those of the papers on robust mixtures of experts: 20 steps of 0.15 ε, which is
enough to cross the ball. Other tools take shorter ones by default (foolbox: ε/30) and so attack more weakly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._errors import require_count, require_numbers
from sinkroute.lab.attacks.images.ball import Ball
from sinkroute.lab.attacks.images.classifier import Predict, ascent_direction

__all__ = ["pgd"]


def pgd(
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    steps: int = 20,
    step_size: float = 0.15,
    random_start: bool = True,
) -> Tensor:
    """The last of `steps` iterates x ← project(x + step_size · ε · sign ∇ cross-entropy).

    Args:
        predict, images, labels, ball, generator: as `attack_images` gives them.
        steps: at least 1.
        step_size: in units of ε, above 0.
        random_start: begin at a uniform draw from the ball (clipped to it), as Madry et al. do, not at the image.

    Raises:
        ValueError: an option is out of range.
        TypeError: `step_size` is no number.
    """
    require_count("steps", steps, 1)
    require_numbers(step_size=step_size)
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size: expected a finite number above 0, in units of epsilon, got {step_size}")
    radius = ball.epsilon * ball.unit
    adversarial = images
    if random_start:
        draw = torch.rand(images.shape, generator=generator, device=images.device) * 2 - 1
        adversarial = ball.project(images + radius * draw)
    for _ in range(steps):
        direction = ascent_direction(predict, adversarial, labels)
        adversarial = ball.project(adversarial + step_size * radius * direction)
    return adversarial
