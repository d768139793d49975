"""The handle of a patched model of transformers: its hooks, and what it says of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sinkroute.adapters._patched import Patched
from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.model_pass import ModelPass
from sinkroute.adapters.hf.quirks import own_coefficients
from sinkroute.adapters.hf.scoring import Scoring
from sinkroute.adapters.hf.seat import Seat
from sinkroute.routing.attached import attach, detach
from sinkroute.routing.router import Router

__all__ = ["Handle", "handle_of"]


class Handle(Patched):
    """What `patch` did to a model of transformers.

    Attributes:
        model, router, routers, refused: see `Patched`.
        scorings: path of each router that was taken over → the rule that it follows.
        switched_off: name → value of the model's own loss coefficients that are 0 in training passes.
    """

    def __init__(self, model: nn.Module, router: str, refused: dict[Site, str], keep_aux_loss: bool) -> None:
        super().__init__(model, router, {site.block: reason for site, reason in refused.items()})
        self.scorings: dict[str, Scoring] = {}
        self._seats: list[Seat] = []
        self._pass = ModelPass(model)
        self._coefficients = [] if keep_aux_loss else own_coefficients(model)
        self.switched_off = {name: value for _, name, value in self._coefficients}
        for hook in (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
            model.register_forward_hook(self._restore, always_call=True),
        ):
            self.on_remove(hook.remove)

    def aux_loss(self) -> Tensor | None:
        """The routers' own losses of the last training pass, coefficients included, or None.

        They are in `outputs.loss` already if the model computed one (it was given `labels`); add them to a loss
        that you compute yourself.
        """
        return self._pass.aux_loss()

    def _remark(self) -> str:
        told = f"; its own balancing loss ({', '.join(self.switched_off)}) is off" if self.switched_off else ""
        held = [self.scorings[path].correction for path, router in self.routers.items() if router.links]
        places = dict.fromkeys("folded into the gate" if bias is None else f"in {bias.name}" for bias in held)
        return f"{told}; its potentials are {' or '.join(places)}" if places else told

    def take(self, site: Site, scoring: Scoring, router: Router) -> None:
        """Put `router` into the place of the one at `site`."""
        self.add(site.path, site.host, router, str(scoring))
        self.scorings[site.path] = scoring
        self._seats.append(Seat(router, site, scoring, self._pass))
        for hook in self._seats[-1].listen():
            self.on_remove(hook.remove)
        attach(site.host, router)
        self.on_remove(detach, site.host)
        self.on_remove(site.host.register_forward_hook(self._seats[-1], with_kwargs=True).remove)

    # -- the model's forward pass ------------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            self._pass.begin()
            # During the pass only: evaluation, copies and what is saved with a configuration have what they had.
            self._switch(on=False)
        asked = [seat.prepare() for seat in self._seats]
        if any(asked):
            self._pass.read_masks(args, kwargs)

    def _after(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        if not model.training:
            return None
        if not self._pass.called:
            raise RuntimeError(
                f"{type(model).__name__} ran a training pass without calling any of the {len(self._seats)} patched "
                "routers: they were replaced since (PEFT's modules_to_save does: patch after get_peft_model), or some "
                "kernel bypasses them: load it without hub kernels (use_kernels=False), or with "
                'experts_implementation="eager" or "grouped_mm"'
            )
        return self._pass.add_losses(outputs)

    def _restore(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        for owner, name, value in self._coefficients:
            setattr(owner, name, value if on else 0.0)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the patched model that `model` is or holds, or None: its hooks are those of the handle."""
    hooks = (hook for part in model.modules() for hook in part._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Handle)), None)
