"""sinkroute's routers as the router of a Megatron-Core MoE layer.

`make_router` builds what `MoESubmodules(router=...)` takes: Megatron's own `TopKRouter` with another `routing`. In
training one of our routers chooses and weighs, by the scores, groups and scale that Megatron's config tells. The gate,
its input jitter, the z-loss and the other losses and capacity stay Megatron's. In `eval()` Megatron routes as ever. The
bias of a method that serves with one is Megatron's `expert_bias` where the config asks for that; elsewhere the method
serves through ours.

Written for and tested with Megatron-Core 0.19. docs/megatron.md says what is kept and what is refused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import __version__ as _version
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, compute_routing_scores_for_aux_loss
from torch import Tensor, nn

from sinkroute._errors import unknown_name
from sinkroute.adapters._fit import fit_router, is_asked, join_bias, join_gate, on_scores
from sinkroute.adapters._links import moves_bias
from sinkroute.adapters._megatron_copies import move_main_param
from sinkroute.adapters._megatron_ranks import PlanRanks, check_plan_ranks, find_ranks, groups_around
from sinkroute.adapters._patched import Patched, hold, holder, put_in
from sinkroute.routing import Router, Routes, list_routers
from sinkroute.routing.ranks import RouterRanks
from sinkroute.routing.registry import RECOMMENDED
from sinkroute.routing.scores import GroupScore

__all__ = ["TopKRouter", "make_router"]


def make_router(
    router: str = RECOMMENDED, *, plan_ranks: PlanRanks = "tp_cp", **options: Any
) -> Callable[..., TopKRouter]:
    """What builds the router of a Megatron MoE layer, for `MoESubmodules(router=...)`.

    Args:
        router: a name from `sinkroute.list_routers()`; the recommended one unless told.
        plan_ranks: whose tokens a plan balances together, by Megatron's name of the group: the tensor- and
            context-parallel ranks, which hold one micro-batch (`"tp_cp"`), the data-parallel ranks too (`"tp_dp_cp"`),
            those whose tokens come to one set of experts (`"tp_ep"`), or `"tp"`, `"cp"`, `"dp"`, `"dp_cp"`, `"ep"`.
            What is counted over a batch is counted over all ranks of the pipeline stage in any case.
        options: the router's own (`probability`, `noise`, `seed`, `losses`, ...). What Megatron's config says is taken
            from there.

    Raises:
        ValueError: an unknown name, or an option that Megatron decides. When the layer is built: an unknown option, a
            group that the layer's `pg_collection` lacks, a method that brings a gate or does not give each token
            `moe_router_topk` experts, and what contradicts the config (docs/megatron.md).

    ::

        layer = get_gpt_layer_with_transformer_engine_spec(num_experts=64, moe_grouped_gemm=True)
        get_submodules(layer.submodules.mlp).router = make_router("ssr-l", probability=1e-3)
    """
    _check_arguments(router, plan_ranks, options)
    return functools.partial(TopKRouter, router=router, options=options, plan_ranks=plan_ranks)


def patch(model: nn.Module, router: str = RECOMMENDED, *, plan_ranks: PlanRanks = "tp_cp", **options: Any) -> Patched:
    """Put a sinkroute router into every MoE layer of a built Megatron model, in place.

    Args:
        model: a chunk of a model, before it is wrapped or after. Its parameters, their names and the `state_dict` stay
            as they are (a method that remembers something adds `router.state.*`). What a method serves with is in
            `expert_bias`, or where the config has none in the gate.
        router, plan_ranks, options: see `make_router`, which does the same while a model is built.

    Returns:
        A handle: `handle.remove()` undoes it all, `print(handle)` shows what was found.

    Raises:
        ValueError: no MoE layer; a router that is no plain `TopKRouter`; what `make_router` refuses.
    """
    _check_arguments(router, plan_ranks, options)

    def fit(path: str, theirs: megatron_router.TopKRouter) -> Router:
        return _fit(theirs, router, options, find_ranks(groups_around(model, path, theirs), plan_ranks))

    return put_in(model, router, {megatron_router.TopKRouter: (TopKRouter, fit)}, "Megatron")


# By this name Megatron-FSDP knows that the weight is the same on all tensor-parallel ranks.
class TopKRouter(megatron_router.TopKRouter):
    """Megatron's router, with the choice and the weights of one of ours in training. `make_router` builds it.

    `set_step`, `end_step`, `LoadMonitor` and `set_inference` find our router. What it remembers is in the `state_dict`,
    as `router.state.*`; one that remembers nothing adds no key to that.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        router: str,
        options: dict[str, Any],
        plan_ranks: PlanRanks,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        hold(self, _fit(self, router, options, find_ranks(pg_collection, plan_ranks)))

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number, part of the key of the random draws; those of multi-token prediction come after."""
        super().set_layer_number(layer_number)
        _number(holder(self), self)

    def gating(self, input: Tensor) -> Tensor:
        """Megatron's logits of the tokens, (length, batch, D) → (length, batch, E)."""
        if self.training:
            for link in holder(self).links:
                link.see(input)
        return super().gating(input)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for tokens.

        Args:
            logits: (length, batch, E), of the gate.
            padding_mask: (length, batch) bool, True for PADDING, whatever Megatron's docstrings say.

        Returns:
            probs (T, E), dtype of the logits, 0 where a token is not sent; routing_map (T, E) bool.
        """
        length, batch = logits.shape[:2]
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        real_T = None if padding_T is None else ~padding_T
        router = holder(self)
        self._agree(router)
        if not self.training and router.is_plain():
            if is_asked(router):  # by a monitor: our router would choose the same
                with torch.no_grad():
                    router(logits.view(-1, self.config.num_moe_experts), real_T)
            return super().routing(logits, padding_mask)
        logits_TE = self.apply_z_loss(logits.view(-1, self.config.num_moe_experts), padding_mask=padding_T)
        router.correction_E = self.expert_bias
        routes = router(logits_TE, real_T)
        probs_TE, map_TE = _dense(routes, logits_TE, padding_T)
        if self.config.moe_expert_capacity_factor is not None:
            probs_TE, map_TE = apply_router_token_dropping(
                probs_TE,
                map_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled():
            probs_TE = self._attach_losses(probs_TE, logits_TE, routes, padding_T, length, batch)
            # The load of a plan says nothing about a bias that had no part in it.
            if self.enable_expert_bias and routes.branch == "softmax":
                # Masked here: Megatron 0.19 takes (T,) & (T, E) for the same shape.
                self._apply_expert_bias(map_TE if real_T is None else map_TE & real_T[:, None])
        return probs_TE, map_TE

    def _agree(self, router: Router) -> None:
        """Take over what `expert_bias` was set to since (a checkpoint was loaded), where our router moves that."""
        if self.training and self.frozen_expert_bias and moves_bias(router):
            raise ValueError(
                f"frozen_expert_bias=True, and {type(router).__name__} moves expert_bias in training; leave it False, "
                'or take a method without a bias, such as "ssr-l"'
            )
        for link in router.links:
            link.pull()

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # What Megatron counts here moves the bias, by its own rule. A bias that ours moves is moved by ours alone.
        if not moves_bias(holder(self)):
            super()._apply_expert_bias(routing_map, padding_mask)

    def _attach_losses(
        self, probs_TE: Tensor, logits_TE: Tensor, routes: Routes, padding_T: Tensor | None, length: int, batch: int
    ) -> Tensor:
        """`probs_TE`; its backward pass also gives the losses their gradient, our router's and Megatron's."""
        masked = padding_T is not None
        if routes.aux_loss is not None:
            probs_TE = self.attach_and_log_load_balancing_loss(
                probs_TE,
                1.0,  # the coefficient is in it
                # Each rank's is of all its tokens; the gradients of these ranks are added up.
                routes.aux_loss / self.tp_cp_group.size(),
                "sinkroute_loss",
                self.tp_cp_group,
                valid_token_count=None if padding_T is None else (~padding_T).sum(),
            )
        if not self.is_aux_loss_enabled():
            return probs_TE
        map_TE, scores_TE = compute_routing_scores_for_aux_loss(
            logits_TE, self.topk, self.score_function, padding_mask=padding_T
        )
        probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=masked)
        probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, map_TE, length, batch, with_padding_mask=masked)
        return self._apply_global_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=masked)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint that was made without sinkroute knows of no state: the router starts with the one it has.
        if "router" in self._modules:
            start = f"{prefix}router."
            # Not by our own `state_dict`: what is loaded in place may be in these very buffers, which that fills.
            if not any(key.startswith(start) for key in state_dict):
                state_dict.update(self.router.state_dict(prefix=start))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _dense(routes: Routes, logits_TE: Tensor, padding_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Routes as Megatron wants them: weights (T, E) in the dtype of the logits, and where they are, (T, E) bool."""
    experts_TK = routes.experts
    if padding_T is not None:
        # Dispatchers count on K experts for padding too. They take turns, so that it costs all alike; its weight is 0.
        first_T = (padding_T.cumsum(0) - 1) * experts_TK.shape[1]
        places_TK = first_T[:, None] + torch.arange(experts_TK.shape[1], device=experts_TK.device)
        experts_TK = torch.where(padding_T[:, None], places_TK % logits_TE.shape[1], experts_TK)
    probs_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, routes.weights.to(logits_TE.dtype))
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
    return probs_TE, map_TE


