"""The handle of a patched model of transformers: its hooks, and what it says of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.adapters._patched import Patched
from sinkroute.adapters._ranks import Layout
from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.entrance import Entrance, entrances
from sinkroute.adapters.hf.layout import SpreadOf
from sinkroute.adapters.hf.model_pass import ModelPass
from sinkroute.adapters.hf.quirks import is_half, own_coefficients, silence, with_loss
from sinkroute.adapters.hf.saved import Saved
from sinkroute.adapters.hf.scoring import Scoring
from sinkroute.adapters.hf.seat import Seat
from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.attached import attach, detach
from sinkroute.routing.router import Router
from sinkroute.routing.state import recomputing

__all__ = ["Handle", "handle_of"]


class Handle(Patched):
    """What `patch` did to a model of transformers.

    Attributes:
        model, router, routers, refused: see `Patched`.
        scorings: path of each router that was taken over → the rule that it follows.
        switched_off: name → value of the model's own loss coefficients that are 0 in training passes.
        loss_scale: a function that gives what the training loss is multiplied by before its backward pass (fp16:
            `scaler.get_scale` of a `GradScaler`), or None. `RouterCallback` finds it out.

    >>> import sinkroute, transformers
    >>> config = transformers.MixtralConfig(
    ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4,
    ... )
    >>> handle = sinkroute.patch(transformers.MixtralForCausalLM(config), "load-balance")
    >>> list(handle.routers)
    ['model.layers.0.mlp.gate', 'model.layers.1.mlp.gate']
    >>> handle.remove()
    """

    def __init__(
        self, model: nn.Module, router: str, refused: dict[Site, str], keep_aux_loss: bool, show_aux_loss: bool
    ) -> None:
        super().__init__(model, router, {site.block: reason for site, reason in refused.items()})
        self.scorings: dict[str, Scoring] = {}
        self._seats: list[Seat] = []
        self.model_pass = ModelPass()
        self.loss_scale: Callable[[], float] | None = None
        self._shows_loss = show_aux_loss
        self._step, self._idle_step, self._passes, self._said = -1, -1, 0, set[str]()
        self._trained = False
        self._saved = Saved(model, router)
        self._layout: Layout | None = None
        self._coefficients = [] if keep_aux_loss else own_coefficients(model)
        self.switched_off = {name: value for _, name, value in self._coefficients}

    def aux_loss(self) -> Tensor | None:
        """0-d: the routers' own losses of the last training pass, coefficients included, to be shown; or None.

        It has no graph. Their gradient is attached to the routing weights and comes with that of whatever loss is made
        of the model's outputs.
        """
        losses = [seat.loss for seat in self._seats if seat.loss is not None]
        return torch.stack([loss.float().to(losses[0].device) for loss in losses]).sum() if losses else None

    def _remark(self) -> str:
        told = f"; its own balancing loss ({', '.join(self.switched_off)}) is off" if self.switched_off else ""
        held = [self.scorings[path].correction for path, router in self.routers.items() if router.links]
        places = dict.fromkeys("folded into the gate" if bias is None else f"in {bias.name}" for bias in held)
        return f"{told}; its potentials are {' or '.join(places)}" if places else told

    def take(self, site: Site, scoring: Scoring, router: Router) -> None:
        """Put `router` into the place of the one at `site`."""
        self.add(site.path, site.host, router, str(scoring))
        self.scorings[site.path] = scoring
        self._seats.append(Seat(router, site, scoring, self.model_pass))
        for hook in self._seats[-1].listen():
            self.on_remove(hook.remove)
        attach(site.host, router)
        self.on_remove(detach, site.host)
        self.on_remove(site.host.register_forward_hook(self._seats[-1], with_kwargs=True).remove)

    def watch(self) -> None:
        """Hear of the model's passes, once all routers are taken."""
        first = self._seats[0].router
        self._layout = Layout(SpreadOf(self.model), first.clock, first.ranks.plan)
        ranks = self._layout.ranks()
        for seat in self._seats:
            seat.router.ranks = ranks
        for module in entrances(self.model):
            for hook in Entrance(self, module).hooks:
                self.on_remove(hook.remove)

    def require_saved(self) -> None:
        """Refuse a model whose adapters are saved without what the routers move (ValueError)."""
        self._saved.check(link.find() for seat in self._seats for link in seat.router.links)

    # -- the model's forward pass ------------------------------------------------------------------------------------

    def begin(self, module: nn.Module) -> bool:
        """See `Owner`."""
        self.model_pass.idle |= module.training and not any(seat.router.balances for seat in self._seats)
        asked = [seat.prepare() for seat in self._seats]
        if module.training:
            if self.model_pass.idle:
                self._note_idle()
            elif not recomputing():
                self.require_saved()
                self._begin_training()
            # During the pass only: evaluation, copies and what is saved with a configuration have what they had.
            self._switch(on=False)
        return any(asked)

    def finish(self, module: nn.Module, outputs: Any) -> Any:
        """See `Owner`."""
        if not module.training:
            self._watch_evaluation(outputs)
            return None
        if not self.model_pass.called:
            raise RuntimeError(
                f"{type(module).__name__} ran a training pass without calling any of the {len(self._seats)} patched "
                "routers: they were replaced since (PEFT's modules_to_save does: patch after get_peft_model), or some "
                "kernel bypasses them: load it without hub kernels (use_kernels=False), or with "
                'experts_implementation="eager" or "grouped_mm"'
            )
        if self.switched_off:
            silence(outputs)
        loss = None if self.model_pass.idle else self.aux_loss()
        if loss is None:
            return None
        if not torch.compiler.is_compiling():
            self._check_scale(module)
        return with_loss(outputs, loss) if self._shows_loss else None

    def _watch_evaluation(self, outputs: Any) -> None:
        """A model that `from_pretrained` returns is in `eval()`: say so if it is trained like that."""
        if self._trained or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        found = (
            outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else [outputs]
        )
        for tensor in found:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._note_evaluation)

    def _note_evaluation(self, grad: Tensor) -> None:
        if not self._trained:
            self._say(
                "eval",
                f"a backward pass came through {type(self.model).__name__} in eval(), and no pass in train() did yet: "
                "its routers serve, and balance nothing. If this is training, call model.train() first: "
                "from_pretrained returns models in eval()",
            )

    def end(self) -> None:
        """See `Owner`."""
        self._switch(on=True)

    # -- the routers' losses -----------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        self._trained = True
        clock = self._seats[0].router.clock
        scale = 1.0 if self.loss_scale is None else uncompiled(self.loss_scale)()
        self.model_pass.scale = torch.tensor(scale / (clock.micro_batches or 1), device="cpu")
        self.model_pass.called = False
        for seat in self._seats:
            seat.loss = None
        if torch.compiler.is_compiling():
            return
        if self._step < 0 and self._layout is not None:
            self._layout.forget()  # the model may have been wrapped since the step was told
        if (clock.step, True) != (self._step, clock.told):
            self._check_gradients()
            self._step, self._passes = clock.step if clock.told else -1, 0
        self._passes += 1

    def _note_idle(self) -> None:
        """A pass in `train()` that is no training: say so if a whole step had no other."""
        clock = self._seats[0].router.clock
        asked_for = not any(seat.router.balances for seat in self._seats)
        if torch.compiler.is_compiling() or not clock.told or asked_for:
            return
        last, self._idle_step = self._idle_step, clock.step
        if last not in (-1, clock.step) and self._step != last:
            self._say(
                "idle",
                f"step {last} had passes in train() and no training pass: none kept a graph, so that nothing was "
                "counted or balanced. Train without torch.no_grad(), or put the model into eval()",
            )

    def _check_gradients(self) -> None:
        """Another step begins: the losses of the last have had their gradients, or never will."""
        waiting = [seat for seat in self._seats if seat.is_waiting]
        for seat in waiting:
            seat.is_waiting = False
        if waiting and self._step >= 0:
            self._say(
                "gradient",
                f"the losses of {len(waiting)} of {len(self._seats)} routers ({waiting[0].site.path}, ...) were given "
                f"no gradient in step {self._step}: no backward pass came to their layers. Their gradient comes with "
                "that of a loss that is made of the model's outputs; put passes that are no training into "
                "sinkroute.no_balancing(model)",
            )

    def _check_scale(self, module: nn.Module) -> None:
        """Say where the weight of the losses is not known."""
        clock = self._seats[0].router.clock
        known = clock.micro_batches or 1
        if self._step >= 0 and self._passes > known:
            self._say(
                "micro-batches",
                f"step {self._step} has {self._passes} training passes, and the routers' losses are weighed by "
                f"1 / {known} in each, as if it had {known}; tell how many it has, "
                "sinkroute.set_step(model, step, micro_batches=...), and put those that are not trained on into "
                "sinkroute.no_balancing(model)",
            )
        if self.loss_scale is None and is_half(module):
            self._say(
                "scale",
                "the model is trained in float16, and what its loss is scaled by is not known: the routers' losses are "
                "not scaled, so that they are next to nothing beside it; set handle.loss_scale = scaler.get_scale, or "
                "use RouterCallback",
            )

    def _say(self, kind: str, message: str) -> None:
        """Warn, once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, stacklevel=2)

    def _switch(self, *, on: bool) -> None:
        for owner, name, value in self._coefficients:
            setattr(owner, name, value if on else 0.0)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the patched model that `model` is or holds, or None: its hooks are those of the handle."""
    hooks = (hook for part in model.modules() for hook in part._forward_pre_hooks.values())
    owners = (getattr(getattr(hook, "__self__", None), "owner", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Handle)), None)
