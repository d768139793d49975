"""What comes beside tokens, a mask and ids: in the right form, or refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sinkroute.kernels.storage import plain

__all__ = ["checked_ids", "checked_mask", "kind_of"]


def checked_mask(token_mask: Tensor | None, tokens: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The mask, `plain`.

    Args:
        token_mask: bool, True for real tokens, or None.
        tokens: what it is the mask of, on any device.
        shape: that it must have, one entry per token.

    Raises:
        TypeError: it is no bool tensor.
        ValueError: another shape.

    >>> checked_mask(torch.tensor([True, False]), torch.zeros(2, 8), (2,)).tolist()
    [True, False]
    >>> checked_mask([True, False], torch.zeros(2, 8), (2,))
    Traceback (most recent call last):
    TypeError: token_mask must be a bool tensor with True for real tokens, got [True, False] (list); use ...
    """
    if token_mask is None:
        return None
    if not isinstance(token_mask, Tensor):
        raise TypeError(
            f"token_mask must be a bool tensor with True for real tokens, got {kind_of(token_mask)}; "
            "use torch.as_tensor(mask, dtype=torch.bool)"
        )
    token_mask = plain("token_mask", token_mask, tokens)
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask must be bool with True for real tokens, got {token_mask.dtype}; use mask.bool()")
    if token_mask.shape != torch.Size(shape):
        raise ValueError(
            f"token_mask must have shape {tuple(shape)}, one entry per token, got {tuple(token_mask.shape)}; "
            "bring it into the leading shape of the tokens"
        )
    return token_mask


def checked_ids(token_ids: Tensor, tokens: Tensor) -> Tensor:
    """The ids of tokens (..., D), `plain`.

    Raises:
        TypeError: they are no integer tensor.
        ValueError: another shape than the leading one of the tokens.

    >>> checked_ids(torch.tensor([7, 9]), torch.zeros(2, 8)).tolist()
    [7, 9]
    >>> checked_ids(torch.tensor([7, 9, 7]), torch.zeros(2, 8))
    Traceback (most recent call last):
    ValueError: token_ids must have shape (2,) like x, got (3,); pass one id per token
    """
    if (
        not isinstance(token_ids, Tensor)
        or token_ids.is_floating_point()
        or token_ids.is_complex()
        or token_ids.dtype == torch.bool
    ):
        raise TypeError(
            f"token_ids must be an integer tensor, got {kind_of(token_ids)}; pass the ids of the tokens, as torch.int64"
        )
    token_ids = plain("token_ids", token_ids, tokens)
    if token_ids.shape != tokens.shape[:-1]:
        raise ValueError(
            f"token_ids must have shape {tuple(tokens.shape[:-1])} like x, got {tuple(token_ids.shape)}; "
            "pass one id per token"
        )
    return token_ids


def kind_of(value: object) -> str:
    """What an argument is, for the error that refuses it; short, however long the value.

    >>> kind_of(torch.zeros(2)), kind_of([1] * 1000)
    ('a tensor of torch.float32', '[1, 1, 1, 1, 1, 1, ...] (list)')
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"
