"""What a tensor is: numbers in memory that a kernel may read, or something that only looks like a tensor.

Kernels are handed addresses. A tensor that wraps others (a masked one, a shard of a distributed one, what `torch.func`
makes of a tensor) has the address 0, or one of something else; and a tracer sees no write to an address. So all that
takes one asks here, and nothing else does:

    plain       an argument as plain memory, or a refusal by its name
    readable    whether kernels may read these tensors here and now; if not, the work is one of `operations`
    address     the address, for the one who has asked
    holds_values    whether Python may look at the numbers
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = [
    "address",
    "has_tangent",
    "holds_values",
    "is_freed",
    "is_traced",
    "is_watched",
    "plain",
    "readable",
    "uncached",
]

P = ParamSpec("P")
T = TypeVar("T")
_TRACERS = torch._C._TorchDispatchModeKey
_NO_DISPATCH = Tensor.__torch_dispatch__  # what a subclass has that is memory with another name
# Subclasses that hold no numbers but know what an operation's result would be.
_HOLLOW = ("FakeTensor", "FunctionalTensor")
# Modes of selective activation checkpointing: operations run, and are repeated.
_CACHES = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
_CURES = {
    "MaskedTensor": "pass {name}.get_data(), and padding as token_mask",
    "DTensor": "pass {name}.to_local(), with process_group where tokens are spread over ranks, or {name}.full_tensor()",
    "NestedTensor": "pass {name}.values(), the rows of all sequences one after another",
}


def holds_values(tensor: Tensor) -> bool:
    """Whether there are numbers for Python to look at. While something is compiled, too: there, True.

    Not where something is traced or vectorised: there a number would be that of one example.

    >>> import torch
    >>> holds_values(torch.zeros(2)), holds_values(torch.zeros(2, device="meta"))
    (True, False)
    """
    # A fake tensor claims any device; what gives it away is that it is of a subclass.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    return torch.compiler.is_compiling() or not (is_traced() or _is_batched(tensor))


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor was given back while the tensor stayed, as sharded engines do between passes.

    >>> import torch
    >>> is_freed(torch.zeros(2))
    False
    """
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def is_traced() -> bool:
    """Whether `torch.jit.trace`, `make_fx` or the like records what operations are called.

    >>> is_traced()
    False
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        modes = (_TRACERS.PROXY, _TRACERS.FAKE, _TRACERS.FUNCTIONAL)
        if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
            return True
    return torch._C._get_tracing_state() is not None or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0


def is_watched() -> bool:
    """Whether anybody looks on at the operations: a tracer, a transform of `torch.func`, a mode of a user.

    Not the modes of selective activation checkpointing: they run each operation, or give what it gave the first time.

    >>> is_watched()
    False
    """
    return (
        any(type(mode).__name__ not in _CACHES for mode in _modes())
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def uncached(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose operations selective activation checkpointing does not see: a repetition computes them anew.

    It counts operations, and takes for the n-th of a kind what the n-th gave the first time. What is counted or found
    in a first pass only, and not in its repetition, would put all behind it out of step.

    >>> uncached(max)(1, 2)
    2
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not any(type(mode).__name__ in _CACHES for mode in _modes()):
            return function(*args, **kwargs)
        with _without_caches():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _without_caches() -> Iterator[None]:
    others = [mode for mode in _modes() if type(mode).__name__ not in _CACHES]
    with _disable_current_modes():
        for mode in others:  # not by `with`: they would begin anew
            _push_mode(mode)
        try:
            yield
        finally:
            for _ in others:
                _pop_mode()


def _modes() -> Sequence[Any]:
    return () if torch._C._len_torch_dispatch_stack() == 0 else _get_current_dispatch_mode_stack()


def readable(*tensors: object) -> bool:
    """Whether the numbers of all lie in memory, to be read now by their addresses. What is no tensor does not count.

    >>> import torch
    >>> readable(torch.zeros(2), None), torch.vmap(lambda x: x + readable(x))(torch.zeros(2)).tolist()
    (True, [0.0, 0.0])
    """
    if torch.compiler.is_compiling() or is_watched():
        return False
    return all(not isinstance(x, Tensor) or _in_memory(x) for x in tensors)


def address(x: Tensor | None) -> int | None:
    """The address of a tensor's numbers, or None (NULL) for None.

    Raises:
        TypeError: there are no numbers at an address; whoever asks should have asked whether it is `readable`.

    >>> import torch
    >>> address(torch.zeros(2)) > 0, address(None)
    (True, None)
    """
    if x is None:
        return None
    if not _in_memory(x):
        raise TypeError(f"a tensor of type {type(x).__name__} on {x.device} has no numbers at an address; clone it")
    return x.data_ptr()


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation, `torch.func.jvp` or a dual tensor, follows this tensor.

    >>> import torch
    >>> has_tangent(torch.zeros(2))
    False
    """
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def plain(name: str, x: T, beside: Tensor | None = None) -> T:
    """The argument `name` as a tensor whose numbers lie in memory where it has any; what is no tensor as it came.

    Wrappers that torch opens by itself stay closed: fake tensors, those of the meta device and of `torch.func`.

    Args:
        name: of the argument, for the error.
        x: a tensor of any kind. The result of a collective is waited for; a subclass that is a tensor by another name
            becomes that tensor; what is negated or conjugated only when read becomes numbers.
        beside: a tensor that it is used with: if that one holds numbers, `x` has to.

    Raises:
        TypeError: a tensor that stands for something else, such as a `MaskedTensor`, a `DTensor`, a nested, sparse or
            quantised one, or one whose memory has been given back.

    >>> import torch
    >>> plain("logits_TE", torch.nn.Parameter(torch.zeros(2)))
    Parameter containing:
    tensor([0., 0.], requires_grad=True)
    >>> plain("logits_TE", torch.zeros(2, 2).to_sparse())
    Traceback (most recent call last):
    TypeError: logits_TE is a tensor of layout torch.sparse_coo, not numbers in memory; pass logits_TE.to_dense()
    """
    # What the compiler traces are tensors that it made; it knows what they stand for.
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return x
    return cast(T, _plain(name, x, beside))


