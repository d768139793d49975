"""Balanced top-k against exact solvers that are not ours, and what must hold for every problem."""

import itertools
import math
import pickle
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array

from sinkroute._errors import NonFiniteLogits
from sinkroute.kernels import native
from sinkroute.transport import search
from sinkroute.transport.balanced import balanced_topk

few = settings(max_examples=40, deadline=None, derandomize=True)
problems = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "experts": st.integers(1, 9),
        "k": st.integers(1, 9),
        "seed": st.integers(0, 2**31),
        "tol": st.sampled_from([0.0, 0.01, 0.3]),
        "cost": st.sampled_from(["linear", "softmax"]),
        # Rounded logits are full of ties.
        "digits": st.sampled_from([0, 1, 7]),
        "spread": st.sampled_from([1.0, 5.0]),
    }
)


@pytest.fixture(params=["kernels", "torch"])
def backend(request, monkeypatch):
    """Both ways of doing the work."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip(native.status())
    return request.param


def draw(problem, dtype=torch.float32):
    generator = torch.Generator().manual_seed(problem["seed"])
    tokens, experts = problem["tokens"], problem["experts"]
    logits_TE = torch.randn(tokens, experts, generator=generator) + 2 * torch.randn(experts, generator=generator)
    logits_TE = (problem["spread"] * logits_TE).round(decimals=problem["digits"])
    return logits_TE.to(dtype), min(problem["k"], experts), generator


def cost_of(logits_TE, cost):
    return logits_TE.double().softmax(1) if cost == "softmax" else logits_TE.double()


def loads_of(experts_TK, experts, mask_T=None):
    rows_TK = experts_TK if mask_T is None else experts_TK[mask_T]
    return torch.bincount(rows_TK.flatten(), minlength=experts)


def check_choice(experts_TK, logits_TE, k, tol, mask_T=None, share_E=None):
    """Every token has k distinct experts; loads are within tol, or the target rounded."""
    tokens, experts = logits_TE.shape
    assert experts_TK.shape == (tokens, k) and experts_TK.dtype == torch.int64
    assert ((experts_TK >= 0) & (experts_TK < experts)).all()
    assert (experts_TK.sort(dim=1).values.diff(dim=1) > 0).all()
    real = tokens if mask_T is None else int(mask_T.sum())
    share_E = torch.full((experts,), 1 / experts, dtype=torch.float64) if share_E is None else share_E
    target_E, loads_E = k * real * share_E, loads_of(experts_TK, experts, mask_T)
    assert (loads_E <= torch.maximum((1 + tol) * target_E, (target_E - 1e-6).ceil()) + 1e-6).all()
    assert (loads_E >= torch.minimum((1 - tol) * target_E, (target_E + 1e-6).floor()) - 1e-6).all()
    return loads_E


def best_sum(cost_TE, k, least_E, most_E):
    """The largest sum of any assignment of k experts to every token with such loads, by HiGHS."""
    tokens, experts = cost_TE.shape
    entry = np.arange(tokens * experts)
    by_token = coo_array((np.ones(len(entry)), (entry // experts, entry)))
    by_expert = coo_array((np.ones(len(entry)), (entry % experts, entry))).tocsr()
    found = linprog(
        -cost_TE.numpy().ravel(),
        A_eq=by_token,
        b_eq=np.full(tokens, k),
        A_ub=coo_array(np.vstack([by_expert.toarray(), -by_expert.toarray()])),
        b_ub=np.concatenate([most_E, -np.asarray(least_E)]),
        bounds=(0, 1),
        method="highs",
    )
    return -found.fun if found.status == 0 else None


@few
@given(problems)
def test_every_choice_is_balanced_and_the_best_for_its_loads(problem):
    logits_TE, k, _ = draw(problem)
    cost_TE = cost_of(logits_TE, problem["cost"])
    for library in (native.load, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "load", library)
            experts_TK, bias_E = balanced_topk(logits_TE, k, problem["tol"], cost=problem["cost"])
        loads_E = check_choice(experts_TK, logits_TE, k, problem["tol"])
        total = cost_TE.gather(1, experts_TK).sum().item()
        assert total == pytest.approx(best_sum(cost_TE, k, loads_E, loads_E), rel=1e-6, abs=1e-4)
        # The experts are among the k largest of C + bias, up to ties.
        shifted_TE = cost_TE + bias_E
        threshold_T1 = shifted_TE.topk(k, dim=1).values[:, -1:]
        assert (shifted_TE.gather(1, experts_TK) >= threshold_T1 - 1e-4).all()


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_exact_capacities_give_the_score_of_the_assignment_problem(backend, cost, scale):
    generator = torch.Generator().manual_seed(0)
    logits_TE = scale * (torch.randn(120, 8, generator=generator) + 2 * torch.randn(8, generator=generator))
    experts_TK, _ = balanced_topk(logits_TE, 1, tol=0.0, cost=cost)
    assert loads_of(experts_TK, 8).tolist() == [15] * 8
    cost_TE = cost_of(logits_TE, cost)
    rows, columns = linear_sum_assignment(cost_TE.repeat_interleave(15, dim=1).numpy(), maximize=True)
    best = cost_TE[rows, columns // 15].sum().item()
    assert cost_TE.gather(1, experts_TK).sum().item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_with_slack_the_score_is_near_the_best_of_all_balanced_choices(backend, cost):
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(512, 16, generator=generator) + 2 * torch.randn(16, generator=generator)
    experts_TK, _ = balanced_topk(logits_TE, 2, tol=0.05, cost=cost)
    check_choice(experts_TK, logits_TE, 2, 0.05)
    cost_TE = cost_of(logits_TE, cost)
    total = cost_TE.gather(1, experts_TK).sum().item()
    strict, free = (best_sum(cost_TE, 2, *bounds) for bounds in (([64] * 16, [64] * 16), ([61] * 16, [67] * 16)))
    assert strict - 1e-4 <= total <= free + 1e-6


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("cost", "scale"), [("linear", 1.0), ("softmax", 1.0), ("softmax", 4.0)])
def test_large_problems_end_balanced_near_the_dual_bound(cost, scale, k):
    generator = torch.Generator().manual_seed(0)
    logits_TE = scale * torch.randn(4096, 32, generator=generator) + 2 * torch.randn(32, generator=generator)
    found = balanced_topk(logits_TE, k, cost=cost)
    experts_TK, bias_E = found
    check_choice(experts_TK, logits_TE, k, 0.01)
    assert found.passes <= 16
    cost_TE, bias_E = cost_of(logits_TE, cost), bias_E.double()
    bound = (cost_TE + bias_E).topk(k, dim=1).values.sum() - bias_E.sum() * 4096 * k / 32
    assert cost_TE.gather(1, experts_TK).sum() >= (1 - 1e-6) * bound
    exact = balanced_topk(logits_TE, k, tol=0.0, cost=cost, init=bias_E)
    bound = (cost_TE + exact.bias).topk(k, dim=1).values.sum() - exact.bias.double().sum() * 4096 * k / 32
    assert loads_of(exact.experts, 32).tolist() == [128 * k] * 32
    assert cost_TE.gather(1, exact.experts).sum().item() == pytest.approx(bound.item(), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_from_a_bad_start_the_repair_finds_the_best_choice(backend, cost, k, monkeypatch):
    monkeypatch.setattr(search, "PASSES", 1)
    generator = torch.Generator().manual_seed(8)
    tokens = 800 if backend == "kernels" else 160
    logits_TE = 4 * torch.randn(tokens, 16, generator=generator) + 4 * torch.randn(16, generator=generator)
    experts_TK, bias_E = balanced_topk(logits_TE, k, tol=0.0, cost=cost, init=torch.zeros(16))
    assert (experts_TK.sort(dim=1).values.diff(dim=1) > 0).all()
    assert loads_of(experts_TK, 16).tolist() == [tokens * k // 16] * 16
    cost_TE = cost_of(logits_TE, cost)
    # Weak duality: no assignment with these loads can be above this for any bias.
    bound = (cost_TE + bias_E).topk(k, dim=1).values.sum() - bias_E.double().sum() * tokens * k / 16
    assert cost_TE.gather(1, experts_TK).sum().item() == pytest.approx(bound.item(), rel=1e-6)


@pytest.mark.parametrize("rounded", [False, True])  # True: with many ties
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(13, 8, 1), (3, 9, 1), (1, 6, 2), (11, 7, 2), (15, 8, 3), (5, 6, 5), (90, 16, 3)]
)
def test_targets_that_are_no_whole_numbers_are_rounded_as_is_best(backend, tokens, experts, k, rounded):
    least = tokens * k // experts
    for seed in range(4):
        logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
        logits_TE = logits_TE.round() if rounded else logits_TE
        logits_TE = logits_TE + torch.linspace(0, seed, experts)  # those at the end are wanted
        experts_TK, _ = balanced_topk(logits_TE, k, tol=0)
        assert set(loads_of(experts_TK, experts).tolist()) <= {least, least + 1}
        best = best_sum(logits_TE.double(), k, np.full(experts, least), np.full(experts, least + 1))
        assert logits_TE.double().gather(1, experts_TK).sum().item() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("outlier", [1e4, 1e8, -1e8, 1e30])
def test_a_start_that_is_far_off_leads_to_the_same_choice(backend, cost, outlier):
    logits_TE = torch.randn(60, 6, generator=torch.Generator().manual_seed(3))
    init_E = torch.zeros(6)
    init_E[2] = outlier
    here, there = (
        balanced_topk(logits_TE, 2, tol=0, cost=cost),
        balanced_topk(logits_TE, 2, tol=0, cost=cost, init=init_E),
    )
    assert here.experts.sort(dim=1).values.equal(there.experts.sort(dim=1).values)


@pytest.mark.parametrize("experts", [512, 1024])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_many_experts_are_balanced_to_the_last_token(cost, experts):
    logits_TE = torch.randn(2048, experts, generator=torch.Generator().manual_seed(0))
    found = balanced_topk(logits_TE, 8, cost=cost)
    assert loads_of(found.experts, experts).tolist() == [2048 * 8 // experts] * experts
    cost_TE, bias_E = cost_of(logits_TE, cost), found.bias.double()
    bound = (cost_TE + bias_E).topk(8, dim=1).values.sum() - bias_E.sum() * 2048 * 8 / experts
    assert cost_TE.gather(1, found.experts).sum().item() == pytest.approx(bound.item(), rel=1e-6)


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_with_and_without_the_kernels_the_choice_is_the_same(cost, monkeypatch):
    if native.load() is None:
        pytest.skip(native.status())
    logits_TE = torch.randn(120, 24, generator=torch.Generator().manual_seed(5))
    kernels = balanced_topk(logits_TE, 3, tol=0, cost=cost)
    monkeypatch.setattr(native, "load", lambda: None)
    torch_alone = balanced_topk(logits_TE, 3, tol=0, cost=cost)
    assert kernels.experts.sort(dim=1).values.equal(torch_alone.experts.sort(dim=1).values)


def test_an_interrupt_is_served_within_a_second():
    code = """
