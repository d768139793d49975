"""Routers on ranks of other domains: what is chosen together, and what is kept, balances all of them."""

import pytest
import torch
import torch.distributed as dist

import sinkroute

E, K, TOKENS, STEPS = 16, 2, 1024, 3
# What plans of single ranks find is kept for all: the name, and options.
KEPT = {
    "ssr-bias": ("ssr-bias", {"probability": 1.0}),
    "ssr-bias, drawn by layer": ("ssr-bias", {"probability": 1.0, "draw": "layer"}),
    "ssr-bias, over scores": ("ssr-bias", {"probability": 1.0, "bias_on": "scores", "score": "sigmoid"}),
    "ssr-fold": ("ssr-fold", {"probability": 1.0}),
    "ssr-dual": ("ssr-dual", {}),
    "ssr-dual, exact": ("ssr-dual", {"exact": True}),
}
# What chooses for all ranks together.
TOGETHER = {
    "ssr-b": ("ssr-b", {"probability": 1.0, "noise": 0}),
    "ssr-bias": ("ssr-bias", {"probability": 1.0}),
    "ssr-fold": ("ssr-fold", {"probability": 1.0}),
    "ssr-dual, exact": ("ssr-dual", {"exact": True}),
}


def logits_of(rank, part=0):
    """Of one micro-batch. Other ranks have other domains, and not as many tokens."""
    generator = torch.Generator().manual_seed(10 * rank + part)
    domain_E = 1.5 * torch.randn(E, generator=torch.Generator().manual_seed(100 + rank))
    return torch.randn(TOKENS - 100 * rank, E, generator=generator) + domain_E


def parts_of(rank):
    """Ranks have more or fewer micro-batches."""
    return [logits_of(rank, part) for part in range(1 + rank % 2)]


def make(name, **options):
    router = sinkroute.create_router(name, num_experts=E, top_k=K, **options)
    if name == "ssr-fold":
        router.gate = router.make_gate(4)
    return router


def kept(case):
    """The bias that serves after a step."""
    name, options = KEPT[case]
    router = make(name, **options)
    for part, logits_TE in enumerate(parts_of(dist.get_rank())):
        sinkroute.set_step(router, 0, part)
        router(logits_TE)
    sinkroute.end_step(router)
    if name == "ssr-fold":
        return router.gate.bias.detach().clone()
    return router.eval().choice_bias().bias_E.clone()


def together(case):
    """Loads of this rank over some steps, and the bias that is kept, of routers that have one."""
    name, options = TOGETHER[case]
    router, loads = make(name, process_group="world", **options), []
    for step in range(STEPS):
        sinkroute.set_step(router, step)
        loads.append(router(logits_of(dist.get_rank())).load)
    sinkroute.end_step(router)
    return torch.stack(loads), None if router.state is None else router.state.bias_E.clone()


def refusals():
    """What is raised where the last rank has logits that are NaN, and that all go on after that."""
    found, last = {}, dist.get_rank() == dist.get_world_size() - 1
    for case, (name, options) in TOGETHER.items():
        router = make(name, process_group="world", **options)
        sinkroute.set_step(router, 0)
        try:
            router(logits_of(0) * (torch.nan if last else 1))
        except ValueError as error:
            found[case] = str(error)
        router(logits_of(0))
    return found


def without_plans():
    """A rank without tokens in the step of the others' plan, and a step in which no rank has any."""
    router, rank = make("ssr-bias", probability=1.0), dist.get_rank()
    sinkroute.set_step(router, 0)
    router(logits_of(rank)[: 0 if rank == 0 else None])
    sinkroute.set_step(router, 1)
    first_E = router.state.bias_E.clone()
    router(logits_of(rank)[:0])
    sinkroute.end_step(router)
    return first_E, router.state.bias_E.clone()


def on_a_rank():
    return {
        "kept": {case: kept(case) for case in KEPT},
        "together": {case: together(case) for case in TOGETHER},
        "refusals": refusals(),
        "without": without_plans(),
    }


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(run_ranks, request):
    return run_ranks(on_a_rank, request.param)


def max_vio(logits_TE, bias_E, on="logits"):
    values_TE = logits_TE.sigmoid() if on == "scores" else logits_TE
    load_E = (values_TE + bias_E).topk(K).indices.flatten().bincount(minlength=E).double()
    return float(load_E.max() / load_E.mean() - 1)


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_of_ranks_with_other_domains_balances_all_of_them(results, case):
    bias_E = results[0]["kept"][case]
    assert all(torch.equal(result["kept"][case], bias_E) for result in results)
    logits_TE = torch.cat([part for rank in range(len(results)) for part in parts_of(rank)])
    assert max_vio(logits_TE, bias_E, KEPT[case][1].get("bias_on", "logits")) <= 0.02


@pytest.mark.parametrize("case", TOGETHER)
def test_ranks_of_a_group_choose_with_loads_that_are_balanced_together(results, case):
    loads = sum(result["together"][case][0] for result in results).double()
    assert (loads.amax(1) / loads.mean(1) <= 1.01).all()
    mine = results[0]["together"][case][0].double()
    assert (mine.amax(1) / mine.mean(1) > 1.2).all()  # and not each rank by itself


@pytest.mark.parametrize("case", ["ssr-bias", "ssr-dual, exact"])
def test_ranks_of_a_group_keep_what_balances_them(results, case):
    bias_E = results[0]["together"][case][1]
    assert all(torch.equal(result["together"][case][1], bias_E) for result in results)
    assert max_vio(torch.cat([logits_of(rank) for rank in range(len(results))]), bias_E) <= 0.02


@pytest.mark.parametrize("case", TOGETHER)
def test_logits_that_one_rank_refuses_are_an_error_on_all(results, case):
    assert all("another rank" in result["refusals"][case] for result in results[:-1])
    assert "nan" in results[-1]["refusals"][case]


def test_ranks_without_tokens_keep_what_the_others_find_and_nothing_else(results):
    first_E, after_E = results[0]["without"]
    logits_TE = torch.cat([logits_of(rank) for rank in range(1, len(results))])
    assert all(torch.equal(result["without"][0], first_E) for result in results)
    assert max_vio(logits_TE, first_E) <= 0.02
    assert torch.equal(first_E, after_E)
