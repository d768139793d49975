"""One forward pass of a patched model: the padding mask that its routers get, and the losses that they leave."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.routing.state import recomputing

__all__ = ["ModelPass"]

# The masks of tokens that models are called with.
_MASKS = ("attention_mask", "decoder_attention_mask")


class ModelPass:
    """What the model and its routers tell one another.

    Attributes:
        called: whether any router was called in the last training pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.called = model, False
        self._losses: list[Tensor] = []
        self._masks: dict[bool, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pass's graph and masks are nothing for a copy.
        return vars(self) | {"_losses": [], "_masks": {}}

    def begin(self) -> None:
        """A training pass begins."""
        self._losses, self.called = [], False

    def read_masks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the masks until the next pass of this mode: checkpointing repeats layers during the backward pass."""
        if args:
            kwargs = dict(zip(inspect.signature(self.model.forward).parameters, args, strict=False)) | kwargs
        masks = self._masks[self.model.training] = {}
        for name in _MASKS:
            mask = kwargs.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                mask = mask.detach() != 0
                if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.all():
                    masks[name] = mask.flatten()

    def token_mask(self, path: str, tokens: int) -> Tensor | None:
        """(T,) bool of the tokens that the router at this path is given; None: all are real, or nothing is known."""
        config = getattr(self.model, "config", None)
        of_decoder = getattr(config, "is_encoder_decoder", False) and "decoder" in path.split(".")
        masks = self._masks.get(self.model.training, {})
        mask = masks.get("decoder_attention_mask" if of_decoder else "attention_mask")
        return mask if mask is not None and len(mask) == tokens else None

    def note(self, aux_loss: Tensor | None) -> None:
        """Keep the loss of a router in a training pass."""
        if aux_loss is not None and not recomputing():
            self._losses.append(aux_loss)

    def aux_loss(self) -> Tensor | None:
        """The sum of the losses of the last training pass, or None."""
        if not self._losses:
            return None
        device = self._losses[0].device
        return torch.stack([loss.float().to(device) for loss in self._losses]).sum()

    def add_losses(self, outputs: Any) -> Any:
        """The model's `outputs` with the routers' losses in its loss; None: they stay, or were changed in place."""
        aux_loss = self.aux_loss()
        if aux_loss is None:
            return None
        if isinstance(outputs, tuple):  # return_dict=False: a loss comes first
            loss = outputs[0]
            if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
                return loss + aux_loss.to(loss.device, loss.dtype), *outputs[1:]
        elif isinstance(loss := getattr(outputs, "loss", None), Tensor):
            outputs.loss = loss + aux_loss.to(loss.device, loss.dtype)
        return None