import signal, threading, time, torch
from sinkroute.transport import balanced_topk
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background inherits none
logits_TE = 6 * torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0))
balanced_topk(logits_TE[:64, :64], 8)
sent = []
timer = threading.Timer(0.5, lambda: (sent.append(time.process_time()), signal.raise_signal(signal.SIGINT)))
try:
    timer.start()
    while True:
        balanced_topk(logits_TE, 8, cost="softmax")
except KeyboardInterrupt:
    print(time.process_time() - sent[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    # A second of work: other programs on the machine are not this one's fault.
    assert float(done.stdout) < 1, done.stderr


def test_passes_alone_nearly_balance_linear_logits():
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(16384, 32, generator=generator) + 2 * torch.randn(32, generator=generator)
    found = balanced_topk(logits_TE, 2)
    assert found.passes <= 5 and found.moves < 100


def test_the_bias_of_the_call_before_is_a_good_start():
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randn(8192, 16, generator=generator) + 2 * torch.randn(16, generator=generator)
    cold = balanced_topk(logits_TE, 2)
    warm = balanced_topk(logits_TE + 0.01 * torch.randn(8192, 16, generator=generator), 2, init=cold.bias)
    same = balanced_topk(logits_TE, 2, init=cold.bias)
    bad = balanced_topk(logits_TE, 2, init=torch.tensor([math.nan, math.inf] + [0.0] * 14))
    assert same.passes == 1 and warm.passes <= cold.passes
    assert warm.passes < balanced_topk(logits_TE, 2, init=torch.zeros(16)).passes
    for found in (warm, same, bad):
        check_choice(found.experts, logits_TE, 2, 0.01)


def test_ties_and_equal_tokens_are_balanced(backend):
    equal_TE = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)).expand(600, 12)
    one_hot_TE = 10 * torch.nn.functional.one_hot(torch.arange(600) ** 2 % 7, 12).float()
    two_kinds_TE = torch.cat([equal_TE[:450], -equal_TE[450:]])
    for logits_TE, k, cost in itertools.product(
        (torch.zeros(600, 12), equal_TE, one_hot_TE, two_kinds_TE), (1, 3), ("linear", "softmax")
    ):
        experts_TK, _ = balanced_topk(logits_TE, k, tol=0.0, cost=cost)
        assert loads_of(experts_TK, 12).tolist() == [50 * k] * 12
        cost_TE = cost_of(logits_TE, cost)
        best = best_sum(cost_TE, k, [50 * k] * 12, [50 * k] * 12)
        assert cost_TE.gather(1, experts_TK).sum().item() == pytest.approx(best, rel=1e-5, abs=1e-4)


