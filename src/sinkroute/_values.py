"""Tensors that know their shape but hold no numbers: those of the meta device, and fake ones."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["holds_values"]


def holds_values(tensor: Tensor) -> bool:
    """Whether there are numbers to look at. While something is compiled, too: there, True.

    >>> import torch
    >>> holds_values(torch.zeros(2)), holds_values(torch.zeros(2, device="meta"))
    (True, False)
    """
    # A fake tensor claims any device; what gives it away is that it is of a subclass.
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
