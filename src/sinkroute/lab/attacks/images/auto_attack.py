"""AutoAttack: the standard ensemble without parameters (Croce and Hein, arXiv 2003.01690), by `pyautoattack`.

APGD on cross-entropy, targeted APGD and FAB against the 9 likeliest classes, and Square with 5000 queries; each runs on
the images that the ones before it left standing.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from sinkroute.lab.attacks.images.ball import Ball
from sinkroute.lab.attacks.images.classifier import Predict, checked_logits

__all__ = ["auto_attack"]


def auto_attack(predict: Predict, images: Tensor, labels: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """The first adversarial image that one of the four finds; an image that is misread anyway, or by none, unchanged.

    Raises:
        ModuleNotFoundError: `pyautoattack` is not installed.
        ValueError: another space than "pixel", or fewer than 4 classes, which targeted APGD's loss needs.
    """
    try:
        pyautoattack = importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "attack 'auto-attack' runs pyautoattack, which is not installed; cure: pip install \"sinkroute[lab]\""
        ) from error
    if ball.space != "pixel":
        raise ValueError(
            f"space: 'auto-attack' clips images to [0, 1] itself and knows no other space than 'pixel', got "
            f"{ball.space!r}; 'pgd' does"
        )
    with torch.no_grad():
        classes = checked_logits(predict, images, labels).shape[1]
    if classes < 4:
        raise ValueError(
            f"predict: 'auto-attack' needs 4 classes or more for its targeted loss, got {classes}; take 'pgd'"
        )

    def model(inputs: Tensor) -> Tensor:
        return _OnlyInputs.apply(inputs, predict)

    # It seeds torch's global generators, and takes away the trace function of a debugger or a coverage tool.
    trace = sys.gettrace()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            attack = pyautoattack.AutoAttack(
                model, eps=ball.epsilon, seed=generator.initial_seed(), device=images.device
            )
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    finally:
        sys.settrace(trace)
    return ball.project(adversarial)


class _OnlyInputs(torch.autograd.Function):
    """`predict` as a single operation of autograd: a backward pass reaches the images and no parameter's `.grad`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, predict: Predict) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return predict(inputs)
        with torch.enable_grad():
            ctx.leaf = inputs.detach().requires_grad_()
            ctx.logits = predict(ctx.leaf)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, gradients)
        return gradient, None