def test_many_equal_tokens_move_together():
    found = balanced_topk(torch.linspace(0, 1, 16).expand(20000, 16), 2)
    check_choice(found.experts, torch.zeros(20000, 16), 2, 0.01)


@few
@given(problems)
def test_masked_tokens_count_for_nothing(problem):
    logits_TE, k, generator = draw(problem)
    mask_T = torch.rand(len(logits_TE), generator=generator) < 0.7
    clean_T = mask_T | (torch.rand(len(logits_TE), generator=generator) < 0.5)
    dirty_TE = torch.where(clean_T[:, None], logits_TE, math.nan)
    cost_TE = cost_of(logits_TE[mask_T], problem["cost"])
    for library in (native.load, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "load", library)
            experts_TK, bias_E = balanced_topk(dirty_TE, k, problem["tol"], cost=problem["cost"], token_mask=mask_T)
        loads_E = check_choice(experts_TK, dirty_TE, k, problem["tol"], mask_T)
        assert bias_E.isfinite().all()
        assert (experts_TK[~mask_T] == torch.arange(k)).all()
        if len(cost_TE):
            best = best_sum(cost_TE, k, loads_E, loads_E)
            assert cost_TE.gather(1, experts_TK[mask_T]).sum().item() == pytest.approx(best, rel=1e-6, abs=1e-4)


