"""`autograd.Function` for `torch.func` too, at the price of one that is not."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["apply"]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`.

    Of a function with a `setup_context`, without which `torch.func` refuses it, torch reads the signature anew at each
    call. That takes longer than what a layer does with a few tokens, and is of use to transforms only.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # it is of C