def _plain(name: str, x: Tensor, beside: Tensor | None) -> Tensor:
    kind: Any = type(x)
    if (kind is Tensor or kind is nn.Parameter) and _in_memory(x):
        return x
    if beside is not None and x.is_meta and not beside.is_meta:
        raise TypeError(f"{name} is on the meta device and holds no numbers, the rest does; pass {name} with numbers")
    if kind not in (Tensor, nn.Parameter):
        if kind.__torch_dispatch__ is _NO_DISPATCH:
            return _plain(name, x.as_subclass(Tensor), None)
        if kind.__name__ == "AsyncCollectiveTensor":
            return _plain(name, x.clone() if x.requires_grad else kind.wait(x), None)
        if kind.__name__ in _HOLLOW:
            return x
        cure = _CURES.get(kind.__name__, "pass the plain tensor that it stands for").format(name=name)
        raise TypeError(f"{name} is a {kind.__name__}, which is not numbers in memory; {cure}")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor, not numbers in memory; pass torch.cat({name}.unbind())")
    if x.is_quantized:
        raise TypeError(f"{name} is a quantised tensor ({x.dtype}); pass {name}.dequantize()")
    if x.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of layout {x.layout}, not numbers in memory; pass {name}.to_dense()")
    if x.is_neg() or x.is_conj():
        return x.resolve_neg().resolve_conj()
    if x._is_zerotensor():
        return torch.zeros_like(x)
    if not x.is_meta and not is_watched() and x.device.type in ("cpu", "cuda"):
        raise TypeError(
            f"{name} of shape {tuple(x.shape)} has no memory behind it: it was given back (a sharded parameter outside "
            f"its layer?), or a transform that made the tensor has ended; pass {name} while it holds numbers"
        )
    return x


def _is_batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _in_memory(x: Tensor) -> bool:
    kind = type(x)
    if kind is not Tensor and kind is not nn.Parameter and kind.__torch_dispatch__ is not _NO_DISPATCH:
        return False
    if x.is_neg() or x.is_nested or x.is_quantized:
        return False
    try:
        if x.data_ptr() != 0:
            return not x.is_conj()
    except RuntimeError:  # other layouts; what torch.func makes of a tensor, also once it has ended
        return False
    # Wrappers have the address 0, as memory of no size has.
    return x.numel() == 0 and x.layout == torch.strided and not x.is_meta and not torch._is_functional_tensor(x)