@few
@given(problems)
def test_shifts_of_rows_and_permutations_change_nothing(problem):
    logits_TE, k, generator = draw(problem | {"digits": 7}, torch.float64)
    exact = {"tol": 0.0, "cost": problem["cost"]}
    cost_TE = cost_of(logits_TE, problem["cost"])

    def total(experts_TK):
        return cost_TE.gather(1, experts_TK).sum().item()

    tokens, experts = logits_TE.shape
    if tokens * k % experts:
        return  # which loads are rounded up may then differ
    shift_T1 = 10 * torch.randn(tokens, 1, dtype=torch.float64, generator=generator)
    rows_T, columns_E = (torch.randperm(n, generator=generator) for n in (tokens, experts))
    expected = total(balanced_topk(logits_TE, k, **exact).experts)
    assert total(balanced_topk(logits_TE + shift_T1, k, **exact).experts) == pytest.approx(expected, abs=1e-6)
    permuted_TK = balanced_topk(logits_TE[rows_T][:, columns_E], k, **exact).experts
    restored_TK = columns_E[permuted_TK][rows_T.argsort()]
    assert total(restored_TK) == pytest.approx(expected, abs=1e-6)


def test_capacities_may_differ(backend):
    generator = torch.Generator().manual_seed(4)
    logits_TE = torch.randn(400, 6, generator=generator)
    share_E = torch.tensor([1, 0, 2, 3, 1, 3], dtype=torch.float64) / 10
    for k, tol in ((1, 0.0), (2, 0.0), (3, 0.02)):
        experts_TK, bias_E = balanced_topk(logits_TE, k, tol, expert_mass=7 * share_E)
        check_choice(experts_TK, logits_TE, k, tol, share_E=share_E)
        assert bias_E[1] == -math.inf and not (experts_TK == 1).any()
        assert bias_E[share_E > 0].mean().abs() < 1e-5


@few
@given(problems)
def test_forbidden_experts_are_never_chosen(problem):
    logits_TE, k, generator = draw(problem)
    tokens, experts = logits_TE.shape
    # A band of allowed experts, shifted from token to token, plus more at random.
    allowed_TE = (torch.arange(experts) - torch.arange(tokens)[:, None] * k) % experts < k
    allowed_TE |= torch.rand(tokens, experts, generator=generator) < 0.4
    logits_TE = logits_TE.masked_fill(~allowed_TE, -math.inf)
    for library in (native.load, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "load", library)
            experts_TK, bias_E = balanced_topk(logits_TE, k, problem["tol"], cost=problem["cost"])
        check_choice(experts_TK, logits_TE, k, problem["tol"])
        assert allowed_TE.gather(1, experts_TK).all() and bias_E.isfinite().all()


