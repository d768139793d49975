"""A sinkroute router in the place of one of a model's: made for it, tied to its tensors, asked by a hook."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sinkroute.adapters._fit import fit_router, has_gate, is_asked
from sinkroute.adapters._links import BiasLink
from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.model_pass import ModelPass
from sinkroute.adapters.hf.scoring import Scoring
from sinkroute.adapters.hf.settings import Settings
from sinkroute.routing.fold import GateFold
from sinkroute.routing.losses.auxiliary import attach_gradient
from sinkroute.routing.registry import ROUTERS, router_options
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.serving import Link, Serving
from sinkroute.routing.state import recomputing

__all__ = ["Seat", "fit_to_site"]


class Seat:
    """The forward hook on one of the model's routers.

    Attributes:
        router: the sinkroute router.
        site: where the model's own is.
        scoring: the rule of that.
        model_pass: of the model's forward pass.
        loss: 0-d, the router's own in the last training pass, without a graph, or None.
        is_waiting: whether a loss of the step that is under way has been given no gradient yet.
    """

    def __init__(self, router: Router, site: Site, scoring: Scoring, model_pass: ModelPass) -> None:
        self.router, self.site, self.scoring, self.model_pass = router, site, scoring, model_pass
        self._settings = Settings(site, scoring)
        self._in_decoder = "decoder" in site.path.split(".")
        self.loss: Tensor | None = None
        self.is_waiting = False

    def listen(self) -> list[RemovableHandle]:
        """Hooks that tell links what the gate is given, where that is a part of the model's router."""
        if not self.scoring.gate_module:
            return []
        gate = self.site.host.get_submodule(self.scoring.gate_module)
        return [gate.register_forward_pre_hook(_Hand(link)) for link in self.router.links]

    def prepare(self) -> bool:
        """Before a pass of the model: whether the router is asked in it. It learns what the model's bias was set to."""
        self.router.training = self._trains()
        if self.router.training != self.site.host.training and self.router.is_plain():
            return False
        if not is_asked(self.router):
            return False
        self._check_rule()
        for link in self.router.links:
            link.pull()
        return True

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        router, scoring = self.router, self.scoring
        router.training, self.model_pass.called = self._trains(), True
        is_idle = host.training and not router.training
        if not is_asked(router) or (is_idle and router.is_plain()):
            return None
        if not torch.compiler.is_compiling():  # a graph that all layers share would be one a layer by their settings
            self._check_rule()
        decision = scoring.contract.read(outputs, self.site)
        logits_TE = scoring.logits(decision)
        if router.state is not None and router.state.saved_steps.device != logits_TE.device:
            router.to(logits_TE.device)  # it is no part of the model, and did not hear that this was moved
        if scoring.correction is not None:
            # Detached, or it would be registered as a buffer of the router's too.
            router.correction_E = scoring.correction.find(self.site).detach().flatten()
        mask_T = self.model_pass.token_mask(logits_TE, self._in_decoder, self.site.path)
        for link in router.links:
            if not scoring.gate_module:  # or a hook of that tells it
                link.see(args[0] if args else next(iter(kwargs.values())))
        ask = router.forward if is_idle else router  # hooks count
        routes = ask(logits_TE, mask_T, plain=Routes(decision.experts_TK, decision.weights_TK))
        if router.is_plain():
            return None
        weights_TK = routes.weights
        if routes.aux_loss is not None:
            weights_TK = self._attach(weights_TK, routes.aux_loss)
        if scoring.expert_scale is not None:
            weights_TK = weights_TK * scoring.expert_scale.find(self.site)[routes.experts]
        return scoring.contract.write(outputs, weights_TK, routes.experts, self.site)

    def _trains(self) -> bool:
        """Whether this pass is one of the training."""
        return self.site.host.training and self.router.balances and not self.model_pass.idle

    def _attach(self, weights_TK: Tensor, loss: Tensor) -> Tensor:
        """The weights, with the loss's gradient: it comes to the gate whoever computes what of the model's outputs."""
        if torch.compiler.is_compiling():
            self.loss = loss.detach()
        elif not recomputing():
            # A layer that is used several times in a pass has several.
            self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
            self.is_waiting = True
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return weights_TK
        if not torch.compiler.is_compiling():
            loss.register_hook(self._note_gradient)
        return attach_gradient(weights_TK, loss, self.model_pass.scale)

    def _note_gradient(self, grad: Tensor) -> None:
        self.is_waiting = False

    def _check_rule(self) -> None:
        """Refuse a model's router that was changed since, unless its choice stays: then it is only counted."""
        if self.router.training or not self.router.is_plain():
            self._settings.check()


