"""The hooks on a module of a patched model by which a pass may begin: the model, its backbone, what wraps either."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import nn

from sinkroute.adapters.hf.model_pass import Call, ModelPass, is_inside_function, masks_of
from sinkroute.routing.attached import attached
from sinkroute.routing.state import recomputing

__all__ = ["Entrance", "entrances"]


class Owner(Protocol):
    """What is told of passes."""

    model_pass: ModelPass

    def begin(self, module: nn.Module) -> bool:
        """The outermost call of a pass begins: whether any router is asked in it."""

    def finish(self, module: nn.Module, outputs: Any) -> Any:
        """It has these outputs; what is returned takes their place, unless it is None."""

    def end(self) -> None:
        """It is over, whether it failed or not."""


class Entrance:
    """The hooks on one module.

    Args:
        owner: is told of the passes.
        module: the module.
    """

    def __init__(self, owner: Owner, module: nn.Module) -> None:
        self.owner = owner
        self._names = tuple(inspect.signature(module.forward).parameters)
        self._has_decoder = "decoder_attention_mask" in self._names
        self.hooks = (
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after),
            module.register_forward_hook(self.leave, always_call=True),
        )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"{type(module).__name__} is a replica of nn.DataParallel: its routers are those of all replicas, "
                "whose counts and losses would be mixed up; wrap the model in DistributedDataParallel, one process for "
                "each device, or see that one device only is visible"
            )
        passes = self.owner.model_pass
        is_outermost = not passes.is_under_way(self)
        if is_outermost:
            passes.idle = module.training and not torch.is_grad_enabled() and not _may_be_repeated()
            passes.asked = self.owner.begin(module)
        given = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        masks = masks_of(given, self._has_decoder) if passes.asked else {}
        passes.enter(Call(passes, self, masks, self._has_decoder, is_outermost))

    def after(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        call = self.owner.model_pass.current()
        return self.owner.finish(module, outputs) if call is not None and call.is_outermost else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if self.owner.model_pass.leave(self):
            self.owner.model_pass.idle = False
            self.owner.end()


def _may_be_repeated() -> bool:
    return recomputing() or (not torch.compiler.is_compiling() and is_inside_function())


def entrances(model: nn.Module) -> list[nn.Module]:
    """The model, and what in it holds routers, is given tokens and takes a mask."""
    found = [model]
    for part in model.modules():
        names = inspect.signature(part.forward).parameters
        takes = "attention_mask" in names and ("input_ids" in names or "inputs_embeds" in names)
        if part is not model and takes and any(attached(inner) is not None for inner in part.modules()):
            found.append(part)
    return found