def test_what_cannot_be_balanced_is_refused(backend):
    logits_TE = torch.zeros(8, 4)
    logits_TE[:6, 1:] = -math.inf
    with pytest.raises(ValueError, match=r"tol=0.01 cannot be kept: expert 0 has a load of 6 and may have 2"):
        balanced_topk(logits_TE, 1)
    experts_TK, _ = balanced_topk(logits_TE, 1, tol=2.0)
    assert loads_of(experts_TK, 4)[0] == 6


def test_an_expert_that_nobody_may_have_stays_empty(backend):
    logits_TE = torch.zeros(12, 4)
    logits_TE[:, 2] = -math.inf
    experts_TK, _ = balanced_topk(logits_TE, 1, tol=0.4)
    assert loads_of(experts_TK, 4).tolist() == [4, 4, 0, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_any_dtype_and_layout(backend, dtype, cost):
    generator = torch.Generator().manual_seed(5)
    logits_TE = (torch.randn(300, 20, generator=generator) + torch.randn(20, generator=generator)).to(dtype)
    expected_TK, bias_E = balanced_topk(logits_TE, 3, cost=cost)
    check_choice(expected_TK, logits_TE, 3, 0.01)
    assert bias_E.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for layout_TE in (logits_TE.T.contiguous().T, torch.cat([logits_TE, logits_TE], dim=1)[:, :20]):
        experts_TK, _ = balanced_topk(layout_TE, 3, cost=cost)
        cost_TE = cost_of(logits_TE, cost)
        check_choice(experts_TK, logits_TE, 3, 0.01)
        total, expected = (cost_TE.gather(1, x).sum() for x in (experts_TK, expected_TK))
        assert total.item() == pytest.approx(expected.item(), rel=1e-2)


def test_odd_sizes(backend):
    generator = torch.Generator().manual_seed(6)
    for tokens, experts, k in ((0, 3, 2), (1, 5, 2), (3, 17, 4), (7, 4, 4), (9, 1, 1), (5, 64, 1)):
        logits_TE = torch.randn(tokens, experts, generator=generator)
        found = balanced_topk(logits_TE, k)
        check_choice(found.experts, logits_TE, k, 0.01)
        assert found.bias.isfinite().all() and found.bias.shape == (experts,)
    masked = balanced_topk(torch.full((2, 3), math.nan), 2, token_mask=torch.zeros(2, dtype=torch.bool))
    assert masked.experts.tolist() == [[0, 1], [0, 1]]


def test_nothing_is_changed_and_nothing_is_random(backend):
    logits_TE = torch.randn(500, 8, generator=torch.Generator().manual_seed(7), requires_grad=True)
    kept_TE, init_E = logits_TE.detach().clone(), torch.zeros(8)
    state = torch.get_rng_state()
    first, second = (balanced_topk(logits_TE, 2, init=init_E) for _ in range(2))
    assert first.experts.equal(second.experts) and first.bias.equal(second.bias)
    assert (first.passes, first.moves) == (second.passes, second.moves)
    assert torch.get_rng_state().equal(state) and logits_TE.equal(kept_TE) and not init_E.any()
    assert not first.bias.requires_grad


LOGITS_TE = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch is about to drop them
    QUANTISED_E = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
FORBIDDEN_TE = LOGITS_TE.clone().index_put_((torch.tensor(2), torch.tensor(1)), torch.tensor(-math.inf))


@pytest.mark.parametrize(
    ("logits", "arguments", "error", "words"),
    [
        ([[1.0, 2.0]], {}, TypeError, "logits_TE must be a torch.Tensor, got list"),
        (torch.ones(4), {}, ValueError, r"shape \(4,\)"),
        (LOGITS_TE, {"k": 0}, ValueError, "k must be 1 to 2, the number of experts, got 0"),
        (LOGITS_TE, {"k": 3}, ValueError, "k must be 1 to 2, the number of experts, got 3"),
        (LOGITS_TE, {"k": 1.0}, TypeError, "k must be an int, got float"),
        (LOGITS_TE, {"tol": -0.1}, ValueError, "tol must be a finite number, at least 0, got -0.1"),
        (LOGITS_TE, {"tol": math.nan}, ValueError, "tol must be a finite number"),
        (LOGITS_TE, {"tol": "0.1"}, TypeError, "tol must be a number"),
        (LOGITS_TE, {"cost": "sofmax"}, ValueError, "unknown cost 'sofmax'; did you mean 'softmax'"),
        (LOGITS_TE, {"token_mask": torch.ones(4)}, TypeError, "token_mask must be a bool tensor"),
        (LOGITS_TE, {"expert_mass": [1.0]}, ValueError, r"expert_mass has shape \(1,\)"),
        (
            LOGITS_TE,
            {"k": 2, "expert_mass": [1.0, 2.0]},
            ValueError,
            r"expert 1 a share of 0.667, but with k=2 .* 1/2 of the choices; lower expert_mass\[1\] or k",
        ),
        (LOGITS_TE, {"expert_mass": "x"}, TypeError, "expert_mass must be a tensor or a sequence of numbers, got 'x'"),
        (LOGITS_TE, {"expert_mass": [1.0, 1j]}, TypeError, "expert_mass must be a tensor or a sequence of numbers"),
        (LOGITS_TE, {"expert_mass": QUANTISED_E}, TypeError, r"quantised .*pass expert_mass.dequantize\(\)"),
        (LOGITS_TE, {"init": QUANTISED_E}, TypeError, r"init is a quantised tensor"),
        (LOGITS_TE, {"init": torch.zeros(2) + 0j}, TypeError, r"init must hold real numbers, .*; pass init.real"),
        (LOGITS_TE, {"cost": ["linear"]}, ValueError, r"unknown cost \['linear'\]"),
        (LOGITS_TE, {"init": torch.zeros(3)}, ValueError, r"init has shape \(3,\)"),
        (LOGITS_TE, {"init": [0.0, 0.0]}, TypeError, "init must be a tensor"),
        (FORBIDDEN_TE, {"k": 2}, ValueError, r"k=2, but logits_TE\[2\] allows 1 experts .*; lower k, allow more"),
        (
            torch.cat([FORBIDDEN_TE, LOGITS_TE], dim=1),
            {"k": 3, "expert_mass": [1.0, 1.0, 1.0, 0.0]},
            ValueError,
            r"logits_TE\[2\] allows 2 experts",
        ),
        (FORBIDDEN_TE * -1, {}, NonFiniteLogits, r"logits_TE\[2, 1\] is inf"),
        (FORBIDDEN_TE * math.nan, {}, NonFiniteLogits, r"logits_TE\[0, 0\] is nan"),
    ],
)
def test_wrong_arguments_are_refused(logits, arguments, error, words):
    with pytest.raises(error, match=words):
        balanced_topk(logits, **{"k": 1} | arguments)


def test_what_comes_back_can_be_copied():
    found = balanced_topk(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), 2)
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.experts, found.experts) and again.passes == found.passes and len(again) == 2


