"""Moving a tensor of a model from outside its optimiser: so that the move reaches what is trained and what is saved.

Where the optimiser keeps another copy of its weights (DeepSpeed's ZeRO) it writes that over the model's at each step:
there the copy is moved, and the model's tensor follows it. A tensor that no longer is what trains and is saved is
refused: frozen, a view of a flat parameter (FSDP1), the result of a parametrisation (LoRA on a gate's parameter), on
the meta device. A copy whose place is not known shows by its trace: what was moved is back where it was.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from sinkroute.kernels.storage import is_freed
from sinkroute.routing.ranks import distribute, undistributed

__all__ = ["Trace", "add", "require_trained", "require_whole", "shape_of"]

# A move is undone if what the tensor reads is this much nearer to what it read before the move than after it.
_MUCH_NEARER = 10.0


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor; DeepSpeed's ZeRO-3 leaves an empty one between passes."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


_ELSE = "; or take a router that leaves the gate alone, such as ssr-l"


def require_whole(tensor: object, shape: tuple[int, ...], what: str) -> None:
    """Refuse what no longer is a tensor that holds its values between passes.

    Args:
        tensor: of a model.
        shape: that it had.
        what: of whom it is and who moves it, for the message.

    Raises:
        RuntimeError: it is a view or made of others, or holds nothing.
    """
    if isinstance(tensor, Tensor) and tensor.is_meta:
        why = "is on the meta device between passes (offloading): keep the gate where it is used"
    elif not isinstance(tensor, Tensor) or shape_of(tensor) != shape or _is_derived(tensor):
        why = (
            "is no longer a tensor that holds its values between passes (FSDP1, or a parametrisation such as LoRA by "
            "target_parameters): shard with FSDP2 (fully_shard), adapt a gate by PEFT's modules_to_save and patch "
            "after get_peft_model"
        )
    else:
        return
    raise RuntimeError(f"{what}, which {why}{_ELSE}")


def require_trained(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that is not trained.

    Args:
        tensor: of a model.
        what: of whom it is and who moves it, for the message.

    Raises:
        RuntimeError: it is frozen.

    >>> gate = torch.nn.Linear(4, 2).requires_grad_(False)
    >>> require_trained(gate.bias, "ssr-fold moves the bias of a gate")
    Traceback (most recent call last):
    RuntimeError: ssr-fold moves the bias of a gate, which is frozen: ...
    """
    if not tensor.requires_grad:
        raise RuntimeError(
            f"{what}, which is frozen: adapters are saved without it, and what is loaded would serve by another gate. "
            f'Let it be trained and saved (PEFT: modules_to_save=["gate"], patch after get_peft_model){_ELSE}'
        )


def _is_derived(tensor: Tensor) -> bool:
    """Whether it is made of others, a view of a flat parameter, or was freed after the pass."""
    if hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh"):
        return False
    # In this order: a stale view cannot say what it is.
    return tensor._is_view() or not tensor.is_leaf or is_freed(tensor)


@torch.no_grad()
def add(tensor: Tensor, move: Tensor) -> Tensor:
    """Add to a tensor, and to the optimiser's copy of it where there is one that is known.

    A collective call where the tensor or its copy is sharded.

    Args:
        tensor: of any float dtype; may be a `DTensor`, or a parameter of a DeepSpeed engine.
        move: of its whole shape, float64, the same on all ranks.

    Returns:
        By how much it changed, in float64: less than `move` where its dtype is too narrow.
    """
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        return _add_to_engine(tensor, move)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    part = move.to(tensor.device, wide)
    if hasattr(tensor, "device_mesh"):
        part = distribute(part, tensor)
    old = tensor.to(wide, copy=True)
    tensor.copy_(old + part)
    if wide == tensor.dtype:  # or the ranks of a sharded one would have to talk for what is known
        return move
    taken: Any = tensor.to(wide) - old
    whole = undistributed(taken)
    return whole.to(move.device, torch.float64)


def _add_to_engine(tensor: Tensor, move: Tensor) -> Tensor:
    """Move the float32 copy of a DeepSpeed engine, which it writes over the parameter at each step; and that."""
    utils = _engine("utils")
    copy = utils.safe_get_full_fp32_param(tensor)
    new = copy + move.to(copy.device, copy.dtype)
    utils.safe_set_full_fp32_param(tensor, new)
    if hasattr(tensor, "ds_id"):
        with _engine("runtime.zero").GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(new)
    else:
        tensor.copy_(new)
    return move


def _engine(part: str) -> Any:
    """A part of DeepSpeed, which made the tensor: it is loaded, and nobody else needs it."""
    return sys.modules[f"deepspeed.{part}"]


class Trace:
    """Whether the moves of a tensor last: read once more before some of the next.

    Not before each, since to compare is to wait for the device: before the 2nd, 3rd, 5th, 9th, ... move.

    Args:
        what: of whom the tensor is and who moves it, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._moves = 0
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._told = False

    def compare(self, tensor: Tensor) -> None:
        """Before a move: warn, once, if the last one was undone."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        before, after, mean_D = kept
        now = _read(tensor, mean_D)
        if now.shape != before.shape or self._told:
            return
        to_before, to_after = ((now - then).norm().item() for then in (before, after))
        if to_before * _MUCH_NEARER < to_after:
            self._told = True
            warnings.warn(
                f"{self.what}, and something sets it back to what it was before, such as an optimiser that keeps a "
                "copy of its weights in float32: nothing of what the router finds is served or saved. Train without "
                "such copies (float32 weights and autocast, FSDP2, DeepSpeed), or take a router that leaves the gate "
                "alone, such as ssr-l",
                stacklevel=2,
            )

    def before(self, tensor: Tensor, mean_D: Tensor | None) -> None:
        """Read a tensor that is about to be moved, by what it makes of the mean token."""
        self._moves += 1
        if self._moves & (self._moves - 1) == 0 and not self._told:
            read = _read(tensor, mean_D)
            self._kept = read, read, mean_D

    def after(self, tensor: Tensor) -> None:
        """Read it once it was moved."""
        if self._kept is not None:
            before, _, mean_D = self._kept
            self._kept = before, _read(tensor, mean_D), mean_D


@torch.no_grad()
def _read(tensor: Tensor, mean_D: Tensor | None) -> Tensor:
    """(E,) float32: a bias, or what a weight makes of the mean token."""
    if hasattr(tensor, "ds_id"):
        whole: Any = _engine("utils").safe_get_full_fp32_param(tensor)
    else:
        whole = tensor.detach()
    whole = undistributed(whole).float()
    read: Tensor = whole.clone() if mean_D is None else whole @ mean_D.to(whole.device, whole.dtype)
    return read