class _Hand:
    """Hands a link what a module is given."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def __call__(self, gate: nn.Module, args: tuple[Any, ...]) -> None:
        self.link.see(args[0])


def fit_to_site(name: str, site: Site, scoring: Scoring, options: dict[str, Any]) -> Router:
    """A router that chooses and weighs by the rule of the one at `site`, tied to what it moves there.

    Raises:
        ValueError: the model could not serve by what it learns, or has no place for what it needs.
    """
    if scoring.correction is not None and name in ROUTERS and "bias_on" in router_options(name):
        options = {"bias_on": scoring.correction_on, **options}
    router = fit_router(
        name,
        scoring.num_experts,
        scoring.top_k,
        options,
        f"{type(site.host).__name__} ({scoring})",
        any_width=scoring.contract.any_width,
        **scoring.theirs(),
    )
    if scoring.normalised and router.losses.get("z-loss"):
        raise ValueError(
            f"router {name!r} has a z-loss, and {type(site.host).__name__} returns probabilities in the place of "
            "logits: what the loss bounds, the logarithm of their sum, is 0 whatever the gate does; leave z-loss out"
        )
    router.correction_on = scoring.correction_on
    bias = router.eval().choice_bias()  # with which it serves
    if router.moves_gate or bias is not None:
        link = _link(name, router, bias, site, scoring)
        link.pull()
        router.links.append(link)
    return router.train(site.host.training)


def _link(name: str, router: Router, bias: Serving | None, site: Site, scoring: Scoring) -> Link:
    """What of the model holds what the router serves with: its correction bias, or its linear gate."""
    host, correction = type(site.host).__name__, scoring.correction
    if correction is not None:
        if router.moves_gate:
            raise ValueError(
                f"router {name!r} balances the gate, and {host} chooses by {correction.name}, too, which would undo "
                "it; take ssr-dual, ssr-bias or loss-free, which move that"
            )
        if bias is not None and bias.on != scoring.correction_on:
            raise ValueError(
                f"router {name!r} serves with a bias on {bias.on}, and {host} adds {correction.name} to "
                f"{scoring.correction_on}, so that eval() and saved checkpoints would be another model's; take one "
                "with a bias there, such as ssr-dual without bias_on"
            )
        return BiasLink(router, partial(correction.find, site))
    moved = scoring.gate_bias or scoring.gate_weight
    if bias is not None and (bias.on != "logits" or moved is None):
        able = [known for known, kind in ROUTERS.items() if _serves_there(kind(2, 1), moved is not None)]
        raise ValueError(
            f"router {name!r} serves with a bias on {bias.on}, which {host} has no place for, so that eval() and saved "
            f"checkpoints would be another model's; take one of {', '.join(able)}"
        )
    if moved is None:
        raise ValueError(
            f"router {name!r} moves a linear gate, and the logits of {host} are no linear map of its tokens; take "
            "ssr-l or ssr-s"
        )
    if not moved.find(site).requires_grad:
        raise ValueError(
            f"router {name!r} moves {moved.name} of {site.block}, which is frozen; let it be trained and saved "
            "(PEFT: modules_to_save), or take ssr-l"
        )
    return GateFold(router, site.host, moved.name)


def _serves_there(router: Router, gate: bool) -> bool:
    """Whether a model without a correction bias can serve what the router learns; `gate`: its gate can be moved."""
    serving = router.serving()
    if serving is None or has_gate(router) or (router.moves_gate and not gate):
        return False
    return serving.plain or (gate and serving.on == "logits")