def _check_arguments(router: str, plan_ranks: str, options: dict[str, Any]) -> None:
    if router not in list_routers():
        raise unknown_name("router", router, list_routers())
    check_plan_ranks(plan_ranks, options)


def _fit(host: megatron_router.TopKRouter, name: str, options: dict[str, Any], ranks: RouterRanks) -> Router:
    """The router for a layer of this configuration, on these ranks."""
    if not _version.startswith("0.19."):
        warnings.warn(
            f"sinkroute's adapter is tested with Megatron-Core 0.19, this is {_version}; run its tests "
            "(make test-megatron) before a training",
            stacklevel=4,
        )
    config = host.config
    _check(config)
    if config.moe_router_enable_expert_bias:
        options = on_scores(name, options)
    router = fit_router(
        name,
        config.num_moe_experts,
        config.moe_router_topk,
        options,
        "Megatron's config",
        process_group=ranks.plan,
        **_said_by(config),
    )
    router.ranks = ranks
    if config.moe_router_enable_expert_bias:
        join_bias(router, "moe_router_enable_expert_bias", functools.partial(getattr, host, "expert_bias"))
    else:
        join_gate(router, "Megatron's router", host, host, functools.partial(move_main_param, router))
    if host.is_aux_loss_enabled():
        warnings.warn(
            f"moe_aux_loss_coeff={config.moe_aux_loss_coeff} with router={name!r}: both balance, and Megatron's "
            "loss counts the choices of plain top-k; set moe_aux_loss_coeff=0.0 unless this is meant",
            stacklevel=4,
        )
    _number(router, host)
    return router


