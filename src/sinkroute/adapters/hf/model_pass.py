"""The passes of a patched model: which tokens are real in each, and whether it is one of the training.

A pass begins with the outermost call of a module that takes a mask (the model, its backbone, what wraps either) and
ends with it. The calls that are under way are in a context variable, innermost last, so that threads and models inside
one another are apart. A router asks the innermost call that was given a mask of as many tokens as it sees.

Activation checkpointing calls routers again in the backward pass, when that pass of the model is over, maybe in another
thread, and others have come in between. Which one is repeated is told by the node of autograd that asks for the
repetition: nodes are numbered in the order in which they are made, and each pass knows which numbers are its.

Compiled layers cannot be asked any of this while they are traced: in them the mask comes from one opaque operation.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sinkroute.kernels.operations import define
from sinkroute.routing.state import recomputing

__all__ = ["Call", "ModelPass", "is_inside_function", "masks_of"]

# The masks of tokens that models are called with.
_MASKS = ("attention_mask", "decoder_attention_mask")
# Passes with padding that may be repeated later; more are not under way at once.
_REMEMBERED = 256


class Call:
    """One call of a module of a patched model.

    Args:
        owner: the passes of the model.
        caller: whose call it is.
        masks: name → (T,) bool, or None where all are real.
        has_decoder: whether the module gives its decoder another mask.
        is_outermost: whether it is a pass of the model, and not a part of one.

    Attributes:
        outer: the call in which it is made, of any patched model.
    """

    def __init__(
        self, owner: ModelPass, caller: object, masks: dict[str, Tensor | None], has_decoder: bool, is_outermost: bool
    ) -> None:
        self.owner, self.caller, self.masks, self.has_decoder = owner, caller, masks, has_decoder
        self.is_outermost = is_outermost
        self.outer: Call | None = None
        self.first = self.last = -1  # numbers of the nodes of autograd that it makes: from the first to before the last

    def mask(self, tokens: int, in_decoder: bool) -> Tensor | None:
        """(T,) bool of the tokens that a router is given; None: all are real, or nothing is known."""
        call: Call | None = self
        while call is not None:
            name = "decoder_attention_mask" if in_decoder and call.has_decoder else "attention_mask"
            if call.owner is self.owner and name in call.masks:
                mask = call.masks[name]
                if mask is None or len(mask) == tokens:
                    return mask
            call = call.outer
        return None


# The innermost call of any patched model in this thread.
_CALLS: ContextVar[Call | None] = ContextVar("calls of patched models", default=None)
# Number of the passes of a model → them, for code that is compiled.
_NUMBERED: weakref.WeakValueDictionary[int, ModelPass] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class ModelPass:
    """What the model and its routers tell one another.

    Attributes:
        called: whether any router was called in the last training pass.
        asked: whether any router is asked in the pass that is under way.
        idle: whether that pass keeps no graph: then nothing is balanced or counted.
        traced: the innermost call that is being compiled.
        outside: whether a pass is under way outside of what is being compiled.
        scale: 0-d float32 on the CPU, what the routers' losses are weighed by.
        may_mask: whether there was padding in any pass. Compiled layers ask for a mask from then on.
    """

    def __init__(self) -> None:
        self.called = self.asked = self.idle = self.outside = self.may_mask = self._has_warned = False
        self.traced: Call | None = None
        self.scale = torch.ones((), device="cpu")
        self._repeatable: deque[Call] = deque(maxlen=_REMEMBERED)
        self._number = next(_numbers)
        _NUMBERED[self._number] = self

    def __reduce__(self) -> Any:
        return ModelPass, ()  # a pass's masks are nothing for a copy

    # -- calls -------------------------------------------------------------------------------------------------------

    def current(self) -> Call | None:
        """The innermost call that is under way here."""
        if torch.compiler.is_compiling():
            return self.traced
        call = _CALLS.get()
        while call is not None and call.owner is not self:
            call = call.outer
        return call

    def is_under_way(self, caller: object) -> bool:
        """Whether a call of `caller` would be part of a pass."""
        if torch.compiler.is_compiling():
            return self.traced is not None or self.outside
        call = self.current()
        while call is not None and call.caller is not caller:
            call = call.outer
        if call is None:
            return self.current() is not None
        while not call.is_outermost and call.outer is not None:
            call = call.outer
        _CALLS.set(call.outer)  # no module calls itself: that pass was interrupted
        return False

    def enter(self, call: Call) -> None:
        """A call begins; `leave` ends it."""
        if torch.compiler.is_compiling():
            call.outer, self.traced = self.traced, call
            return
        call.outer, self.outside = _CALLS.get(), True
        for mask in call.masks.values():
            self.may_mask |= mask is not None
        call.first = torch._C._autograd._get_sequence_nr()
        _CALLS.set(call)

    def leave(self, caller: object) -> bool:
        """A call is over, whether it failed or not; whether the pass is."""
        if torch.compiler.is_compiling():
            call, self.traced = self.traced, None if self.traced is None else self.traced.outer
            return call is not None and call.is_outermost
        call = _CALLS.get()
        while call is not None and call.caller is not caller:  # those inside that were interrupted
            call = call.outer
        if call is None:
            return False
        _CALLS.set(call.outer)
        call.last = torch._C._autograd._get_sequence_nr()
        if call.masks and call.last > call.first:
            self._repeatable.append(call)
        if call.is_outermost:
            self.outside = False
        return call.is_outermost

    def _repeated(self) -> Call | None:
        """The innermost call that made the node which has this backward pass repeat a part of it."""
        node = torch._C._current_autograd_node() if recomputing() else None
        if node is None:
            return None
        number = node._sequence_nr()
        calls = [call for call in self._repeatable if call.first <= number < call.last]
        return max(calls, key=lambda call: call.first, default=None)

    # -- masks -------------------------------------------------------------------------------------------------------

    def token_mask(self, logits_TE: Tensor, in_decoder: bool, path: str = "a router") -> Tensor | None:
        """(T,) bool, which of the tokens with these logits are real; None: all, or nothing is known.

        Args:
            logits_TE: of the tokens that a router is given.
            in_decoder: whether it is in the decoder of an encoder and a decoder.
            path: where it is, for a warning.
        """
        if torch.compiler.is_compiling():
            mask_T = None if self.traced is None else self.traced.mask(len(logits_TE), in_decoder)
            if mask_T is None and self.may_mask and (self.traced is None or self.outside):
                mask_T = torch.ops.sinkroute.token_mask(logits_TE, self._number, in_decoder)
            return mask_T
        call = self.current() or self._repeated()
        if call is None:
            self._say_unknown(path)
            return None
        mask_T = call.mask(len(logits_TE), in_decoder)
        return None if mask_T is None else mask_T.to(logits_TE.device)

    def _say_unknown(self, path: str) -> None:
        if self._has_warned or recomputing():
            return
        self._has_warned = True
        warnings.warn(
            f"{path} was called outside a pass of the patched model: whether tokens are padding is not known, and all "
            "of them count; call the model, or the part of it that takes input_ids and attention_mask",
            stacklevel=2,
        )


def masks_of(given: Mapping[str, Any], has_decoder: bool) -> dict[str, Tensor | None]:
    """Name → (T,) bool of what a module is called with; None where all tokens are real.

    Args:
        given: its arguments by name.
        has_decoder: whether the decoder's inputs, and so its mask, may be made of labels.
    """
    found: dict[str, Tensor | None] = {}
    for name in _MASKS:
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            found[name] = _read(mask)
    labels = given.get("labels")
    own = ("decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds")
    if has_decoder and isinstance(labels, Tensor) and labels.ndim == 2 and all(given.get(name) is None for name in own):
        # The decoder is given the labels from its second place on; the first is where it starts.
        starts = torch.ones_like(labels[:, :1])
        found["decoder_attention_mask"] = _read(torch.cat([starts, labels[:, :-1] != -100], 1))
    return found


def _read(mask: Tensor) -> Tensor | None:
    mask = mask.detach() != 0
    # A device is not waited for, and a graph is not one of these values.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.all():
        return None
    return mask.flatten()


def is_inside_function() -> bool:
    """Whether this code runs in the forward pass of a `torch.autograd.Function`, such as reentrant checkpointing: what
    keeps no graph there may be repeated with one."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = code.co_varnames[0] if code.co_name == "forward" and code.co_argcount else ""
        if first and isinstance(frame.f_locals[first], torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _mask_now(logits_TE: Tensor, number: int, in_decoder: bool) -> Tensor:
    passes = _NUMBERED.get(number)
    mask_T = None if passes is None else passes.token_mask(logits_TE, in_decoder)
    if mask_T is None:
        return torch.ones(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    return mask_T.clone()  # or it would be a view of what outlives it


def _mask_shape(logits_TE: Tensor, number: int, in_decoder: bool) -> Tensor:
    return logits_TE.new_empty(len(logits_TE), dtype=torch.bool)


# A CUDA graph would replay the mask of the pass in which it was recorded.
define(
    "token_mask(Tensor logits, int number, bool in_decoder) -> Tensor",
    _mask_now,
    _mask_shape,
    tags=(torch.Tag.cudagraph_unsafe,),
)
