"""What the compiler does not look into: it would trace NumPy and addresses of memory as if they were torch's.

    define        an operation: the compiler or a tracer sees one call, tensors without values get a shape
    uncompiled    a function at which a compiled graph breaks

Operations stand under `torch.ops.sinkroute`. Under `vmap` one is done for one example after another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import library

__all__ = ["define", "uncompiled"]

P = ParamSpec("P")
T = TypeVar("T")

_LIBRARY = library.Library("sinkroute", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable[..., Any],
    shape: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Register an operation, once, at import.

    Args:
        schema: name, arguments and result, such as `"double(Tensor x) -> Tensor"`.
        kernel: what computes it, on any device.
        shape: the same arguments to a result that has its shape and dtype and no values.
        backward, save: its gradient and what that needs, as in `torch.autograd.Function`; None: no gradient.
        tags: what else compilers are to know.
    """
    short = schema.partition("(")[0]
    name = f"sinkroute::{short}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(short, kernel, "CompositeExplicitAutograd")
    library.register_fake(name, shape, lib=_LIBRARY)
    library.register_vmap(name, _one_by_one(short), lib=_LIBRARY)
    if backward is not None:
        library.register_autograd(name, backward, setup_context=save, lib=_LIBRARY)


def _one_by_one(short: str) -> Callable[..., Any]:
    def vmapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        operation = getattr(torch.ops.sinkroute, short)
        results = [
            operation(*(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        if results[0] is None:
            return None, None
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return vmapped


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, but only where something is compiled: that decorator imports the compiler, 0.8 s.

    >>> uncompiled(max)(1, 2)
    2
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        left_alone: Callable[P, T] = torch.compiler.disable(function)
        return left_alone(*args, **kwargs)

    return wrapper
