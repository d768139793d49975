"""Our routers in torchtitan's mixture-of-experts layers.

torchtitan's `MoE` (models/common/moe.py) asks its router for weights and ids of K experts per token and for all scores:

    scores_BLK, ids_BLK, scores_BLE = self.router(x_BLD, self.expert_bias_E)

`SinkrouteRouter` is their `TokenChoiceTopKRouter` with its gate, scoring and parameter names; in training a sinkroute
router chooses and weighs. In `eval()`, and wherever the method does no more than plain top-k, their own code runs. The
bias of a method that serves with one is their `expert_bias_E` where the layer has that (`load_balance_coeff`).

It comes into a model in three ways: `SinkrouteRouter.Config` in a model configuration, `route` as an override on
torchtitan's command line, `patch` on a built model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
)
from torch.utils._python_dispatch import _disable_current_modes

try:
    from torchtitan.config.override import derive, override
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
    from torchtitan.protocols.module import Module, ModuleDict
except ImportError as error:
    raise ImportError(
        "sinkroute.adapters.torchtitan needs torchtitan 0.3.0, with torchtitan.models.common.moe.TokenChoiceTopKRouter "
        "and triton; install it with `pip install torchtitan==0.3.0 triton`"
    ) from error

from sinkroute.adapters._fit import fit_router, is_asked, join_bias, join_gate, on_scores, refuse_bias, refuse_loss
from sinkroute.adapters._links import moves_bias
from sinkroute.adapters._patched import Patched, hold, holder, outputs_of, put_in
from sinkroute.adapters._titan_ranks import ranks_in
from sinkroute.kernels.storage import is_watched
from sinkroute.routing import Router
from sinkroute.routing.attached import require_model
from sinkroute.routing.registry import RECOMMENDED
from sinkroute.routing.routes import Routes

__all__ = ["SinkrouteRouter", "patch", "route", "tell_ranks"]

# What decides how their router routes, as known; a field more is a rule that we would not follow.
_KNOWN = {"gate", "num_experts", "num_expert_groups", "num_limited_groups", "top_k"}
_KNOWN |= {"score_func", "route_norm", "route_scale", "_debug_force_load_balance"}

# What their optimiser hook moves a bias by, in place of load_balance_coeff, where ours moves it; it goes on counting.
# (None would be a layer without a bias to them.)
_OFF = 0.0


@functools.cache
def check_contract() -> None:
    """Refuse a torchtitan whose router is not the one that this adapter is written for.

    Raises:
        RuntimeError: its options, its arguments or what it returns are others.
    """
    names = {entry.name for entry in fields(TokenChoiceTopKRouter.Config)} - {
        entry.name for entry in fields(Module.Config)
    }
    problem = f"has the options {sorted(names)}" if names != _KNOWN else None
    if problem is None:
        gate = Linear.Config(in_features=2, out_features=4)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            theirs = TokenChoiceTopKRouter.Config(num_experts=4, gate=gate, top_k=3).build()
            try:
                found = [tuple(part.shape) for part in theirs(torch.zeros(1, 5, 2), torch.zeros(4))]
                problem = None if found == [(1, 5, 3), (1, 5, 3), (1, 5, 4)] else f"gives tensors of {found}"
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                problem = f"does not take (x, expert_bias): {error}"
    if problem is not None:
        raise RuntimeError(
            f"torchtitan {importlib.metadata.version('torchtitan')} is not supported: its TokenChoiceTopKRouter "
            f"{problem}; install torchtitan==0.3.0, or a sinkroute that knows this one"
        )


class SinkrouteRouter(TokenChoiceTopKRouter):
    """torchtitan's router, asking a sinkroute router in training.

    Config: the fields of `TokenChoiceTopKRouter.Config`, and `router` (a name from `sinkroute.list_routers()`) and
    `options` (its options but for those that the fields give: score, norm_topk, groups, route_scale).

    Raises:
        ValueError: a method that does not fit (see `patch`).
        RuntimeError: a torchtitan whose router is another.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        router: str = RECOMMENDED
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: SinkrouteRouter.Config) -> None:
        super().__init__(config)
        hold(self, _fit(self, config.router, config.options))
        self._unsettled = config  # until the layer is there that it is a part of

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As theirs: (..., D) and (E,) → weights (..., K), experts (..., K), scores (..., E).

        Raises:
            ValueError: a bias that torchtitan balances, and a method that balances by other means.
            NotImplementedError: scores that are spread over ranks by anything but tokens.
            RuntimeError: the layer is compiled, or captured in a CUDA graph.
        """
        router = holder(self)
        if self._debug_force_load_balance or not is_asked(router):
            return super().forward(x_BLD, expert_bias_E)
        if self.training or not router.is_plain():
            _refuse_frozen(x_BLD)
        if expert_bias_E is not None and not moves_bias(router):
            refuse_bias(router, "load_balance_coeff")
        for link in router.links:
            link.pull()
        if router.is_plain():
            # Their own code, to the last bit; ours counts.
            with outputs_of(self.gate) as logits:
                weights_BLK, experts_BLK, scores_BLE = super().forward(x_BLD, expert_bias_E)
            plain = Routes(_local(experts_BLK).flatten(0, -2), _local(weights_BLK).flatten(0, -2))
            _ask(router, _local(logits[0]).detach().flatten(0, -2), plain=plain)
            return weights_BLK, experts_BLK, scores_BLE
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits_BLE = self.gate(x_BLD)
        _check_placements(logits_BLE)
        scores_BLE = torch.sigmoid(logits_BLE) if self.score_func == "sigmoid" else logits_BLE.softmax(dim=-1)
        router.correction_E = None if expert_bias_E is None else _local(expert_bias_E)
        for link in router.links:
            link.see(_local(x_BLD))
        local_BLE = _local(logits_BLE)
        routes = _ask(router, local_BLE.flatten(0, -2))
        weights_BLK, experts_BLK = (
            _like(part.contiguous().unflatten(0, local_BLE.shape[:-1]), logits_BLE)  # they take views of it
            for part in (routes.weights.to(local_BLE.dtype), routes.experts)
        )
        return weights_BLK, experts_BLK, scores_BLE

    def parallelize(self, parallel_dims: Any) -> None:
        """Theirs, and what the mesh says of the ranks: who has other tokens, who the same, who other layers.

        Raises:
            ValueError: `process_group` names no dimension of the mesh, or has ranks of another pipeline stage.
            RuntimeError: a mesh that is laid out otherwise than torchtitan 0.3.0's.
        """
        super().parallelize(parallel_dims)
        router = holder(self)
        router.ranks = ranks_in(parallel_dims, router.ranks.plan)


def tell_ranks(model: nn.Module, parallel_dims: Any) -> None:
    """Tell the routers of a model, or of a pipeline stage, their ranks where `parallelize` has not.

    torchtitan does not call it with `spmd_backend="partial_dtensor"` and neither tensor nor expert parallelism. A
    second call changes nothing. `SinkrouteTrainer` calls it.

    Args:
        model: what holds the routers.
        parallel_dims: torchtitan's `ParallelDims`, such as `trainer.parallel_dims`.

    Raises:
        ValueError, RuntimeError: see `SinkrouteRouter.parallelize`.
    """
    for part in model.modules():
        if isinstance(part, SinkrouteRouter):
            router = holder(part)
            router.ranks = ranks_in(parallel_dims, router.ranks.plan)


def _settle(layer: nn.Module, name: str, _: Tensor | None) -> None:
    """Fit the router of a configured layer, which does not know the layer that it is built for, to that layer's bias.

    Called for every buffer of every module. That of the counts is the last thing that a layer makes.
    """
    if name != "tokens_per_expert_E" or not isinstance(layer, MoE):
        return
    host = layer.router
    if not isinstance(host, SinkrouteRouter):
        return
    config = host.__dict__.pop("_unsettled", None)
    if config is not None and layer.load_balance_coeff is not None:
        router = _fit(host, config.router, config.options, layer)
        hold(host, router)
        if moves_bias(router):
            layer.load_balance_coeff = _OFF


def _number(parent: nn.Module, name: str, block: nn.Module | None) -> None:
    """Give the routers of a configured block the block's number, which is the same in whatever stage it comes to be.

    Called for every module that becomes a part of another. torchtitan's blocks are in a `ModuleDict` by number.
    """
    if not isinstance(parent, ModuleDict) or not name.isdigit() or block is None:
        return
    for part in block.modules():
        if isinstance(part, SinkrouteRouter) and not (router := holder(part)).layer_is_given:
            router.layer, router.layer_is_given = int(name), True


register_module_buffer_registration_hook(_settle)
register_module_module_registration_hook(_number)


@override(target=TokenChoiceTopKRouter.Config, exact=True, description="sinkroute's router")
def route(config: TokenChoiceTopKRouter.Config, router: str = RECOMMENDED, **options: Any) -> SinkrouteRouter.Config:
    """For `--override.imports 'sinkroute.adapters.torchtitan.route={"router": "ssr-l", "probability": 0.001}'`.

    Returns:
        The configuration of a `SinkrouteRouter` in the place of theirs.
    """
    return derive(config, SinkrouteRouter.Config, router=router, options=options)


def patch(model: nn.Module, router: str = RECOMMENDED, *, parallel_dims: Any = None, **options: Any) -> Patched:
    """Put a sinkroute router into every `MoE` layer of a built model, in place.

    Args:
        model: a torchtitan model, or one stage of it. Its parameters, their names and the `state_dict` stay as they are
            (a method that remembers something adds `router.state.*`). What a method serves with is in `expert_bias_E`,
            or where the layer has none in the gate.
        router: a name from `sinkroute.list_routers()`; the recommended one unless told.
        parallel_dims: torchtitan's `ParallelDims`, for a model that is parallelized already.
        options: the router's, but for those that the model's routers give: score, norm_topk, groups, route_scale.

    Returns:
        A handle: `handle.remove()` undoes it all, `print(handle)` shows what was found.

    Raises:
        ValueError: no such layer; a router that is no plain `TokenChoiceTopKRouter`; a method that brings a gate
            or a parameter, with an auxiliary loss (nothing in torchtitan adds it to the training loss), in which
            experts choose, or with another rule than top-k beside `load_balance_coeff`; no `parallel_dims` for a model
            that is parallelized already.
        RuntimeError: a torchtitan whose router is another.
    """
    require_model(model)
    layers = {}
    for path, part in model.named_modules():
        if isinstance(part, MoE):
            layers[id(part.router)] = part
            if not isinstance(part.router, TokenChoiceTopKRouter):
                raise ValueError(
                    f"{path}.router is a {type(part.router).__name__}, not torchtitan's TokenChoiceTopKRouter; patch "
                    "the model without it"
                )

    def fit(path: str, theirs: TokenChoiceTopKRouter) -> Router:
        if theirs._parallelized and parallel_dims is None:
            raise ValueError(
                f"parallel_dims=None, but the model is parallelized already, and {path} cannot tell any more which "
                "ranks have the same tokens, and which have other layers; give trainer.parallel_dims, patch the model "
                "before it is parallelized, or configure it"
            )
        fitted = _fit(theirs, router, options, layers.get(id(theirs)))
        # The number of the block, the same in each pipeline stage.
        if not fitted.layer_is_given and (block := re.search(r"(?:^|\.)layers\.(\d+)\.", path)):
            fitted.layer, fitted.layer_is_given = int(block[1]), True
        if parallel_dims is not None:
            fitted.ranks = ranks_in(parallel_dims, fitted.ranks.plan)
        return fitted

    patched = put_in(model, router, {TokenChoiceTopKRouter: (SinkrouteRouter, fit)}, "torchtitan")
    for layer in layers.values():
        if moves_bias(holder(layer.router)):
            patched.on_remove(setattr, layer, "load_balance_coeff", layer.load_balance_coeff)
            layer.load_balance_coeff = _OFF
    return patched


def _fit(theirs: TokenChoiceTopKRouter, name: str, options: dict[str, Any], layer: MoE | None = None) -> Router:
    """The router that does as `theirs`, in `layer` or by itself."""
    check_contract()
    biased = layer is not None and layer.load_balance_coeff is not None
    if biased:
        options = on_scores(name, options)
    scoring = {"score": theirs.score_func, "norm_topk": theirs.route_norm, "route_scale": theirs.route_scale}
    if theirs.num_expert_groups is not None:
        scoring |= {"groups": theirs.num_expert_groups, "top_groups": theirs.num_limited_groups}
    owner = "torchtitan's router"
    router = fit_router(name, theirs.num_experts, theirs.top_k, options, owner, **scoring)
    refuse_loss(router, "torchtitan")
    if router.state is not None:
        # torchtitan refuses models with parts that are not its `Module`.
        for part in router.modules():
            part.__class__ = _as_titan_module(type(part))  # type: ignore[arg-type]
    if biased:
        join_bias(router, "load_balance_coeff", functools.partial(getattr, layer, "expert_bias_E"))
    else:
        join_gate(router, owner, theirs, theirs.gate)
    return router


@functools.cache
def _as_titan_module(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (cls, Module), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _ask(router: Router, logits_TE: Tensor, plain: Routes | None = None) -> Routes:
    """Unseen by selective checkpointing, torchtitan's default: it wants the same operations when a pass is repeated,
    and a router counts nothing then."""
    unseen = torch._C._len_torch_dispatch_stack() > 0 and not is_watched()
    with _disable_current_modes() if unseen else contextlib.nullcontext():
        routes: Routes = router(logits_TE, plain=plain)
    return routes


def _refuse_frozen(x_BLD: Tensor) -> None:
    """A compiled or captured step would repeat the draws, and the branch, of the step in which it was made."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a sinkroute router cannot be compiled with fullgraph=True, as torchtitan does with its blocks: its solver "
            "ends when the data say so; leave the model out, --compile.components loss"
        )
    if x_BLD.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a sinkroute router decides anew in every step, which a CUDA graph would not; set "
            "--training.disable_cuda_graphs"
        )


def _check_placements(logits_BLE: Tensor) -> None:
    if not isinstance(logits_BLE, DTensor):
        return
    if any(place.is_partial() or place.is_shard(logits_BLE.ndim - 1) for place in logits_BLE.placements):
        raise NotImplementedError(
            f"the gate's scores are placed as {logits_BLE.placements}, but a router needs whole rows; shard tokens only"
        )


def _local(part: Tensor) -> Tensor:
    return part.to_local() if isinstance(part, DTensor) else part


def _like(part: Tensor, reference: Tensor) -> Tensor:
    """`part`, of this rank, placed as `reference` is."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(part, reference.device_mesh, reference.placements, run_check=False)