@pytest.mark.parametrize("seed", range(4))
def test_logits_as_far_apart_as_float32_allows_are_balanced_over_what_is_allowed(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = (1e38 * torch.randn(33, 5, generator=generator) + 2e38 * torch.randn(5, generator=generator)).clamp(
        -3.4e38, 3.4e38
    )
    logits_TE[::7, 0] = -math.inf
    experts_TK, bias_E = balanced_topk(logits_TE, 2, tol=0)
    check_choice(experts_TK, logits_TE, 2, 0)
    assert logits_TE.gather(1, experts_TK).isfinite().all() and bias_E.isfinite().all()
    best = best_sum(logits_TE.double().clamp(min=-1e41) / 1e38, 2, np.full(5, 13), np.full(5, 14))
    assert logits_TE.double().gather(1, experts_TK).sum().item() / 1e38 == pytest.approx(best, rel=1e-6)


def test_a_tolerance_of_any_size_is_one(backend):
    logits_TE = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    chosen = [balanced_topk(logits_TE, 1, tol).experts for tol in (10, 1e20, 1e300, Fraction(10))]
    assert all(map(chosen[0].equal, chosen))


@pytest.mark.parametrize("tol", [0, 0.01])
def test_masses_in_float32_that_stand_for_whole_loads_give_these(backend, tol):
    logits_TE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1.0, 1.0])
    experts_TK, _ = balanced_topk(logits_TE, 2, tol, expert_mass=torch.tensor([0.2, 0.6, 0.8]))
    assert loads_of(experts_TK, 3).tolist() == [16, 48, 64]