def _number(router: Router, host: megatron_router.TopKRouter) -> None:
    if host.layer_number is not None:
        router.layer = host.layer_number + (host.config.num_layers if host.is_mtp_layer else 0)
        router.layer_is_given = True


# -- what Megatron's config says ---------------------------------------------------------------------------------------


def _said_by(config: Any) -> dict[str, Any]:
    """The options of our routers that Megatron's config says."""
    score, top_k = config.moe_router_score_function, config.moe_router_topk
    said = {
        "score": score,
        "norm_topk": not config.moe_router_pre_softmax if score == "softmax" else top_k > 1,
        "route_scale": config.moe_router_topk_scaling_factor or 1.0,
    }
    if config.moe_router_group_topk:
        said |= {
            "groups": config.moe_router_num_groups,
            "top_groups": config.moe_router_group_topk,
            "group_score": _group_score(config),
        }
    return said


def _group_score(config: Any) -> GroupScore:
    """Megatron's groups are as good as their best K / group_topk experts together."""
    summed = config.moe_router_topk // config.moe_router_group_topk
    if summed == 1:
        return "max"
    if summed != 2:
        raise ValueError(
            f"moe_router_group_topk={config.moe_router_group_topk} with moe_router_topk={config.moe_router_topk} "
            f"judges a group by its best {summed} experts together; our routers know the best one and the best two: "
            "set moe_router_group_topk so that moe_router_topk // moe_router_group_topk is 1 or 2"
        )
    if config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
        raise ValueError(
            "moe_router_pre_softmax=False with moe_router_group_topk judges a group by a sum of logits; our routers "
            "add up scores: set moe_router_pre_softmax=True or moe_router_group_topk=None"
        )
    return "top2-sum"


def _check(config: Any) -> None:
    """Refuse what would go wrong silently, whatever the router.

    Raises:
        ValueError: see docs/megatron.md.
    """
    types = config.moe_router_load_balancing_type
    for balancing in [types] if isinstance(types, str) else types:
        if balancing in ("sinkhorn", "quantile_balancing"):
            raise ValueError(
                f"moe_router_load_balancing_type={types!r} chooses the experts, as sinkroute's router does; "
                'set it to "none", or leave this router out'
            )
    if config.moe_router_fusion:
        raise ValueError(
            "moe_router_fusion=True: the fused choice knows plain top-k only; set it to False with sinkroute's routers"
        )
    if config.moe_enable_routing_replay:
        raise ValueError(
            "moe_enable_routing_replay=True: choices of sinkroute's routers are not recorded; set it to False "
            "(with the same seed and step they come out the same)"
        )
    if config.transformer_impl == "inference_optimized":
        raise ValueError(
            'transformer_impl="inference_optimized" has another router; train with "transformer_engine" or '
            '"local" and serve the checkpoint with Megatron\'s InferenceTopKRouter'
        )
    modules = {module.name for module in config.cuda_graph_modules or ()}
    captures_all = config.cuda_graph_impl == "full_iteration" or not modules
    if config.cuda_graph_impl != "none" and (captures_all or modules & {"moe", "moe_router"}):
        raise ValueError(
            f"cuda_graph_impl={config.cuda_graph_impl!r} with cuda_graph_modules={sorted(modules)} captures the "
            'router, whose rule changes from step to step; take cuda_graph_impl="none", or '
            'cuda_graph_modules=["attn"]'
        )
