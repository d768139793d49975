"""Operations that are not looked into: the compiler sees a call, tensors without values get a shape.

All stand under `torch.ops.sinkroute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

__all__ = ["define"]

_LIBRARY = library.Library("sinkroute", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable[..., Any],
    shape: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Register an operation, once, at import.

    Args:
        schema: name, arguments and result, such as `"double(Tensor x) -> Tensor"`.
        kernel: what computes it, on any device.
        shape: the same arguments to a result that has its shape and dtype and no values.
        backward, save: its gradient and what that needs, as in `torch.autograd.Function`; None: no gradient.
    """
    name = f"sinkroute::{schema.partition('(')[0]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")
    library.register_fake(name, shape, lib=_LIBRARY)
    if backward is not None:
        library.register_autograd(name, backward, setup_context=save, lib=_LIBRARY)
