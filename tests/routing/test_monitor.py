"""`LoadMonitor`: numbers by hand and by a slow oracle, what counts and what does not, and that it leaves no trace."""

import collections
import copy
import gc
import io
import json
import math
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.routing.metrics import routing_fluctuation, saturation
from sinkroute.routing.registry import router_options
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes

TIERS = ["brief", "detailed"]
both_tiers = pytest.mark.parametrize("tier", TIERS)


def make(name="softmax", experts=4, top_k=2, **options):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wanting(*experts, width=4):
    """Logits of tokens that want these experts, top-1."""
    return 5.0 * torch.eye(width)[list(experts)]


def near(value, rel=1e-5):
    return None if value is None else pytest.approx(value, rel=rel, abs=1e-6 if rel == 1e-5 else 1e-12)


class Fixed(Router):
    """Routes as it is told."""

    choice: Routes

    def route(self, logits_TE, token_mask):
        return self.choice


class Model(nn.Module):
    """Two mixture layers, the second by a plan, with something that depends on the mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = sinkroute.MoE(8, 8, 4, 2, router="load-balance")
        self.drop = nn.Dropout(0.5)
        self.second = sinkroute.MoE(8, 8, 6, 2, router="sinkhorn")

    def forward(self, x, token_mask=None):
        return self.second(x + self.drop(self.first(x, token_mask)), token_mask)


def hooks(model):
    names = "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks"
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


# -- numbers by hand -------------------------------------------------------------------------------------------------


def test_max_vio_is_the_mean_over_passes_and_global_of_the_summed_load():
    router = make(top_k=1)
    with sinkroute.LoadMonitor(router) as monitor:
        router(wanting(0, 0, 0, 1))  # load 3 1 0 0, mean 1: MaxVio 2
        router(wanting(2, 3))  # load 0 0 1 1, mean 1/2: MaxVio 1
    metrics = monitor.metrics()["router"]
    assert (metrics["passes"], metrics["tokens"], metrics["load"]) == (2, 6, [3, 1, 1, 1])
    assert metrics["max_vio"] == 1.5
    # Mean 1.5. (3 − 1.5)/1.5 = 1. Shares ½ and thrice 1/6. Deviations 1.5 and thrice −0.5: √((2.25 + 0.75)/4)/1.5.
    assert metrics["max_vio_global"] == 1.0
    assert metrics["entropy"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(6)) / math.log(4))
    assert metrics["cv"] == pytest.approx(math.sqrt(0.75) / 1.5)


def test_an_expert_is_dead_below_a_hundredth_of_the_mean():
    router = make(top_k=1, experts=2)
    with sinkroute.LoadMonitor(router) as monitor:
        router(wanting(*[0] * 200, 1, width=2))  # mean 100.5: 1 is below 1.005
        first = monitor.metrics(reset=True)["router"]
        router(wanting(*[0] * 198, 1, width=2))  # mean 99.5: 1 is not below 0.995
    assert (first["dead"], first["dead_share"]) == (1, 0.5)
    assert (monitor.metrics()["router"]["dead"], monitor.metrics()["router"]["dead_share"]) == (0, 0.0)


def test_shares_of_branches_and_means_over_assigned_passes():
    router = Fixed(4, 1)
    zeros_T1 = torch.zeros(4, 1, dtype=torch.int64)
    even_T1, ones_T1 = torch.arange(4)[:, None], torch.ones(4, 1)
    error = torch.tensor
    with sinkroute.LoadMonitor(router) as monitor:
        for choice in (
            Routes(zeros_T1, ones_T1),  # MaxVio 3
            Routes(even_T1, ones_T1, branch="sinkhorn", plan_error=error(0.75), plan_passes=4),  # MaxVio 0
            Routes(zeros_T1, ones_T1, branch="sinkhorn", plan_error=error(0.25), plan_passes=torch.tensor(9)),
            Routes(even_T1, ones_T1, branch="assignment"),
        ):
            router.choice = choice
            router(torch.zeros(4, 4))
    metrics = monitor.metrics()["router"]
    assert (metrics["sinkhorn_share"], metrics["assigned_share"]) == (0.5, 0.75)
    assert (metrics["max_vio"], metrics["max_vio_assigned"]) == (1.5, 1.0)
    assert (metrics["plan_error"], metrics["plan_error_max"], metrics["plan_passes"]) == (0.5, 0.75, 6.5)


def test_aux_loss_is_the_mean_over_passes_that_had_one():
    router = Fixed(4, 1)
    with sinkroute.LoadMonitor(router) as monitor:
        for loss in (torch.tensor(0.5, requires_grad=True), None, torch.tensor(2.0)):
            router.choice = Routes(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), aux_loss=loss)
            router(torch.zeros(3, 4))
    assert monitor.metrics()["router"]["aux_loss"] == 1.25


def test_places_that_no_expert_took_are_dropped():
    router = Fixed(4, 2)
    chosen_TK = torch.tensor([[True, True], [True, False], [False, False]])
    router.choice = Routes(torch.tensor([[0, 1]] * 3), torch.ones(3, 2), chosen=chosen_TK)
    with sinkroute.LoadMonitor(router) as monitor:
        router(torch.zeros(3, 4))
        assert monitor.metrics(reset=True)["router"]["drop_rate"] == 0.5  # 3 of 6
        router(torch.zeros(3, 4), torch.tensor([True, True, False]))
    assert monitor.metrics()["router"]["drop_rate"] == 0.25  # 1 of 4


def test_what_one_token_gets_beyond_k_makes_up_for_no_other():
    router = Fixed(4, 2)
    # Experts got: 4, 1, 0 of 2 each. 3 of 6 places are filled; two experts are beyond.
    chosen_TK = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    router.choice = Routes(torch.arange(4).repeat(3, 1), torch.ones(3, 4), branch="expert-choice", chosen=chosen_TK)
    with sinkroute.LoadMonitor(router) as monitor:
        router(torch.zeros(3, 4))
    assert monitor.metrics()["router"]["drop_rate"] == 0.5


def test_a_method_that_takes_fewer_than_k_drops_nothing():
    router = Fixed(4, 3)
    router.choice = Routes(torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    with sinkroute.LoadMonitor(router) as monitor:
        router(torch.zeros(3, 4))
    assert monitor.metrics()["router"]["drop_rate"] == 0.0


def test_router_entropy_is_the_mean_over_real_tokens_in_nats():
    router = make()
    logits_TE = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [float("nan")] * 4])
    with sinkroute.LoadMonitor(router, "detailed") as monitor:
        router(logits_TE, torch.tensor([True, True, False]))
    assert monitor.metrics()["router"]["router_entropy"] == pytest.approx(math.log(4) / 2)


def test_disagreement_and_gap_are_measured_against_plain_topk_of_the_same_logits():
    router = Fixed(4, 2)
    logits_TE = torch.tensor([[4.0, 3, 2, 1]] * 3)  # all want 0 and 1
    # The first: the same set in another order. The second: another set. The third: one of the two only.
    experts_TK, chosen_TK = torch.tensor([[1, 0], [2, 3], [0, 1]]), torch.tensor([[True] * 2] * 2 + [[True, False]])
    with sinkroute.LoadMonitor(router, "detailed") as monitor:
        router.choice = Routes(experts_TK, torch.ones(3, 2), branch="sinkhorn", chosen=chosen_TK)
        router(logits_TE)
        router.choice = Routes(torch.tensor([[3, 2]] * 3), torch.ones(3, 2))  # by softmax: not asked
        router(logits_TE)
    metrics = monitor.metrics()["router"]
    assert metrics["disagreement"] == pytest.approx(2 / 3)
    # Plain: 3 3 0 0, mean 1.5, MaxVio 1. Routed: 2 1 1 1, mean 1.25, MaxVio 0.6.
    assert metrics["max_vio_topk"] == 1.0 and metrics["max_vio_assigned"] == pytest.approx(0.6)
    assert metrics["gap"] == pytest.approx(0.4)


@pytest.mark.parametrize("options", [{}, {"groups": 2, "top_groups": 1, "score": "sigmoid"}])
def test_plain_topk_is_the_served_one_where_ties_are_spread_in_training(options):
    router = make("ssr-l", experts=8, ties="spread", probability=1.0, noise=0, **options)
    logits_TE = torch.zeros(64, 8)
    with sinkroute.LoadMonitor(router, "detailed") as monitor:
        spread = router(logits_TE)
    served = router.eval()(logits_TE)
    metrics = monitor.metrics()["router"]
    assert len(spread.experts.unique()) == 8 and served.load.tolist() == [64, 64] + [0] * 6
    assert metrics["max_vio_topk"] == 3.0  # 64 of 16
    assert metrics["gap"] == 3.0 - metrics["max_vio_assigned"] > 1.0


def test_an_expert_whose_weight_underflows_is_in_the_set_all_the_same():
    router = make("ssr-l", probability=1.0, noise=0, reg=1e-3, experts=2)
    with sinkroute.LoadMonitor(router, "detailed") as monitor:
        routes = router(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    assert (routes.weights == 0).any()
    assert monitor.metrics()["router"]["disagreement"] == 0.0


# -- an independent slow oracle --------------------------------------------------------------------------------------


def slow(calls, experts, top_k, score):
    """All metrics of (logits, mask, routes), token by token, in float64."""
    load = np.zeros(experts)
    mean = collections.defaultdict(list)
    vio = lambda counts: counts.max() / counts.mean() - 1  # noqa: E731
    for logits_TE, mask_T, routes in calls:
        own, plain = np.zeros(experts), np.zeros(experts)
        for t, logits in enumerate(logits_TE[:, :experts].double().numpy()):
            if mask_T is not None and not mask_T[t]:
                continue
            taken = {
                int(e) for k, e in enumerate(routes.experts[t]) if routes.chosen is None or bool(routes.chosen[t, k])
            }
            top = set(np.argsort(-logits)[:top_k].tolist())
            own[list(taken)] += 1
            plain[list(top)] += 1
            p = np.exp(logits - logits.max()) if score == "softmax" else 1 / (1 + np.exp(-logits))
            p /= p.sum()
            mean["router_entropy"].append(-sum(x * math.log(x) for x in p if x > 0))
            places = min(top_k, routes.experts.shape[1])
            mean["drop_rate"].append(1 - min(len(taken), places) / places)
            if routes.branch != "softmax":
                mean["disagreement"].append(taken != top)
        load += own
        mean["max_vio"].append(vio(own))
        mean["sinkhorn_share"].append(routes.branch == "sinkhorn")
        mean["assigned_share"].append(routes.branch != "softmax")
        if routes.aux_loss is not None:
            mean["aux_loss"].append(routes.aux_loss.item())
        if routes.branch != "softmax":
            mean["max_vio_assigned"].append(vio(own))
            mean["max_vio_topk"].append(vio(plain))
            mean["gap"].append(vio(plain) - vio(own))
        if routes.plan_error is not None:
            mean["plan_error"].append(routes.plan_error.item())
            mean["plan_passes"].append(int(routes.plan_passes))
    share = load / load.sum()
    found = {name: float(np.mean(values)) for name, values in mean.items()}
    return found | {
        "plan_error_max": max(mean["plan_error"], default=None),
        **dict.fromkeys(("collectives", "messages", "bytes"), 0.0),
        "branches": dict(collections.Counter(routes.branch for _, _, routes in calls)),
        "plans": len(mean["plan_error"]),
        "tokens": len(mean["router_entropy"]),
        "passes": len(calls),
        "load": load.astype(int).tolist(),
        "max_vio_global": vio(load),
        "entropy": -sum(f * math.log(f) for f in share if f) / math.log(experts),
        "cv": load.std() / load.mean(),
        "dead": int((load < 0.01 * load.mean()).sum()),
        "dead_share": float((load < 0.01 * load.mean()).mean()),
    }


ROUTERS = {name: {} for name in sinkroute.list_routers()} | {
    "ssr-l": {"probability": 0.5},
    "ssr-s": {"probability": 0.5, "losses": {"load-balance": 0.01}, "score": "sigmoid"},
    "ssr-ec": {"probability": 0.5},
    "ssr-b": {"probability": 1.0},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_metric_of_every_router_is_that_of_a_slow_oracle(name):
    torch.manual_seed(0)
    layer = sinkroute.MoE(8, 4, 5, 2, router=name, router_options=ROUTERS[name])
    router, calls = layer.router, []
    router.register_forward_hook(lambda _, args, routes: calls.append((args[0].detach(), args[1], routes)))
    with sinkroute.LoadMonitor(layer, "detailed") as monitor:
        for step in range(6):
            sinkroute.set_step(layer, step, total_steps=6)
            mask = torch.arange(20) % 4 != 1 if step % 2 else None
            layer(2 * random(20, 8, seed=step) + 1, mask, token_ids=torch.arange(20) % 7)
    metrics = monitor.metrics()["router"]
    expected = slow(calls, 5, 2, router.score)
    assert set(expected) <= set(metrics)
    for key, value in metrics.items():
        assert value == near(expected.get(key)), key
    if "probability" in router_options(name):
        assert metrics["plan_passes"] is None or metrics["plan_passes"] >= 1


def test_detailed_says_what_brief_says_and_more():
    models = [Model(), Model()]
    metrics = []
    for model, tier in zip(models, TIERS, strict=True):
        with sinkroute.LoadMonitor(model, tier) as monitor:
            torch.manual_seed(1)
            model(random(10, 8))
        metrics.append(monitor.metrics())
    for layer in ("first", "second"):
        brief, detailed = (found[layer] for found in metrics)
        assert brief.items() <= detailed.items()
        assert set(detailed) - set(brief) == {"router_entropy", "disagreement", "max_vio_topk", "gap"}


# -- what counts -----------------------------------------------------------------------------------------------------


def test_training_and_evaluation_are_apart():
    model = Model()
    with sinkroute.LoadMonitor(model) as monitor:
        model(random(10, 8))
        model.eval()(random(7, 8))
        model(random(7, 8))
    assert [monitor.metrics(mode)["second"]["tokens"] for mode in ("train", "eval")] == [10, 14]
    assert monitor.metrics("train")["second"]["sinkhorn_share"] == 1.0
    assert monitor.metrics("eval")["second"]["sinkhorn_share"] == 0.0


@pytest.mark.parametrize("reentrant", [True, False])
@both_tiers
def test_a_pass_that_is_repeated_for_checkpointing_counts_once(reentrant, tier):
    model, x = Model(), random(10, 8).requires_grad_()
    seen = []
    model.first.router.register_forward_hook(lambda *_: seen.append(1))
    with sinkroute.LoadMonitor(model, tier) as monitor:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert len(seen) == 2
    assert [values["passes"] for values in monitor.metrics().values()] == [1, 1]
    assert sum(monitor.metrics()["first"]["load"]) == 20


def test_micro_batches_and_repeated_calls_of_a_router_are_passes():
    router = make()
    twice = nn.ModuleList([nn.Sequential(router), nn.Sequential(router)])
    with sinkroute.LoadMonitor(twice) as monitor:
        for micro_batch in range(3):
            sinkroute.set_step(twice, 0, micro_batch)
            for part in twice:
                part(random(5, 4))
    (metrics,) = monitor.metrics().values()
    assert (metrics["passes"], metrics["tokens"]) == (6, 30)


@both_tiers
@pytest.mark.parametrize("name", ["softmax", "load-balance", "sinkhorn", "ssr-ec"])
def test_a_pass_without_a_real_token_counts_nowhere(name, tier):
    options = {"probability": 1.0} if name == "ssr-ec" else {}
    router, nobody = make(name, **options), torch.zeros(6, dtype=torch.bool)
    with sinkroute.LoadMonitor(router, tier) as monitor:
        idle = monitor.metrics()
        router(torch.empty(0, 4))
        router(random(6, 4), nobody)
        assert monitor.metrics() == idle
        router(random(6, 4))
        before = monitor.metrics()
        router(random(6, 4), nobody)
        router(torch.empty(0, 4), torch.empty(0, dtype=torch.bool))
        assert monitor.metrics() == before


def test_what_a_plan_for_nobody_took_counts_nowhere():
    router = Fixed(4, 1)
    plan = {"plan_error": torch.tensor(0.5), "plan_passes": 7}
    router.choice = Routes(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), branch="sinkhorn", **plan)
    with sinkroute.LoadMonitor(router) as monitor:
        router(torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
        router(torch.zeros(3, 4))
    metrics = monitor.metrics()["router"]
    assert (metrics["plan_error"], metrics["plan_passes"]) == (0.5, 7.0)


def test_an_idle_layer_is_balanced_and_a_mean_of_nothing_is_none():
    metrics = sinkroute.LoadMonitor(make(), "detailed").metrics()["router"]
    balanced = {"max_vio": 0.0, "max_vio_global": 0.0, "entropy": 1.0, "cv": 0.0, "dead": 0, "dead_share": 0.0}
    assert balanced.items() <= metrics.items()
    nothing = {"tokens": 0, "passes": 0, "plans": 0, "branches": {}, "load": [0, 0, 0, 0]}
    assert nothing.items() <= metrics.items()
    assert all(metrics[name] is None for name in set(metrics) - {*balanced, *nothing})


def test_the_load_of_a_step_is_that_of_all_its_micro_batches():
    model = nn.ModuleDict({"small": make(top_k=1), "large": make(experts=6, top_k=1)})
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(2):
            sinkroute.set_step(model, step)
            for wanted in ((0, 0), (1, 1 + step)):
                model["small"](wanting(*wanted))
                model["large"](wanting(*wanted, width=6))
            loads = monitor.end_step()
            assert loads["small"].tolist() == [[2, 2, 0, 0], [2, 1, 1, 0]][step]
            assert loads["large"].tolist() == [[2, 2, 0, 0, 0, 0], [2, 1, 1, 0, 0, 0]][step]
    found = monitor.metrics(reset=True)
    assert [found[name]["max_vio_step"] for name in model] == [1.0, 2.0]  # 2 of 4 tokens; fair is 1, or 2/3
    assert (found["small"]["max_vio"], found["small"]["load"]) == ((3 + 3 + 3 + 1) / 4, [4, 3, 1, 0])
    assert monitor.steps() == {"steps": 0, "sinkhorn_steps": 0}
    assert monitor.metrics()["small"]["max_vio_step"] is None


def test_steps_of_evaluation_are_apart_and_a_reset_forgets_a_step_that_has_begun():
    router = make(top_k=1)
    with sinkroute.LoadMonitor(router) as monitor:
        router(wanting(3, 3))
        monitor.reset("train")
        router(wanting(0, 1))
        router.eval()(wanting(2))
        assert monitor.end_step("eval")["router"].tolist() == [0, 0, 1, 0]
        assert monitor.end_step()["router"].tolist() == [1, 1, 0, 0]
        assert monitor.end_step()["router"].tolist() == [0, 0, 0, 0]  # nothing since
    assert monitor.steps()["steps"] == 2
    assert monitor.metrics()["router"]["max_vio_step"] == 0.5  # 1 and, of nothing, 0


def test_a_step_is_a_sinkhorn_step_if_one_layer_had_a_plan():
    model = nn.ModuleDict({"plain": make(), "planned": make("sinkhorn")})
    with sinkroute.LoadMonitor(model) as monitor:
        for step, names in enumerate([("plain",), ("plain", "planned"), ("planned", "planned"), ()]):
            sinkroute.set_step(model, step)
            for name in names:
                model[name](random(6, 4))
            monitor.end_step()
    assert monitor.steps() == {"steps": 4, "sinkhorn_steps": 2}
    assert monitor.metrics()["planned"]["branches"] == {"sinkhorn": 3}


def test_padding_counts_nowhere_however_the_mask_is_given():
    router, mask = make(top_k=1), torch.tensor([True, False, True])
    with sinkroute.LoadMonitor(router) as monitor:
        router(wanting(0, 1, 2), mask)
        router(logits_TE=wanting(0, 1, 2), token_mask=mask)
    metrics = monitor.metrics()["router"]
    assert (metrics["load"], metrics["tokens"], metrics["drop_rate"]) == ([2, 0, 2, 0], 4, 0.0)


def test_a_reset_begins_anew_with_one_mode_or_both():
    model = Model()
    monitor = sinkroute.LoadMonitor(model)
    for training in (True, False):
        model.train(training)(random(4, 8))
    tokens = lambda: [monitor.metrics(mode)["first"]["tokens"] for mode in ("train", "eval")]  # noqa: E731
    assert monitor.metrics("eval", reset=True)["first"]["tokens"] == 4 and tokens() == [4, 0]
    model(random(4, 8))
    monitor.reset("train")
    assert tokens() == [0, 4]
    model.train()(random(4, 8))
    monitor.reset()
    assert tokens() == [0, 0]
    assert monitor.metrics()["second"]["plan_error_max"] is None


def test_windows_of_a_run_add_up_to_it():
    routers = [make(), make()]
    whole, windowed = map(sinkroute.LoadMonitor, routers)
    windows = []
    for step in range(6):
        for router in routers:
            router(random(5, 4, seed=step))
        if step % 2:
            windows.append(windowed.metrics(reset=True)["router"])
    assert [window["passes"] for window in windows] == [2, 2, 2]
    total = whole.metrics()["router"]
    assert np.sum([window["load"] for window in windows], axis=0).tolist() == total["load"]
    assert np.mean([window["max_vio"] for window in windows]) == pytest.approx(total["max_vio"])


# -- leaving no trace ------------------------------------------------------------------------------------------------


def test_watching_changes_no_output_gradient_or_state():
    plain, watched = Model(), Model()
    with sinkroute.LoadMonitor(watched, "detailed"):
        keys = list(watched.state_dict())
        outputs = []
        for model in (plain, watched):
            torch.manual_seed(1)
            outputs.append(model(random(10, 8)))
            (outputs[-1].sum() + model.first.routes.aux_loss).backward()
    assert torch.equal(*outputs)
    for mine, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    assert keys == list(plain.state_dict())


@both_tiers
def test_no_hook_is_left_behind(tier):
    model = Model()
    with sinkroute.LoadMonitor(model, tier):
        assert hooks(model) == 4  # two routers, each in two dictionaries
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="d_model"), sinkroute.LoadMonitor(model, tier):
        model(random(5, 7))
    assert hooks(model) == 0


def test_attaching_twice_counts_once_and_attaching_again_goes_on():
    router = make()
    monitor = sinkroute.LoadMonitor(router).attach()
    with monitor:
        router(random(5, 4))
    monitor.remove()
    router(random(5, 4))
    assert monitor.metrics()["router"]["passes"] == 1
    monitor.attach()
    router(random(5, 4))
    assert monitor.metrics()["router"]["passes"] == 2


def test_two_monitors_do_not_see_each_other():
    router = make()
    first, second = sinkroute.LoadMonitor(router), sinkroute.LoadMonitor(router, "detailed")
    first.remove()
    router(random(5, 4))
    assert [monitor.metrics()["router"]["passes"] for monitor in (first, second)] == [0, 1]


def test_no_graph_is_kept():
    router = Fixed(4, 1)
    released = []

    class Source(torch.autograd.Function):
        """The identity, whose node of the graph tells when it goes."""

        @staticmethod
        def forward(ctx, x):
            weakref.finalize(ctx, released.append, True)
            return x.clone()

    loss = Source.apply(torch.tensor(1.0, requires_grad=True))
    router.choice = Routes(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), aux_loss=loss, plan_error=loss)
    monitor = sinkroute.LoadMonitor(router, "detailed")
    router(torch.zeros(3, 4))
    del loss, router.choice
    router._auxiliary.forget()
    gc.collect()
    assert released and monitor.metrics()["router"]["aux_loss"] == 1.0


def test_a_copy_of_the_model_is_not_counted_and_can_be_watched_itself():
    model = Model()
    monitor = sinkroute.LoadMonitor(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        for hook in other.first.router._forward_hooks.values():
            assert hook(None, None, None, None) is None  # it does not even look
        other(random(5, 8))
        with sinkroute.LoadMonitor(other) as own:
            other(random(6, 8))
        assert own.metrics()["first"]["tokens"] == 6
    assert monitor.metrics()["first"]["tokens"] == 0
    model(random(7, 8))
    assert monitor.metrics()["first"]["tokens"] == 7


@both_tiers
@pytest.mark.parametrize("branch", ["softmax", "sinkhorn"])
def test_hooks_wait_for_no_device(branch, tier):
    # On the meta device there are no values: whoever asks for one gets an error.
    router, meta = Fixed(4, 2), {"device": "meta"}
    experts_TK, chosen_TK = torch.empty(5, 3, dtype=torch.int64, **meta), torch.empty(5, 3, dtype=torch.bool, **meta)
    plan = {"plan_error": torch.empty((), **meta), "plan_passes": torch.empty((), dtype=torch.int64, **meta)}
    loss = torch.empty((), **meta)
    router.choice = Routes(
        experts_TK, torch.empty(5, 3, **meta), branch=branch, chosen=chosen_TK, aux_loss=loss, **plan
    )
    monitor = sinkroute.LoadMonitor(router, tier)
    router(torch.empty(5, 4, **meta), torch.empty(5, dtype=torch.bool, **meta))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        monitor.metrics()


def test_inference_mode_and_others_may_alternate():
    router = make().eval()
    monitor = sinkroute.LoadMonitor(router)  # counts lie on the CPU until they meet another device
    for device in ("cpu", "meta"):
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                router(torch.zeros(5, 4, device=device))
            if device == "cpu":
                with torch.inference_mode(not inference):
                    assert monitor.metrics("eval", reset=True)["router"]["passes"] == 1


# -- names -----------------------------------------------------------------------------------------------------------


class InOnePlace(Fixed):
    """Counts into the same memory in each pass, as a CUDA graph does."""

    def count(self, experts_TK, chosen_TK):
        self.place_E = getattr(self, "place_E", torch.zeros(4, dtype=torch.int64))
        return self.place_E.copy_(super().count(experts_TK, chosen_TK))


def test_a_load_whose_memory_the_next_pass_uses_again_has_been_counted():
    router = InOnePlace(4, 2)
    with sinkroute.LoadMonitor(router) as monitor:
        for experts in ([0, 1], [2, 3]):
            router.choice = Routes(torch.tensor([experts]), torch.ones(1, 2))
            router(random(1, 4))
    assert monitor.metrics()["router"]["load"] == [1, 1, 1, 1]
    assert monitor.end_step()["router"].tolist() == [1, 1, 1, 1]


def test_steps_go_on_where_a_model_moves_to_another_device_between_two():
    router = make()
    with sinkroute.LoadMonitor(router) as monitor:
        router(random(3, 4))
        monitor.end_step()
        router.to("meta")(random(3, 4).to("meta"))
        assert monitor.end_step()["router"].device.type == "meta"


def test_layers_are_named_by_the_path_of_their_router():
    assert sinkroute.LoadMonitor(Model()).layers == ["first", "second"]
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(make()), Model()])
    model.gating = make()
    assert sinkroute.LoadMonitor(model).layers == ["blocks.0.0", "blocks.1.first", "blocks.1.second", "gating"]
    assert sinkroute.LoadMonitor(make()).layers == ["router"]
    nested = nn.Sequential(make())
    nested[0].router = make()
    assert sinkroute.LoadMonitor(nested).layers == ["0", "0.router"]


def test_wrappers_do_not_change_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(Model()), torch.compile(Model(), backend="eager"))
    assert any("_checkpoint_wrapped" in name for name, part in model.named_modules() if isinstance(part, Router))
    expected = ["0.first", "0.second", "1.first", "1.second"]
    assert sinkroute.LoadMonitor(torch.compile(model, backend="eager")).layers == expected


def test_a_model_without_routers_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"^model Linear holds no sinkroute router.*sinkroute\.create_router"):
        sinkroute.LoadMonitor(nn.Linear(2, 2))


def test_unknown_tiers_and_modes_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown tier 'detail'; did you mean 'detailed'"):
        sinkroute.LoadMonitor(make(), "detail")
    monitor = sinkroute.LoadMonitor(make())
    for ask in (monitor.metrics, monitor.reset, monitor.table):
        with pytest.raises(ValueError, match="unknown mode 'training'; did you mean 'train'"):
            ask("training")


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_tiers
@torch.no_grad()
def test_compiled_evaluation_counts_in_one_graph(fresh_compiler, tier):
    model, graphs = Model().eval(), []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    with sinkroute.LoadMonitor(model, tier) as eager:
        model(random(9, 8))
        expected = eager.metrics("eval")
    monitor = sinkroute.LoadMonitor(model, tier)
    for _ in range(4):
        compiled(random(9, 8))
        assert monitor.metrics("eval", reset=True) == expected
    assert len(graphs) == 1


def test_compiled_training_counts_and_sees_repetitions(fresh_compiler):
    layer = sinkroute.MoE(8, 8, 4, 2, router="softmax")
    monitor = sinkroute.LoadMonitor(layer)
    compiled = torch.compile(layer, backend="eager")
    for _ in range(3):
        compiled(random(9, 8)).sum().backward()
    assert monitor.metrics(reset=True)["router"]["passes"] == 3
    checkpoint(compiled, random(9, 8).requires_grad_(), use_reentrant=False).sum().backward()
    assert monitor.metrics()["router"]["passes"] == 1


@torch.no_grad()
def test_what_was_compiled_before_does_not_know_the_hooks_until_the_compiler_is_reset(fresh_compiler):
    # Not what one would wish, but what the documentation says.
    layer = sinkroute.MoE(8, 8, 4, 2, router="softmax").eval()
    compiled = torch.compile(layer, backend="eager")
    compiled(random(9, 8))
    monitor = sinkroute.LoadMonitor(layer)
    compiled(random(9, 8))
    assert monitor.metrics("eval")["router"]["passes"] == 0
    torch.compiler.reset()
    compiled(random(9, 8))
    assert monitor.metrics("eval")["router"]["passes"] == 1


# -- a fixed batch ---------------------------------------------------------------------------------------------------


def test_a_probe_tells_where_the_real_tokens_go_when_serving():
    model, x, mask = Model(), random(2, 5, 8), torch.arange(10).view(2, 5) % 3 != 0
    model.drop.p = 1.0
    snapshot = sinkroute.LoadMonitor(model).probe(x, token_mask=mask)
    with torch.no_grad():
        model.eval()(x, mask)
    for layer, experts_TK in snapshot.items():
        assert torch.equal(experts_TK, getattr(model, layer).routes.experts[mask.flatten()])


def test_a_probe_is_counted_nowhere_and_leaves_modes_and_hooks_as_they_were():
    model = Model()
    model.second.eval()
    monitor = sinkroute.LoadMonitor(model)
    modes, attached = [module.training for module in model.modules()], hooks(model)
    monitor.probe(random(5, 8))
    with pytest.raises(ValueError, match="d_model"):
        monitor.probe(random(5, 7))
    assert [module.training for module in model.modules()] == modes and hooks(model) == attached
    assert all(monitor.metrics(mode)[layer]["passes"] == 0 for mode in ("train", "eval") for layer in monitor.layers)
    model(random(5, 8))
    assert monitor.metrics("train")["first"]["passes"] == monitor.metrics("eval")["second"]["passes"] == 1


def test_two_probes_tell_how_far_routes_have_moved():
    gate = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(gate, make(top_k=1))
    x = torch.eye(4)
    monitor = sinkroute.LoadMonitor(model)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(4))
        before = monitor.probe(x)["1"]
        gate.weight.copy_(torch.eye(4)[[1, 0, 2, 3]])  # the first two tokens change places
        after = monitor.probe(x)["1"]
    assert before.tolist() == [[0], [1], [2], [3]] and after.tolist() == [[1], [0], [2], [3]]
    assert routing_fluctuation(before, after) == 0.5 and saturation(before, after) == 0.5


def test_a_probe_of_a_router_called_twice_holds_both_calls_and_of_none_is_empty():
    router = make()
    model = nn.ModuleDict({"a": router, "idle": nn.ModuleDict({"router": make()})})
    model.forward = lambda x: [router(x), router(-x)]
    snapshot = sinkroute.LoadMonitor(model).probe(random(5, 4))
    assert snapshot["a"].shape == (10, 2) and snapshot["idle"].numel() == 0


@torch.no_grad()
def test_a_compiled_model_can_be_probed(fresh_compiler):
    model = Model().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(random(5, 8))
    expected = model.first.routes.experts
    monitor = sinkroute.LoadMonitor(compiled)
    assert torch.equal(monitor.probe(random(5, 8))["first"], expected)


# -- outputs ---------------------------------------------------------------------------------------------------------


@both_tiers
def test_each_write_is_a_line_of_json_with_the_metrics(tmp_path, tier):
    model, path = Model(), tmp_path / "load.jsonl"
    monitor = sinkroute.LoadMonitor(model, tier)
    expected = []
    for step in (10, np.int64(20)):
        model(random(5, 8))
        expected.append({"step": int(step), "mode": "train", "layers": monitor.metrics()})
        expected[-1]["step_ends"] = {"steps": 0, "collectives": 0.0, "messages": 0.0, "bytes": 0.0}
        monitor.write(path, step, reset=True)
    monitor.write(path, 20, mode="eval")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == expected and expected[1]["layers"]["first"]["passes"] == 1
    assert (lines[2]["mode"], lines[2]["layers"]["first"]["passes"]) == ("eval", 0)


def test_what_json_cannot_say_is_null(tmp_path):
    router = Fixed(4, 1)
    router.choice = Routes(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), aux_loss=torch.tensor(math.nan))
    with sinkroute.LoadMonitor(router) as monitor:
        router(torch.zeros(3, 4))
    monitor.write(tmp_path / "load.jsonl", 0)
    assert math.isnan(monitor.metrics()["router"]["aux_loss"])
    assert json.loads((tmp_path / "load.jsonl").read_text())["layers"]["router"]["aux_loss"] is None


def test_a_step_that_is_no_integer_is_refused_before_anything_is_read(tmp_path):
    router = make()
    monitor = sinkroute.LoadMonitor(router)
    router(random(5, 4))
    with pytest.raises(TypeError):
        monitor.write(tmp_path / "load.jsonl", 1.5, reset=True)
    assert monitor.metrics()["router"]["passes"] == 1 and not list(tmp_path.iterdir())


def test_pandas_gets_a_row_per_layer_and_a_column_per_metric():
    model = Model()
    with sinkroute.LoadMonitor(model) as monitor:
        model(random(5, 8))
    frame, metrics = monitor.to_pandas(), monitor.metrics()
    assert list(frame.index) == ["first", "second"] and frame.index.name == "layer"
    assert list(frame.columns) == list(metrics["first"])
    assert frame.loc["second", "plan_error"] == metrics["second"]["plan_error"]
    assert np.isnan(frame.loc["first", "plan_error"]) and frame["tokens"].tolist() == [5, 5]


def test_without_pandas_the_message_tells_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        sinkroute.LoadMonitor(make()).to_pandas()


def test_the_table_has_a_line_per_layer_and_a_dash_for_nothing():
    model = Model()
    with sinkroute.LoadMonitor(model) as monitor:
        model(random(5, 8))
    head, first, second = (line.split() for line in monitor.table().splitlines())
    assert head[:3] == ["layer", "tokens", "passes"] and head[-1] == "sinkhorn_share"
    assert (first[0], first[1], first[-1]) == ("first", "5", "0.000") and second[-1] == "1.000"
    assert monitor.table("eval").splitlines()[1].split()[-1] == "-"
    assert len({len(line) for line in monitor.table().splitlines()}) == 1


# -- ranks -----------------------------------------------------------------------------------------------------------

WORLD = 2


def feed(rank, step):
    """What a rank sees at a step: rank 1 has fewer tokens, and none at all at step 1."""
    tokens = 12 if rank == 0 else (5, 0, 7)[step]
    return random(tokens, 4, seed=10 * rank + step)


def watched_on_rank():
    """Collective calls in the hooks and in all; metrics of this rank and of both; what was written and shown; DDP."""
    calls = collections.Counter()

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "reduce"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    rank = dist.get_rank()
    model = nn.ModuleList([make("ssr-s", probability=1.0, noise=0), make(top_k=1)])
    monitor = sinkroute.LoadMonitor(model, "detailed")
    for step in range(3):
        for router in model:
            router(feed(rank, step))
    in_hooks = dict(calls)
    alone, together = monitor.metrics(), monitor.metrics(process_group="world")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "load.jsonl"
        monitor.write(path, 3, reset=True, process_group=dist.group.WORLD)
        written = path.read_text() if path.exists() else None
    table = monitor.table(process_group="world")
    asked = dict(calls)
    layer = nn.parallel.DistributedDataParallel(nn.Sequential(sinkroute.MoE(4, 4, 4, 2, router="softmax")))
    watched = sinkroute.LoadMonitor(layer)
    layer(feed(rank, 0)).sum().backward()
    wrapped = watched.metrics(process_group="world")
    calls.clear()
    step = watched.end_step(process_group="world")["0"].tolist()
    return in_hooks, asked, alone, together, written, table, wrapped, step, dict(calls)


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks(watched_on_rank, WORLD)


def test_metrics_over_ranks_are_those_of_one_process_that_saw_all_passes(ranks):
    first, second = ranks
    model = nn.ModuleList([make("ssr-s", probability=1.0, noise=0), make(top_k=1)])
    with sinkroute.LoadMonitor(model, "detailed") as monitor:
        for rank in range(WORLD):
            for step in range(3):
                for router in model:
                    router(feed(rank, step))
    expected = monitor.metrics()
    assert first[3] == second[3]
    for layer, values in expected.items():
        assert first[3][layer] == {name: near(value, rel=1e-12) for name, value in values.items()}
    assert expected["0"]["passes"] == 5 and first[2]["0"]["passes"] == 3 and second[2]["0"]["passes"] == 2


def test_ranks_talk_when_they_are_asked_and_once_for_all_layers(ranks):
    for in_hooks, asked, *_ in ranks:
        assert in_hooks == {}
        assert asked == {"all_gather": 4}  # whether they watch the same, once; metrics, write, table


def test_the_first_rank_writes_for_all(ranks):
    (first, second) = ranks
    (line,) = first[4].splitlines()
    assert json.loads(line)["layers"] == first[3] and second[4] is None
    assert first[5] == second[5] and first[5].splitlines()[1].split()[:3] == ["0", "0", "0"]


def test_a_model_in_distributed_data_parallel_keeps_its_names_and_counts(ranks):
    for result in ranks:
        assert list(result[6]) == ["0"]
        assert (result[6]["0"]["tokens"], result[6]["0"]["passes"]) == (17, 2)


def test_the_load_of_a_step_is_that_of_all_ranks_by_one_call(ranks):
    for result in ranks:
        assert result[7] == result[6]["0"]["load"] and sum(result[7]) == 2 * 17
        assert result[8]["all_reduce"] == 1


def test_a_monitor_made_in_inference_mode_watches_training_too():
    layer = sinkroute.MoE(8, 8, 4, 2, router="softmax")
    with torch.inference_mode():
        monitor = sinkroute.LoadMonitor(layer)
    layer(torch.randn(5, 8)).sum().backward()
    [found] = monitor.metrics().values()
    assert sum(found["load"]) == 10


def test_a_probe_of_a_layer_that_is_not_reached_is_empty_on_the_cpu_whatever_the_default_device_is():
    model = nn.ModuleDict({"used": make(), "idle": make()})
    model.forward = lambda logits_TE: model["used"](logits_TE)
    with sinkroute.LoadMonitor(model) as monitor:
        logits_TE = feed(0, 0)
        with torch.device("meta"):
            found = monitor.probe(logits_TE)
    assert found["idle"].shape == (0, 0) and found["idle"].device.type == "cpu"
