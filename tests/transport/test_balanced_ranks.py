"""Balanced top-k over ranks: loads and bias of all tokens, as in one process that holds them."""

import functools

import pytest
import torch
import torch.distributed as dist

from sinkroute.transport import balanced_topk, over_ranks
from sinkroute.transport.loads import bounds

TOKENS, E, K = 600, 8, 2
# Where ranks begin and end, as shares of the tokens; what one process is given, too.
EVEN = {2: [0, 0.5, 1], 4: [0, 0.25, 0.5, 0.75, 1]}
CASES = {
    "even": (EVEN, {}),
    "uneven": ({2: [0, 0.1, 1], 4: [0, 0.07, 0.3, 0.8, 1]}, {}),
    "an empty rank": ({2: [0, 0, 1], 4: [0, 0.4, 0.4, 1, 1]}, {}),
    "ranks of one token": ({2: [0, 1 / 600, 1], 4: [0, 1 / 600, 2 / 600, 3 / 600, 1]}, {}),
    "a masked rank": (EVEN, {"token_mask": torch.arange(TOKENS) < 280}),
    "scattered padding": (EVEN, {"token_mask": torch.arange(TOKENS) % 7 > 2}),
    "no real token": (EVEN, {"token_mask": torch.zeros(TOKENS, dtype=torch.bool)}),
    "few tokens": (EVEN, {"tokens": 21}),
    "fewer tokens than experts": (EVEN, {"tokens": 5}),
    "no tokens": (EVEN, {"tokens": 0}),
    "masses": (EVEN, {"expert_mass": [1.0, 0.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0]}),
    "softmax": (EVEN, {"cost": "softmax"}),
    "exact": (EVEN, {"tol": 0}),
    "slack": (EVEN, {"tol": 0.2}),
    "one": (EVEN, {"k": 1}),
    "all experts": (EVEN, {"k": E}),
    "a start": (EVEN, {"init": torch.arange(E) / 4}),
    "a start far off": (EVEN, {"init": torch.arange(E) * 1e7}),
    "float64": (EVEN, {"dtype": torch.float64}),
    "bfloat16": (EVEN, {"dtype": torch.bfloat16}),
    "forbidden": (EVEN, {"forbidden": 0.3}),
    # Tokens of the last half may have experts 0 to 3 only: their ranks cannot keep what is asked of them.
    "forbidden to ranks": (EVEN, {"forbidden": "half"}),
    "ties": (EVEN, {"digits": 0}),
    "all alike": (EVEN, {"alike": True}),
}
SHIFTED = {"16, top-2": (16, 2), "64, top-8": (64, 8), "256, top-8": (256, 8)}
# What one rank refuses by itself: how it differs from arguments that are right.
REFUSED = {
    "no logits": lambda logits_TE: {"logits_TE": None},
    "integers": lambda logits_TE: {"logits_TE": logits_TE.long()},
    "a batch": lambda logits_TE: {"logits_TE": logits_TE[None]},
    "no experts": lambda logits_TE: {"logits_TE": logits_TE[:, :0]},
    "no numbers": lambda logits_TE: {"logits_TE": logits_TE.to("meta")},
    "NaN": lambda logits_TE: {"logits_TE": logits_TE * torch.nan},
    "too much forbidden": lambda logits_TE: {"logits_TE": logits_TE.where(torch.arange(E) < K - 1, -torch.inf)},
    "no k": lambda logits_TE: {"k": 0},
    "no tolerance": lambda logits_TE: {"tol": -1.0},
    "a mask of another size": lambda logits_TE: {"token_mask": torch.ones(1, dtype=torch.bool)},
    "too large a mass": lambda logits_TE: {"expert_mass": [1.0] + [0.01] * (E - 1)},
    "a start of another size": lambda logits_TE: {"init": torch.zeros(1)},
    "another cost": lambda logits_TE: {"cost": "squared"},
}
DISAGREED = {
    "k": {"k": K + 1},
    "tol": {"tol": 0.02},
    "cost": {"cost": "softmax"},
    "the number of experts": {"logits_TE": torch.zeros(40, E + 1)},
    "expert_mass": {"expert_mass": torch.arange(1.0, E + 1)},
    "init": {"init": torch.zeros(E)},
    "the dtype's bits": {"logits_TE": torch.zeros(40, E, dtype=torch.float64)},
}


