"""What one rank refuses, all ranks refuse: nobody is left waiting in a collective call."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sinkroute

E, K = 4, 2
PLAN = {"process_group": "world"}
SSR = {**PLAN, "probability": 1.0}
TALKING = {
    "sinkhorn": PLAN,
    "ssr-l": SSR,
    "ssr-s": {**SSR, "losses": "global-load-balance"},
    "ssr-b": SSR,
    "ssr-ec": SSR,
    "ssr-bias": SSR,
    "ssr-fold": SSR,
    "global-load-balance": {},
    "loss-free": {"losses": "global-load-balance"},
    "sinkhorn and a loss": {**PLAN, "losses": "global-load-balance"},
}


def make(name):
    return sinkroute.create_router(name.split()[0], num_experts=E, top_k=K, **TALKING[name])


def good():
    return torch.randn(6, E, generator=torch.Generator().manual_seed(dist.get_rank()))


def bad_values():
    logits_TE = good()
    logits_TE[3, 1] = float("nan")
    return logits_TE


BAD = {
    "values": bad_values,
    "infinities": lambda: good().index_fill(0, torch.tensor([2]), -float("inf")),
    "shape": lambda: good()[:, :3],
    "dtype": lambda: good().long(),
    "type": lambda: good().tolist(),
}


def said(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def refused_by_rank_1():
    """{(router, what is wrong): what the rank said}, and then that all can go on."""
    found, rank = {}, dist.get_rank()
    for name in TALKING:
        router = make(name)
        for step, (what, bad) in enumerate(BAD.items()):
            sinkroute.set_step(router, step)
            logits_TE = bad() if rank == 1 else good()
            found[f"{name}: {what}"] = said(lambda router=router, logits_TE=logits_TE: router(logits_TE))
        assert router(good()).load.sum() > 0
    return found


MASKS = {
    "mask of numbers": lambda: torch.ones(6),
    "mask of another shape": lambda: torch.ones(5, dtype=torch.bool),
    "mask that is a list": lambda: [True] * 6,
}
DRAWS = 30


def drawn(seed=0):
    """A router, what is wrong, and on which rank; or nothing is wrong."""
    draw = random.Random(seed)
    for _ in range(DRAWS):
        yield draw.choice([*TALKING]), draw.choice([*BAD, *MASKS, "nothing"]), draw.choice([0, 1])


def refused_at_random():
    """What the rank said of each draw; after each the ranks go on together."""
    routers, found = {name: make(name) for name in TALKING}, []
    for step, (name, what, where) in enumerate(drawn()):
        router, here = routers[name], dist.get_rank() == where
        sinkroute.set_step(router, step)
        logits_TE = BAD[what]() if here and what in BAD else good()
        mask = MASKS[what]() if here and what in MASKS else None
        found.append(said(lambda router=router, x=logits_TE, mask=mask: router(x, mask)))
        sinkroute.set_step(router, step, 1)
        assert router(good()).load.sum() > 0
    return found


def refused_by_all():
    found = {}
    for name in TALKING:
        router = make(name)
        sinkroute.set_step(router, 0)
        found[name] = said(lambda router=router: router(bad_values()))
        assert router(good()).load.sum() > 0
    return found


def refused_when_serving():
    router = sinkroute.create_router("ssr-l", num_experts=E, top_k=K, inference="sinkhorn", **SSR).eval()
    return said(lambda: router(bad_values() if dist.get_rank() == 1 else good()))


def refused_where_nobody_talks():
    """Serving, steps without a plan, and plans of one rank: the others go on."""
    found = []
    for name, options in (("ssr-l", {**PLAN, "probability": 0.0}), ("ssr-l", {"probability": 1.0}), ("sinkhorn", {})):
        router = sinkroute.create_router(name, num_experts=E, top_k=K, **options)
        found.append(said(lambda router=router: router(bad_values() if dist.get_rank() == 1 else good())))
    router = make("global-load-balance").eval()
    found.append(said(lambda: router(bad_values() if dist.get_rank() == 1 else good())))
    return found


def refused_in_a_layer():
    layer = sinkroute.MoE(8, 8, E, K, "sinkhorn", router_options=PLAN)
    wide = sinkroute.MultiHeadMoE(8, 2, 8, E, K, "global-load-balance")
    by_id = sinkroute.MoE(8, 8, E, K, "hash", router_options={"losses": "global-load-balance"})
    ids = torch.arange(5).float() if dist.get_rank() == 1 else None
    x = torch.randn(5, 7 if dist.get_rank() == 1 else 8)
    return [
        said(lambda: layer(x)),
        said(lambda: wide(x)),
        said(lambda: layer(torch.randn(5, 8), token_ids=ids)),
        said(lambda: wide(torch.randn(5, 8), token_ids=ids)),
        said(lambda: by_id(torch.randn(5, 8), token_ids=None if dist.get_rank() == 1 else torch.arange(5))),
    ]


def other_routers():
    """On rank 1 the second layer remembers something else."""
    second = "loss-free" if dist.get_rank() == 0 else "quantile"
    model = nn.ModuleList(sinkroute.create_router(name, num_experts=E, top_k=K) for name in ("loss-free", second))
    sinkroute.set_step(model, 0)
    for router in model:
        router(good())
    return said(lambda: sinkroute.end_step(model))


def other_monitors():
    model = nn.ModuleList(make("global-load-balance") for _ in range(1 + dist.get_rank()))
    monitor = sinkroute.LoadMonitor(model)
    return [said(lambda: monitor.metrics(process_group="world")), said(lambda: monitor.metrics())]


def on_a_rank():
    return {
        "by one": refused_by_rank_1(),
        "at random": refused_at_random(),
        "by all": refused_by_all(),
        "serving": refused_when_serving(),
        "alone": refused_where_nobody_talks(),
        "layer": refused_in_a_layer(),
        "routers": other_routers(),
        "monitors": other_monitors(),
    }


@pytest.fixture(scope="module")
def results(run_ranks):
    return run_ranks(on_a_rank, 2)


OWN = {
    "values": r"logits_TE[3, 1] is nan",
    "infinities": r"logits_TE[2, 0] is -inf",
    "shape": "logits_TE must have shape (tokens, num_experts=4), got (6, 3)",
    "dtype": "logits_TE must be a float tensor, got torch.int64",
    "type": "logits_TE must be a float tensor, got list",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", TALKING)
def test_what_one_rank_refuses_the_other_refuses_too_and_says_whose_error_it_is(results, name, what):
    other, own = (result["by one"][f"{name}: {what}"] for result in results)
    assert own.startswith(OWN[what])
    assert other.startswith("another rank refused its ") and f": {own[:200]}" in other and "rank 1 says" in other


def test_whatever_is_wrong_on_whatever_rank_both_refuse_it_or_neither(results):
    for place, (_, what, where) in enumerate(drawn()):
        own, other = (results[rank]["at random"][place] for rank in (where, 1 - where))
        if what == "nothing":
            assert own == other == ""
        else:
            assert "must" in own or "is nan" in own or "is -inf" in own
            assert (
                other.startswith("another rank refused its ") and f"rank {where} says" in other and own[:200] in other
            )


@pytest.mark.parametrize("name", TALKING)
def test_what_all_ranks_refuse_each_of_them_tells_by_its_own_error(results, name):
    assert all(result["by all"][name].startswith(OWN["values"]) for result in results)


def test_plans_when_serving_are_refused_together(results):
    other, own = (result["serving"] for result in results)
    assert own.startswith(OWN["values"]) and other.startswith("another rank refused its ")


def test_where_ranks_do_not_talk_a_refusal_is_one_ranks_own(results):
    other, own = (result["alone"] for result in results)
    assert other == [""] * 4 and all(text.startswith(OWN["values"]) for text in own)


def test_what_a_layer_refuses_the_other_ranks_refuse_too(results):
    other, own = (result["layer"] for result in results)
    assert all("must" in text or "token_ids=" in text for text in own)
    assert all(text.startswith("another rank refused its ") for text in other)


def test_ranks_with_other_routers_refuse_to_end_a_step(results):
    for result in results:
        assert "must hold the same routers" in result["routers"]
        assert result["routers"].endswith("got 2 with 8 numbers on rank 0, 2 with 13 numbers on rank 1")


def test_ranks_with_other_layers_refuse_to_add_up_metrics(results):
    for result in results:
        assert "process_group must watch the same layers" in result["monitors"][0] and result["monitors"][1] == ""
