"""A router of sinkroute in the place of a transformers model's own, in training; `eval()` stays the model's.

The model's router goes on computing its logits; a forward hook puts our choice and weights in the place of its own.
Nothing is added to the model's parameters, buffers, modules or `state_dict`, and what records `router_logits` goes on.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sinkroute.adapters._fit import fit_router, serves_as_theirs
from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.find import find_routers
from sinkroute.adapters.hf.scoring import Scoring, Source
from sinkroute.routing.attached import attach, attached, detach
from sinkroute.routing.ranks import distribute
from sinkroute.routing.registry import ROUTERS
from sinkroute.routing.router import Router
from sinkroute.routing.routers.loss_free import LossFreeRouter
from sinkroute.routing.routers.ssr_bias import SSRBiasRouter
from sinkroute.routing.routers.ssr_fold import SSRFoldRouter
from sinkroute.routing.routes import Routes
from sinkroute.routing.state import recomputing

__all__ = ["Handle", "patch"]

# As models call the coefficient of their own balancing loss.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# The masks of tokens that models are called with.
_MASKS = ("attention_mask", "decoder_attention_mask")


def patch(model: nn.Module, router: str, *, keep_aux_loss: bool | None = None, **options: Any) -> Handle:
    """Route a Hugging Face transformers model by a router of sinkroute, in place.

    In training every mixture-of-experts layer is routed by `router`, with the model's own logits, score function,
    renormalisation, groups, correction bias and scaling. In `eval()` the model does what it did before, to the last
    bit. Its parameters, `state_dict` and configuration stay as they are: what is saved is a plain checkpoint.

    Patch before wrapping (DistributedDataParallel, FSDP, `torch.compile`), and call `sinkroute.set_step(model, step)`
    before every training step, or use `sinkroute.adapters.hf.RouterCallback` with transformers' `Trainer`. A padding
    mask is read off the model's `attention_mask`; what is masked is in no load, plan or loss.

    Args:
        model: a model of transformers, or a part of one that has `attention_mask` among its arguments.
        router: a name of `sinkroute.list_routers()`: one that serves as plain top-k (SSR: `"ssr-l"`, `"ssr-s"`,
            `"ssr-b"`, `"ssr-ec"`; `"softmax"`, which only counts; losses; ...). For models that have a correction bias
            also `"ssr-bias"` and `"loss-free"`, which then move that of the model; for others with a linear gate
            (nearly all) `"ssr-fold"`, which moves the gate.
        keep_aux_loss: whether the model's own balancing loss stays. It is computed from the logits and knows nothing
            of the choices that the router makes. None: off in training passes, unless the router is `"softmax"`.
        options: the router's own, such as `probability`; not those that the model decides (`score`, `norm_topk`, ...).

    Returns:
        A handle: `handle.remove()` undoes it all, `print(handle)` shows what was found, `handle.state_dict()` holds
        what routers remember between steps.

    Raises:
        ValueError: a model without a router that can be taken over (the message says why for each), one that is
            patched already, or a router that the model could not serve with.

    >>> import sinkroute, transformers
    >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    >>> model = transformers.MixtralForCausalLM(config)
    >>> handle = sinkroute.patch(model, "ssr-l", probability=0.01)
    >>> print(handle)
    ssr-l in 1 of 1 layers of MixtralForCausalLM; its own balancing loss (router_aux_loss_coef) is off
      1 × model.layers.*.mlp.gate  MixtralTopKRouter  softmax, top 2 of 4, renormalised
    >>> handle.remove()
    """
    if any(attached(part) is not None for part in model.modules()):
        raise ValueError(
            "model is patched already; call handle.remove() of that patch first (a copy of a patched model has no "
            "handle: copy before you patch)"
        )
    _refuse_kernels(model)
    known, refused = find_routers(model)
    if not known:
        raise ValueError(_nothing_to_patch(model, refused))
    routers = {site: _make_router(router, site, scoring, options) for site, scoring in known.items()}
    handle = Handle(model, router, refused)
    for site, scoring in known.items():  # all of them could be made: the model is not left half patched
        handle.take(site, scoring, routers[site])
    if hasattr(model, "peft_config") and any(made.links for made in routers.values()):
        warnings.warn(
            f"{router!r} moves the model's own correction bias, and PEFT's checkpoints do not hold that: save "
            "merge_and_unload() of it, or take a router that leaves nothing behind, such as ssr-l",
            stacklevel=2,
        )
    if not (router == "softmax" if keep_aux_loss is None else keep_aux_loss):
        handle.switch_off_aux_loss()
    handle.watch_model()
    return handle


class Handle(nn.Module):
    """What `patch` did to a model. Its parts are the routers: `state_dict` and `load_state_dict` are of their state.

    Attributes:
        router: the name.
        scorings: path of each router that was taken over → the rule that it follows.
        refused: path of each that was not → why.
        switched_off: name → value of the model's own loss coefficients that are 0 in training passes.
    """

    def __init__(self, model: nn.Module, router: str, refused: dict[Site, str]) -> None:
        super().__init__()
        vars(self)["model"] = model  # not a part of the handle
        self.router = router
        self.scorings: dict[str, Scoring] = {}
        self.refused = {site.block: reason for site, reason in refused.items()}
        self.switched_off: dict[str, float] = {}
        self.routers = nn.ModuleList()
        self._seats: list[_Seat] = []
        self._hooks: list[RemovableHandle] = []
        self._coefficients: list[tuple[Any, str, float]] = []
        self._masks: dict[bool, dict[str, Tensor]] = {}
        self._losses: list[Tensor] = []
        self._called = False

    def __str__(self) -> str:
        total = len(self.scorings) + len(self.refused)
        lines = [f"{self.router} in {len(self.scorings)} of {total} layers of {type(vars(self)['model']).__name__}"]
        if self.switched_off:
            lines[0] += f"; its own balancing loss ({', '.join(self.switched_off)}) is off"
        alike = Counter(
            (re.sub(r"\.\d+\.", ".*.", seat.site.path), type(seat.site.host).__name__, str(seat.scoring))
            for seat in self._seats
        )
        rows = [(f"{count} × {path}", host, rule) for (path, host, rule), count in alike.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"  {path}: left alone, {reason}" for path, reason in self.refused.items())])

    def remove(self) -> None:
        """Take everything off the model again; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for seat in self._seats:
            detach(seat.site.host)
        self._hooks, self._coefficients, self._seats = [], [], []

    def aux_loss(self) -> Tensor | None:
        """The routers' own losses of the last training pass, coefficients included, or None.

        They are in `outputs.loss` already if the model computed one (it was given `labels`); for a loss of your own,
        add them.
        """
        if not self._losses:
            return None
        device = self._losses[0].device
        return torch.stack([loss.float().to(device) for loss in self._losses]).sum()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `nn.Module`; what the model holds of it (a correction bias) is set, too."""
        found = super().load_state_dict(*args, **kwargs)
        for seat in self._seats:
            for link in seat.router.links:
                link.push()
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A pass's graph and masks are nothing for a copy.
        return vars(self) | {"_losses": [], "_masks": {}}

    # -- what patch does ---------------------------------------------------------------------------------------------

    def take(self, site: Site, scoring: Scoring, router: Router) -> None:
        """Put `router` into the place of the one at `site`."""
        seat = _Seat(self, site, scoring, router)
        attach(site.host, router)
        self.routers.append(router)
        self.scorings[site.path] = scoring
        self._seats.append(seat)
        self._hooks.append(site.host.register_forward_hook(seat, with_kwargs=True))

    def switch_off_aux_loss(self) -> None:
        """Have the coefficients of the model's own balancing loss at 0 in training passes, until `remove`."""
        model = vars(self)["model"]
        for owner in _coefficient_owners(model):
            for name in _COEFFICIENTS:
                value = vars(owner).get(name)
                if isinstance(value, (int, float)) and value:
                    self.switched_off[name] = value
                    self._coefficients.append((owner, name, value))
        if self.switched_off and getattr(getattr(model, "config", None), "output_router_logits", False):
            warnings.warn(
                f"{type(model).__name__}'s own balancing loss ({self.switched_off}) is switched off while "
                f"{self.router!r} routes it: it does not see the router's choices. keep_aux_loss=True keeps it.",
                stacklevel=3,
            )

    def _set_coefficients(self, *, off: bool) -> None:
        for owner, name, value in self._coefficients:
            setattr(owner, name, 0.0 if off else value)

    def watch_model(self) -> None:
        """Read the padding mask off what the model is called with, and add the routers' losses to its loss."""
        model = vars(self)["model"]
        self._hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after))
        self._hooks.append(model.register_forward_hook(self._restore, always_call=True))

    # -- the model's forward pass ------------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            self._losses, self._called = [], False
            # During the pass only: evaluation, copies and what is saved with a configuration have what they had.
            self._set_coefficients(off=True)
        for seat in self._seats:
            seat.router.training = seat.site.host.training
            if seat.is_asked():
                for link in seat.router.links:
                    link.pull()
        if not any(seat.is_asked() for seat in self._seats):
            return
        given = kwargs
        if args:
            names = list(inspect.signature(model.forward).parameters)
            given = dict(zip(names, args, strict=False)) | kwargs
        # Kept until the next pass of this mode: activation checkpointing repeats layers during the backward pass.
        masks = self._masks[model.training] = {}
        for name in _MASKS:
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                mask = mask.detach() != 0
                if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.all():
                    masks[name] = mask.flatten()

    def _after(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        if not model.training:
            return None
        if not self._called:
            raise RuntimeError(
                f"{type(model).__name__} ran a training pass without calling any of the {len(self._seats)} patched "
                "routers: they were replaced since (PEFT's modules_to_save does: patch after get_peft_model), or some "
                "kernel bypasses them: load it without hub kernels (use_kernels=False), or with "
                'experts_implementation="eager" or "grouped_mm"'
            )
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

    def _restore(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        self._set_coefficients(off=False)

    def token_mask(self, path: str, tokens: int) -> Tensor | None:
        """(T,) bool of the tokens that the router at this path is given; None: all are real, or nothing is known."""
        model = vars(self)["model"]
        config = getattr(model, "config", None)
        of_decoder = getattr(config, "is_encoder_decoder", False) and "decoder" in path.split(".")
        masks = self._masks.get(model.training, {})
        mask = masks.get("decoder_attention_mask" if of_decoder else "attention_mask")
        return mask if mask is not None and len(mask) == tokens else None

    def note(self, aux_loss: Tensor | None) -> None:
        """Keep the loss of a training pass."""
        if aux_loss is not None and not recomputing():
            self._losses.append(aux_loss)


class _Seat:
    """The forward hook on one of the model's routers."""

    def __init__(self, handle: Handle, site: Site, scoring: Scoring, router: Router) -> None:
        self.handle, self.site, self.scoring, self.router = handle, site, scoring, router

    def is_asked(self) -> bool:
        """Whether the router is: where the model's own choice stays in `eval()`, only if somebody watches it."""
        return self.router.training or not self.router.is_plain() or bool(self.router._forward_hooks)

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        router, scoring = self.router, self.scoring
        router.training, self.handle._called = host.training, True
        if not self.is_asked():
            return None
        decision = scoring.contract.read(outputs, self.site)
        logits_TE = scoring.logits(decision)
        if router.state is not None and router.state.saved_steps.device != logits_TE.device:
            router.to(logits_TE.device)  # it is no part of the model, and did not hear that this was moved
        if scoring.correction is not None:
            # Detached, or it would be registered as a buffer of the router's too.
            router.correction_E = scoring.correction.find(self.site).detach().flatten()
        mask_T = self.handle.token_mask(self.site.path, len(logits_TE))
        if isinstance(router, SSRFoldRouter):
            router.see(args[0] if args else next(iter(kwargs.values())))
        plain = Routes(decision.experts_TK, decision.weights_TK)
        routes = router(logits_TE, mask_T, plain=plain)
        if host.training:
            self.handle.note(routes.aux_loss)
        if router.is_plain():
            return None
        weights_TK = routes.weights
        if scoring.expert_scale is not None:
            weights_TK = weights_TK * scoring.expert_scale.find(self.site)[routes.experts]
        return scoring.contract.write(outputs, weights_TK, routes.experts, self.site)


# -- making routers --------------------------------------------------------------------------------------------------


def _make_router(name: str, site: Site, scoring: Scoring, options: dict[str, Any]) -> Router:
    if name == "ssr-bias" and scoring.correction is not None:
        options = {"bias_on": scoring.correction_on, **options}
    if name == "ssr-fold" and scoring.correction is not None:
        raise ValueError(
            f"router 'ssr-fold' balances the gate, and {type(site.host).__name__} chooses by "
            f"{scoring.correction.name}, too, which would undo it; take ssr-bias or loss-free, which move that"
        )
    if name == "ssr-fold" and scoring.gate_weight is None:
        raise ValueError(
            f"router 'ssr-fold' moves a linear gate, and the logits of {type(site.host).__name__} are no linear map of "
            "its tokens; take ssr-l or ssr-s"
        )
    router = fit_router(
        name,
        scoring.num_experts,
        scoring.top_k,
        options,
        f"{type(site.host).__name__} ({scoring})",
        any_width=scoring.contract.any_width,
        linear_gate=True,
        **scoring.theirs(),
    )
    router.correction_on = scoring.correction_on
    if _has_correction_of(router, scoring):
        assert scoring.correction is not None
        router.links.append(_BiasLink(router, site, scoring.correction))
        router.links[0].pull()
    elif isinstance(router, SSRFoldRouter):
        moved = scoring.gate_bias or scoring.gate_weight
        assert moved is not None  # or it was refused
        if not moved.find(site).requires_grad:
            raise ValueError(
                f"router 'ssr-fold' moves {moved.name} of {site.block}, which is frozen; let it be trained and saved "
                "(PEFT: modules_to_save), or take ssr-l"
            )
        router.bind_part(site.host, moved.name)
    elif not serves_as_theirs(router):
        able = [known for known, kind in ROUTERS.items() if serves_as_theirs(kind(2, 1))]
        raise ValueError(
            f"router {name!r} serves with a bias that {type(site.host).__name__} has no place for, so that eval() and "
            f"saved checkpoints would be another model's; take one of {', '.join(able)}"
        )
    return router


def _has_correction_of(router: Router, scoring: Scoring) -> TypeGuard[LossFreeRouter | SSRBiasRouter]:
    """Whether what the router learns is what the model adds in its choice."""
    if scoring.correction is None:
        return False
    if isinstance(router, SSRBiasRouter):
        return router.bias_on == scoring.correction_on and router.serve_with == "bias"
    return isinstance(router, LossFreeRouter) and scoring.correction_on == "scores"


class _BiasLink:
    """The router's bias is the model's own: that is the one which serves, is saved and is loaded."""

    def __init__(self, router: LossFreeRouter | SSRBiasRouter, site: Site, source: Source) -> None:
        self.router, self.site, self.source = router, site, source

    @torch.no_grad()
    def pull(self) -> None:
        theirs, ours_E = self.source.find(self.site).detach(), self.router.state.bias_E
        if theirs.is_meta:
            return
        theirs_E: Tensor = (theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs).flatten()
        # A model in bf16 holds ours rounded; that is no other value, and the finer one stays.
        same_E = theirs_E == ours_E.to(theirs_E.device, theirs_E.dtype)
        ours_E.copy_(torch.where(same_E.to(ours_E.device), ours_E, theirs_E.to(ours_E.device, ours_E.dtype)))

    @torch.no_grad()
    def push(self) -> None:
        theirs = self.source.find(self.site)
        ours = self.router.state.bias_E.to(theirs.device, theirs.dtype).view(theirs.shape)
        theirs.copy_(distribute(ours, theirs) if hasattr(theirs, "device_mesh") else ours)


# -- what models are like --------------------------------------------------------------------------------------------


def _coefficient_owners(model: nn.Module) -> list[Any]:
    """Modules with a coefficient of their own; else the configurations that are asked for it."""
    owners: list[Any] = [part for part in model.modules() if any(name in vars(part) for name in _COEFFICIENTS)]
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in list(configs.values()):
        text = getattr(config, "text_config", None)
        if text is not None:
            configs[id(text)] = text
    return owners if owners else list(configs.values())


def _refuse_kernels(model: nn.Module) -> None:
    """Kernels that compute router and experts in one, past the router.

    Raises:
        ValueError: the model has them.
    """
    method = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "quant_method", None)
    fused = next((type(part).__name__ for part in model.modules() if "mxfp4" in type(part).__name__.lower()), None)
    if fused or "mxfp4" in str(method).lower():
        raise ValueError(
            f"{type(model).__name__} has mxfp4 experts ({fused or method}), whose kernel routes by itself and never "
            "calls the router; load it with Mxfp4Config(dequantize=True)"
        )
    if getattr(model, "use_kernels", False):
        raise ValueError(
            f"{type(model).__name__} runs kernels from the hub (use_kernels=True), some of which route by themselves "
            "and never call the router; load it with use_kernels=False"
        )


def _nothing_to_patch(model: nn.Module, refused: dict[Site, str]) -> str:
    if not refused:
        return (
            f"model {type(model).__name__} holds no mixture of experts that sinkroute knows how to find: no small "
            "module beside a module of experts; pass a mixture-of-experts model of transformers"
        )
    reasons = "; ".join(f"{site.block}: {reason}" for site, reason in refused.items())
    return f"model {type(model).__name__} has no router that sinkroute can take over. {reasons}"