def whole(case):
    """Logits of all ranks, k, and what else `balanced_topk` is given."""
    options = dict(CASES[case][1])
    tokens, k, dtype = options.pop("tokens", TOKENS), options.pop("k", K), options.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(tokens, E, generator=generator) + 2 * torch.randn(E, generator=generator)
    logits_TE[tokens // 2 :] += 2 * torch.randn(E, generator=generator)  # another domain
    logits_TE = logits_TE.round(decimals=options.pop("digits", 7))
    if options.pop("alike", False):
        logits_TE = logits_TE[:1].expand(tokens, E)
    forbidden = options.pop("forbidden", 0)
    if forbidden == "half":
        logits_TE[tokens // 2 :, E // 2 :] = -torch.inf
    elif forbidden:
        logits_TE = logits_TE.masked_fill(torch.rand(tokens, E, generator=generator) < forbidden, -torch.inf)
        logits_TE[:, :K] = logits_TE[:, :K].nan_to_num(neginf=-1)
    return logits_TE.to(dtype), k, options


def rows_of(case, tokens, rank, world):
    first, last = (round(tokens * CASES[case][0][world][at]) for at in (rank, rank + 1))
    return slice(first, last)


@functools.cache
def shifted(experts, rank, seed=0, tokens=4096):
    """Logits of a rank whose domain wants other experts than that of the next."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    alike = torch.Generator().manual_seed(1000 * seed + 999)
    domain_E = torch.randn(experts, generator=alike) + 1.5 * torch.randn(experts, generator=generator)
    return torch.randn(tokens, experts, generator=generator) + domain_E


class counted:
    """Counts what is gathered."""

    def __enter__(self):
        self.messages, self.numbers, self.original = 0, [], dist.all_gather
        dist.all_gather = self.gather
        return self

    def gather(self, parts, x, **options):
        self.messages += 1
        self.numbers.append(x.numel())
        return self.original(parts, x, **options)

    def __exit__(self, *_):
        dist.all_gather = self.original


def on_a_rank():
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    results = {"cases": {}, "refused": {}, "disagreed": {}, "shifted": {}}
    for case in CASES:
        logits_TE, k, options = whole(case)
        part = rows_of(case, len(logits_TE), rank, world)
        if "token_mask" in options:
            options["token_mask"] = options["token_mask"][part]
        with counted() as sent:
            found = balanced_topk(logits_TE[part], k, process_group=group, **options)
        results["cases"][case] = (*found, sent.messages, sent.numbers)
    right = {"logits_TE": torch.randn(40, E), "k": K, "process_group": group}
    for case, change in REFUSED.items():
        try:
            balanced_topk(**right | (change(right["logits_TE"]) if rank else {}))
        except (TypeError, ValueError) as error:
            results["refused"][case] = str(error)
    for case, change in DISAGREED.items():
        try:
            balanced_topk(**right | (change if rank else {}))
        except ValueError as error:
            results["disagreed"][case] = str(error)
    impossible_TE = torch.zeros(40, E)
    impossible_TE[:, K:] = -torch.inf
    try:
        balanced_topk(**right | {"logits_TE": impossible_TE if rank else torch.zeros(40, E)})
    except ValueError as error:
        results["impossible"] = str(error)
    for name, (experts, k) in SHIFTED.items() if world == 4 else ():
        with counted() as sent:
            found = balanced_topk(shifted(experts, rank), k, process_group=group)
        again = balanced_topk(shifted(experts, rank), k, process_group=group, init=found.bias)
        results["shifted"][name] = (*found, sent.messages, again.passes)
    return results


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(run_ranks, request):
    return run_ranks(on_a_rank, request.param)


def cost_of(logits_TE, options):
    return logits_TE.double().softmax(1) if options.get("cost") == "softmax" else logits_TE.double()


def loads_of(experts_TK, mask_T=None, experts=E):
    return (experts_TK if mask_T is None else experts_TK[mask_T]).flatten().bincount(minlength=experts)


@pytest.mark.parametrize("case", CASES)
def test_loads_are_balanced_over_all_ranks_with_the_score_of_one_process(results, case):
    logits_TE, k, options = whole(case)
    mask_T = options.get("token_mask")
    experts_TK = torch.cat([result["cases"][case][0] for result in results])
    assert experts_TK.shape == (len(logits_TE), k) and experts_TK.dtype == torch.int64
    assert (experts_TK.sort(dim=1).values.diff(dim=1) > 0).all()
    real = len(logits_TE) if mask_T is None else int(mask_T.sum())
    mass_E = torch.tensor(options.get("expert_mass", [1.0] * E)).double()
    lower_E, upper_E = bounds(k * real * mass_E / mass_E.sum(), options.get("tol", 0.01))
    loads_E = loads_of(experts_TK, mask_T)
    assert (lower_E <= loads_E).all() and (loads_E <= upper_E).all()
    if not real:
        return
    cost_TE = cost_of(logits_TE, options)
    real_T = slice(None) if mask_T is None else mask_T
    score = cost_TE.gather(1, experts_TK)[real_T].sum()
    alone_TK, _ = balanced_topk(logits_TE, k, **options)
    best = cost_TE.topk(k, dim=1).values[real_T].sum()
    lost, lost_alone = best - score, best - cost_TE.gather(1, alone_TK)[real_T].sum()
    assert lost <= 1.05 * lost_alone + 1e-6 * best.abs()


@pytest.mark.parametrize("case", CASES)
def test_the_bias_is_the_same_on_all_ranks_to_the_bit_and_balances_all_tokens(results, case):
    logits_TE, k, options = whole(case)
    bias_E = results[0]["cases"][case][1]
    assert all(torch.equal(result["cases"][case][1], bias_E) for result in results)
    alone_E = balanced_topk(logits_TE, k, **options).bias
    assert bias_E.dtype == alone_E.dtype and torch.equal(bias_E.isinf(), alone_E.isinf())
    assert bias_E[bias_E.isfinite()].mean().abs() <= 1e-5
    if case in ("even", "uneven", "an empty rank", "ranks of one token", "a masked rank", "masses", "float64"):
        mask_T = options.get("token_mask", torch.ones(len(logits_TE), dtype=torch.bool))
        mass_E = torch.tensor(options.get("expert_mass", [1.0] * E)).double()
        target_E = k * mask_T.sum() * mass_E / mass_E.sum()
        off_E = loads_of((logits_TE.double() + bias_E).topk(k).indices, mask_T) - target_E
        assert (off_E.abs() <= (0.02 * target_E).clamp(min=2)).all()


@pytest.mark.parametrize("case", CASES)
def test_messages_are_as_many_as_is_said(results, case):
    for result in results:
        *_, messages, numbers = result["cases"][case]
        assert messages <= over_ranks.CALLS
        assert numbers == results[0]["cases"][case][-1]
        assert max(numbers) <= max(3 * E, over_ranks.FACTS) or case in FEW_OR_FORBIDDEN


FEW_OR_FORBIDDEN = {"few tokens", "fewer tokens than experts", "forbidden", "forbidden to ranks"}


def test_few_tokens_are_routed_as_in_one_process(results):
    for case in ("few tokens", "fewer tokens than experts"):
        logits_TE, k, options = whole(case)
        experts_TK, bias_E = balanced_topk(logits_TE, k, **options)
        assert torch.equal(torch.cat([result["cases"][case][0] for result in results]), experts_TK)
        assert torch.equal(results[0]["cases"][case][1], bias_E)


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_is_an_error_on_all_at_once(results, case):
    assert "another rank refused its arguments" in results[0]["refused"][case]
    assert all("another rank" not in result["refused"][case] for result in results[1:])


@pytest.mark.parametrize("case", DISAGREED)
def test_what_ranks_must_agree_on_is_refused_on_all_by_name(results, case):
    assert all(result["disagreed"][case].startswith(f"{case} must be the same on all ranks") for result in results)


def test_loads_that_no_choice_has_are_refused_on_all(results):
    assert all("cannot be kept" in result["impossible"] for result in results)


@pytest.mark.parametrize("name", SHIFTED)
def test_ranks_of_other_domains_keep_a_bias_that_balances_all(results, name):
    if len(results) < 4:
        pytest.skip("of four ranks")
    experts, k = SHIFTED[name]
    logits_TE = torch.cat([shifted(experts, rank) for rank in range(4)])
    bias_E = results[0]["shifted"][name][1]
    assert all(torch.equal(result["shifted"][name][1], bias_E) for result in results)
    loads_E = loads_of((logits_TE.double() + bias_E).topk(k).indices, experts=experts).double()
    assert loads_E.max() / loads_E.mean() - 1 <= 0.02
    chosen_TK = torch.cat([result["shifted"][name][0] for result in results])
    loads_E = loads_of(chosen_TK, experts=experts).double()
    assert loads_E.max() / loads_E.mean() - 1 <= 0.01
    best, score = logits_TE.topk(k).values.double().sum(), logits_TE.gather(1, chosen_TK).double().sum()
    alone = logits_TE.gather(1, balanced_topk(logits_TE, k).experts).double().sum()
    assert best - score <= 1.05 * (best - alone)
    messages, passes_again = results[0]["shifted"][name][2:]
    assert messages <= 16 and passes_again <= 3
