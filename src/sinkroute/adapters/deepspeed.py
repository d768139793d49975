"""Our routers in DeepSpeed's mixture-of-experts layers.

`deepspeed.moe.layer.MoE` asks its `TopKGate` for routes with places: every expert has room for so many tokens, and what
does not fit is dropped. For S tokens and K experts each

    l_aux, capacity, E, experts_KS, places_KS, weights_KS, load_E = gate(x_SD, used_token, True, use_tutel)
    l_aux, combine_SEC, dispatch_SEC, load_E = gate(x_SD, used_token)          (the older, dense form)

`SinkrouteGate` keeps the gate's parameter `wg`, its capacity and what it drops, its jitter and expert-parallel group;
in training a sinkroute router chooses and weighs. AutoEP's layers (module_inject/auto_ep_layer.py) have no capacity and
ask a router of torchtitan's kind for weights, experts and loads: `SinkrouteEPRouter`. The bias of a method that serves
with one is its `e_score_correction_bias` where it has that. In `eval()` their own code runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import deepspeed.comm as dist
    from deepspeed.comm import pg_utils
    from deepspeed.moe import sharded_moe
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter
    from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
    from deepspeed.utils import groups
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
except ImportError as error:
    raise ImportError(
        "sinkroute.adapters.deepspeed needs DeepSpeed 0.19.8 or a later one with the same gates; install it with "
        "`pip install deepspeed==0.19.8` where torch is installed"
    ) from error

from sinkroute.adapters._engine_ranks import engine_ranks
from sinkroute.adapters._fit import fit_router, is_asked, join_bias, join_gate, on_scores, refuse_bias, refuse_loss
from sinkroute.adapters._patched import Kinds, Patched, holder, outputs_of, put_in
from sinkroute.adapters._ranks import Layout
from sinkroute.kernels.normal import normal_like
from sinkroute.routing import Router
from sinkroute.routing.draws import hash63
from sinkroute.routing.registry import RECOMMENDED
from sinkroute.routing.routes import Routes

__all__ = ["SinkrouteEPRouter", "SinkrouteGate", "patch"]


def check_contract() -> None:
    """Refuse a DeepSpeed whose gates take or keep other things than those that this adapter is written for.

    Raises:
        RuntimeError: they do.
    """
    known = {
        TopKGate.forward: ["self", "input", "used_token", "sparse_routes", "use_tutel"],
        TopKGate.__init__: [
            *["self", "model_dim", "num_experts", "k", "capacity_factor", "eval_capacity_factor", "min_capacity"],
            *["noisy_gate_policy", "drop_tokens", "use_rts", "ep_group", "top2_2nd_expert_sampling"],
        ],
        TokenChoiceTopKRouter.forward: ["self", "x", "expert_bias"],
    }
    for function, names in known.items():
        found = list(inspect.signature(function).parameters)
        if found != names:
            raise RuntimeError(
                f"deepspeed {importlib.metadata.version('deepspeed')} is not supported: {function.__qualname__} takes "
                f"{found}, not {names}; install deepspeed==0.19.8, or a sinkroute that knows this one"
            )


class SinkrouteGate(TopKGate):
    """DeepSpeed's gate, asking a sinkroute router in training; made by `patch`."""

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """As theirs: tokens (S, D) → routes, sparse or dense.

        Args:
            input: (S, D) of any float dtype; the logits are float32.
            used_token: (S,) 1 for real tokens. Padding gets no place, whatever K is (theirs: with K = 1 only), and is
                in no marginal, load or loss.
            sparse_routes: the form of what is returned.
            use_tutel: of no consequence here.

        Returns:
            `l_aux` is the router's own loss, its coefficient included, and 0 if it has none.
        """
        router = holder(self)
        if not self.training and router.is_plain():
            if is_asked(router):  # by a monitor: ours would choose the same
                with torch.no_grad():
                    logits_SE = F.linear(input.float(), self.wg.weight.float())
                    router(logits_SE, None if used_token is None else used_token.reshape(-1) != 0)
            return super().forward(input, used_token, sparse_routes, use_tutel)
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        tokens_SD = input.float()
        if self.noisy_gate_policy == "Jitter" and self.training:
            tokens_SD = sharded_moe.multiplicative_jitter(tokens_SD, device=input.device)
        logits_SE = F.linear(tokens_SD, self.wg.weight.float())
        real_S = None if used_token is None else used_token.reshape(-1).to(logits_SE.device) != 0
        for link in router.links:
            link.see(tokens_SD)
        routes = router(logits_SE, real_S)
        chosen_SK = torch.ones_like(routes.experts, dtype=torch.bool) if routes.chosen is None else routes.chosen
        capacity, kept_SK, places_SK = self._places(router, routes.experts, routes.weights, chosen_SK, routes.load)
        weights_SK = routes.weights * kept_SK
        if self.k > 1:
            total_S1 = weights_SK.sum(-1, keepdim=True)
            weights_SK = weights_SK / total_S1.clamp(min=torch.finfo(total_S1.dtype).eps)
        l_aux = logits_SE.new_zeros(()) if routes.aux_loss is None else routes.aux_loss
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        places_SK = places_SK * kept_SK
        if sparse_routes:
            experts_SK = routes.experts.masked_fill(~kept_SK, -1)
            experts_KS, places_KS = (part.t().to(torch.int32).contiguous() for part in (experts_SK, places_SK))
            return l_aux, capacity, router.num_experts, experts_KS, places_KS, weights_SK.t().contiguous(), routes.load
        size = int(capacity)
        combine_SX = weights_SK.new_zeros(len(weights_SK), router.num_experts * size)
        combine_SX = combine_SX.scatter_add(1, routes.experts * size + places_SK, weights_SK)
        combine_SEC = combine_SX.unflatten(1, (router.num_experts, size))
        return l_aux, combine_SEC, combine_SEC.bool(), routes.load

    def _places(
        self, router: Router, experts_SK: Tensor, weights_SK: Tensor, chosen_SK: Tensor, load_E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Room for each expert, which choices get a place, and which place: as DeepSpeed's gate of K.

        K = 1 drops at random (`use_rts`), K = 2 those that come last (second choices after all first), K > 2 those with
        the least weight.
        """
        tokens = len(experts_SK)
        members_SE = weights_SK.new_zeros(tokens, router.num_experts).scatter_(1, experts_SK, chosen_SK.to(weights_SK))
        if self.drop_tokens:
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            capacity = sharded_moe._capacity(members_SE, torch.tensor(factor * self.k), torch.tensor(self.min_capacity))
        else:
            capacity = self._largest_load(load_E, tokens)
        if self.k == 2:
            # In the order of places: all first choices, then all second.
            order_RE = members_SE.new_zeros(2 * tokens, router.num_experts)
            order_RE.scatter_(1, experts_SK.t().reshape(-1, 1), chosen_SK.t().reshape(-1, 1).to(order_RE))
            places_RE = order_RE.long().cumsum(0) - 1
            places_SK = places_RE.gather(1, experts_SK.t().reshape(-1, 1)).view(2, tokens).t()
            return capacity, chosen_SK & (places_SK < capacity), places_SK
        if self.drop_tokens:
            if self.k > 2:
                rank_SE = members_SE.scatter(1, experts_SK, weights_SK.detach() * chosen_SK)
            elif self.use_rts:
                rank_SE = members_SE * _keyed_noise(router, members_SE).exp()
            else:
                rank_SE = members_SE.long()  # ties, which torch breaks by the dtype's own rule
            best_XE = rank_SE.topk(min(int(capacity), tokens), dim=0).indices
            members_SE = members_SE * torch.zeros_like(members_SE).scatter_(0, best_XE, 1.0)
        places_SK = (members_SE.long().cumsum(0) - 1).gather(1, experts_SK)
        return capacity, chosen_SK & (members_SE.gather(1, experts_SK) > 0), places_SK

    def _largest_load(self, load_E: Tensor, tokens: int) -> Tensor:
        """Without dropping: room for the fullest expert of all expert-parallel ranks, which exchange equal blocks."""
        capacity = load_E.max()
        if pg_utils.is_parallel(self.ep_group):
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        if groups._get_expert_model_parallel_world_size() == 1:
            ranks = 1 if groups.mpu is None else bwc_tensor_model_parallel_world_size(mpu=groups.mpu)
            capacity = -(-capacity // ranks) * ranks
        return capacity.clamp(max=tokens) if self.k == 1 else capacity


class SinkrouteEPRouter(TokenChoiceTopKRouter):
    """The router of AutoEP's layers, asking a sinkroute router in training; made by `patch`."""

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As theirs: tokens (T, D) → weights (T, K), experts (T, K), load (E,) int32.

        Raises:
            ValueError: a bias in their choice, and a method that balances by other means.
        """
        router = holder(self)
        if not is_asked(router):
            return super().forward(x, expert_bias)
        for link in router.links:
            link.pull()
        if router.is_plain():
            # Their own code, to the last bit; ours counts.
            with outputs_of(self.gate) as logits:
                weights_TK, experts_TK, load_E = super().forward(x, expert_bias)
            router(logits[0].detach(), plain=Routes(experts_TK, weights_TK))
            return weights_TK, experts_TK, load_E
        biases = [bias for bias in (expert_bias, self.e_score_correction_bias) if bias is not None]
        if expert_bias is not None or (biases and not router.links):
            refuse_bias(router, "expert_bias")
        router.correction_E = sum(bias.detach().float() for bias in biases) if biases else None  # type: ignore[assignment]
        for link in router.links:
            link.see(x)
        routes = router(self.gate(x))
        return routes.weights, routes.experts, routes.load.int()


def patch(model: nn.Module, router: str = RECOMMENDED, **options: Any) -> Patched:
    """Put a sinkroute router into every gate of a model, in place; before or after `deepspeed.initialize`.

    Args:
        model: holds `deepspeed.moe.layer.MoE` layers (or gates), or those that AutoEP made of it when it was
            initialised. Its parameters, their names and the `state_dict` stay as they are (a method that remembers
            something adds `router.state.*`). What a method serves with is in AutoEP's `e_score_correction_bias`, or
            where there is none in the gate.
        router: a name from `sinkroute.list_routers()`; the recommended one unless told.
        options: the router's, but for those that the model's gates give: score, norm_topk, groups, route_scale.

    Returns:
        A handle: `handle.remove()` undoes it all, `print(handle)` shows what was found.

    Raises:
        ValueError: no such layer; a gate that is no plain `TopKGate`; a method that brings a gate or a parameter, in
            which experts choose, or (AutoEP) with an auxiliary loss, which nothing adds to the training loss.
        RuntimeError: a DeepSpeed whose gates are others.
    """
    check_contract()
    replaced = set()

    def fit_gate(path: str, gate: TopKGate) -> Router:
        if gate.k == 1 and gate.noisy_gate_policy == "RSample":
            replaced.add('noisy_gate_policy="RSample"')
        if gate.k == 2 and gate.top2_2nd_expert_sampling:
            replaced.add("top2_2nd_expert_sampling=True")
        # Not over the chosen: DeepSpeed does that over those that get a place.
        owner = "DeepSpeed's gate"
        fitted = fit_router(router, gate.wg.out_features, gate.k, options, owner, score="softmax", norm_topk=False)
        join_gate(fitted, owner, gate, gate.wg, functools.partial(_check_copy, router))
        return fitted

    def fit_autoep(path: str, theirs: TokenChoiceTopKRouter) -> Router:
        return _fit_autoep(theirs, router, options)

    kinds: Kinds = {TopKGate: (SinkrouteGate, fit_gate), TokenChoiceTopKRouter: (SinkrouteEPRouter, fit_autoep)}
    patched = put_in(model, router, kinds, "DeepSpeed")
    first = next(iter(patched.routers.values()))
    ranks = Layout(engine_ranks, first.clock, first.ranks.plan).ranks()
    for each in patched.routers.values():
        each.ranks = ranks
    if replaced:
        warnings.warn(
            f"{' and '.join(sorted(replaced))} of the model's gates is off in training while they are patched: the "
            f"noise is that of router {router!r}",
            stacklevel=2,
        )
    return patched


def _fit_autoep(theirs: TokenChoiceTopKRouter, name: str, options: dict[str, Any]) -> Router:
    scoring = {"score": theirs.score_func, "norm_topk": theirs.route_norm, "route_scale": theirs.route_scale}
    if theirs.num_expert_groups is not None:
        scoring |= {
            "groups": theirs.num_expert_groups,
            "top_groups": theirs.num_limited_groups,
            "group_score": theirs.group_score_func.replace("_", "-"),
        }
    bias = theirs.e_score_correction_bias
    if bias is not None:
        options = on_scores(name, options)
    router = fit_router(name, theirs.num_experts, theirs.top_k, options, "AutoEP's router", **scoring)
    refuse_loss(router, "AutoEP")
    if bias is not None:
        join_bias(router, "e_score_correction_bias", functools.partial(getattr, theirs, "e_score_correction_bias"))
        if router.links:
            _check_bias_stays(bias, name)
    else:
        join_gate(router, "AutoEP's router", theirs, theirs.gate, functools.partial(_check_copy, name))
    return router


def _check_copy(name: str, weight: Tensor, move: Tensor) -> bool:
    """Refuse a gate whose float32 copy cannot be moved with it, as `moved.add` does with that of ZeRO's optimisers.

    Raises:
        ValueError: ZeRO 3, which keeps the gate in parts; a gate in low precision whose copy cannot be found.
    """
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"router {name!r} moves the gate, which ZeRO 3 keeps in parts; take ZeRO 2, or a method that leaves the "
            'gate alone, such as "ssr-l"'
        )
    if not hasattr(weight, "_hp_mapping") and weight.dtype != torch.float32:
        raise ValueError(
            f"router {name!r} moves the gate, which is {weight.dtype}, and the optimiser's float32 copy of it cannot "
            'be found; take ZeRO 1 or 2, float32, or a method that leaves the gate alone, such as "ssr-l"'
        )
    return False


def _check_bias_stays(bias: Tensor, name: str) -> None:
    """Refuse a bias that something else writes over, or that is not all here."""
    if bias.requires_grad:
        raise ValueError(
            f"router {name!r} moves e_score_correction_bias, which is trained: an optimiser would write over it; set "
            "its requires_grad to False before deepspeed.initialize, or take a method without a bias, such as ssr-s"
        )
    if hasattr(bias, "ds_id"):
        raise ValueError(
            f"router {name!r} moves e_score_correction_bias, which ZeRO 3 keeps in parts as a parameter; make it a "
            "buffer, as transformers does, take ZeRO 2, or a method without a bias, such as ssr-s"
        )


def _keyed_noise(router: Router, like_SE: Tensor) -> Tensor:
    """Who gets a place is drawn by the same key as all else, and repeated under activation checkpointing."""
    key = (router.seed, router.layer or 0, router.step, router.micro_batch, router.ranks.noise.rank)
    return normal_like(like_SE, torch.tensor(hash63("places", *key), device="cpu"))
