"""The attacks on images by name, and the one entrance that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sinkroute._errors import require_count, unknown_name
from sinkroute.lab.attacks.images.auto_attack import auto_attack
from sinkroute.lab.attacks.images.ball import Ball
from sinkroute.lab.attacks.images.classifier import Predict
from sinkroute.lab.attacks.images.fgsm import fgsm
from sinkroute.lab.attacks.images.pgd import pgd
from sinkroute.lab.attacks.images.spsa import spsa

__all__ = ["IMAGE_ATTACKS", "attack_images", "list_image_attacks"]

IMAGE_ATTACKS: dict[str, Callable[..., Tensor]] = {
    "auto-attack": auto_attack,
    "fgsm": fgsm,
    "pgd": pgd,
    "spsa": spsa,
}
"""Name -> attack(predict, images, labels, ball, generator, *, options) -> images. Its keyword-only arguments are its
options. The batch has one image at least, and what comes back lies in the ball."""


def list_image_attacks() -> list[str]:
    """The names that `attack_images` knows, sorted.

    >>> list_image_attacks()
    ['auto-attack', 'fgsm', 'pgd', 'spsa']
    """
    return sorted(IMAGE_ATTACKS)


def attack_images(
    name: str,
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    seed: int,
    *,
    epsilon: float = 1.0,
    space: str = "pixel",
    std: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Change images within an L∞ ball so that a classifier errs; the same arguments give the same images.

    Args:
        name: One of `list_image_attacks()`.
        predict: Maps pixels (B, C, H, W), float32, to logits (B, N); it normalises. Its model should be in evaluation
            mode, and its answer for an image not depend on the others. All attacks but "spsa" differentiate it; no
            parameter's `.grad` is touched.
        images: (B, C, H, W) float32 in [0, 1]. Not changed.
        labels: (B,) int64, the right classes, which the attack leads away from.
        seed: Key of the attack's random draws, at least 0. One batch's seed is not another's: give each its own.
        epsilon: Radius of the ball in units of 1/255, at least 0.
        space: "pixel": the ball is in pixels and clipped to [0, 1]. "normalised": it is in the classifier's normalised
            input, where a channel's unit is its standard deviation, and nothing is clipped.
        std: The C standard deviations by which the classifier divides pixels. Only read with "normalised".
        options: The attack's own options, by name; see its docstring.

    Returns:
        (B, C, H, W) float32 pixels, within the ball to the rounding of float32.

    Raises:
        ValueError: A name, shape or value is not as above, or logits are not finite.
        TypeError: A dtype is not as above, or an option is no number.
        ModuleNotFoundError: "auto-attack" without `pyautoattack` installed.

    >>> images, labels = torch.full((1, 1, 1, 2), 0.5), torch.tensor([1])
    >>> def predict(pixels):  # class 1 is a left pixel that is brighter than the right one
    ...     return torch.stack([pixels[:, 0, 0, 1], pixels[:, 0, 0, 0]], dim=1)
    >>> attack_images("pgd", predict, images, labels, seed=0, epsilon=51).flatten().tolist()
    [0.30000001192092896, 0.699999988079071]
    """
    if name not in IMAGE_ATTACKS:
        raise unknown_name("image attack", name, IMAGE_ATTACKS)
    attack = IMAGE_ATTACKS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(attack).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise unknown_name(f"{name} option", option, [*known, "epsilon", "space", "std"])
    require_count("seed", seed, 0)
    _require_images(images, labels)
    # An evaluation may run in inference mode, whose tensors no gradient can pass: they are copied outside of it.
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.clone()
        ball = Ball.around(images, epsilon, space, std)
        if not len(images):
            return images
        generator = torch.Generator(device=images.device).manual_seed(seed)
        return attack(predict, images, labels, ball, generator, **options).detach()


def _require_images(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.float32:
        raise TypeError(f"images: expected float32 in [0, 1], got {images.dtype}; bytes are divided by 255 first")
    if images.ndim != 4:
        raise ValueError(f"images: expected the shape (B, C, H, W), got {tuple(images.shape)}")
    # Written so that NaN fails.
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images: expected pixels in [0, 1], got {images.min().item():g} to {images.max().item():g}; "
            "normalise inside of predict"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected one for each of {len(images)} images, got the shape {tuple(labels.shape)}")
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels: expected 0 or more, got {int(labels.min())}")
