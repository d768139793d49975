"""SPSA: an attack that asks for logits only (Uesato et al., arXiv 1802.05666, section 3.2).

The gradient of the margin f(x) = z_y − max_{j≠y} z_j is estimated from differences along random directions v of ±1,

    g = mean over v of (f(x + δ v) − f(x − δ v)) / (2 δ) · v,

and Adam goes down it, each step projected to the ball. It sees through what makes a gradient useless, such as a router
whose choice of experts jumps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._errors import require_count, require_numbers
from sinkroute.lab.attacks.images.ball import Ball
from sinkroute.lab.attacks.images.classifier import Predict, margin

__all__ = ["spsa"]


@torch.no_grad()
def spsa(
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    iterations: int = 40,
    samples: int = 128,
    delta: float = 0.01,
    lr: float = 0.01,
) -> Tensor:
    """The last of `iterations` iterates of projected Adam on the estimated gradient.

    Costs 2 · iterations · samples forward passes of the batch: 10 240 by default.

    Args:
        predict, images, labels, ball, generator: as `attack_images` gives them. `predict` is also asked about images
            up to δ outside the ball, hence of [0, 1].
        iterations: Adam's steps, at least 1.
        samples: directions for each of them, at least 1; each image has its own.
        delta: δ in units of the attacked space, not of 1/255; above 0.
        lr: Adam's learning rate, in the same units; above 0.

    Raises:
        ValueError: an option is out of range.
        TypeError: `delta` or `lr` is no number.
    """
    require_count("iterations", iterations, 1)
    require_count("samples", samples, 1)
    require_numbers(delta=delta, lr=lr)
    for name, value in (("delta", delta), ("lr", lr)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    # In units of the attacked space, so that one learning rate fits channels of different standard deviation.
    offset = torch.zeros_like(images)
    optimizer = torch.optim.Adam([offset], lr=lr)
    adversarial = images
    for _ in range(iterations):
        estimate = torch.zeros_like(images)
        for _ in range(samples):
            coins = torch.randint(2, images.shape, generator=generator, dtype=images.dtype, device=images.device)
            signs = 2 * coins - 1
            step = delta * ball.unit * signs
            rise_B = margin(predict, adversarial + step, labels) - margin(predict, adversarial - step, labels)
            estimate += rise_B.view(-1, 1, 1, 1) * signs
        offset.grad = estimate / (2 * delta * samples)
        optimizer.step()
        adversarial = ball.project(images + ball.unit * offset)
        offset.copy_((adversarial - images) / ball.unit)
    return adversarial
