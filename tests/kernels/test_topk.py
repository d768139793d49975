"""The K best experts: exact whatever is tied, and the noise that decides among them drawn for few."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from sinkroute.kernels import native
from sinkroute.kernels.normal import normal_like
from sinkroute.kernels.topk import noisy_topk, topk

needs_kernels = pytest.mark.skipif(native.load() is None, reason="no compiler here")
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-45, -1e-45, 1e-39, 3e38, -3e38]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(values_TE, k):
    return torch.from_numpy(np.argsort(-values_TE.double().numpy(), axis=1, kind="stable")[:, :k].copy())


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)


@st.composite
def rows(draw):
    """Values (some kind of ties, or none) and k."""
    experts = draw(st.integers(1, 70) | st.sampled_from([128, 256, 300]))
    tokens, seed = draw(st.integers(0, 20)), draw(st.integers(0, 10**6))
    values_TE = random(tokens, experts, seed=seed)
    kind = draw(st.sampled_from(["plain", "bfloat16", "integers", "special", "limited", "ascending"]))
    if kind == "bfloat16":
        values_TE = values_TE.bfloat16().float()
    elif kind == "integers":
        values_TE = values_TE.round()
    elif kind == "special":
        picks_TE = torch.randint(len(SPECIAL), values_TE.shape, generator=torch.Generator().manual_seed(seed))
        values_TE = torch.tensor(SPECIAL)[picks_TE]
    elif kind == "limited":
        values_TE[:, experts // 4 :] = float("-inf")
    elif kind == "ascending":
        values_TE = values_TE.sort(dim=1).values
    k = draw(st.integers(1, min(experts, 12)) | st.integers(1, experts))
    form = draw(st.sampled_from(["contiguous", "rows apart", "columns apart"]))
    if form == "rows apart":
        values_TE = torch.cat([values_TE, torch.full((tokens, 3), 9.0)], 1)[:, :experts]
    elif form == "columns apart":
        values_TE = values_TE.t().contiguous().t()
    return values_TE, k


# -- the plain choice ------------------------------------------------------------------------------------------------


@given(rows())
@settings(max_examples=300, deadline=None)
def test_the_choice_is_that_of_a_stable_sort(rows):
    values_TE, k = rows
    assert torch.equal(topk(values_TE, k), by_sorting(values_TE, k))


@given(rows())
@settings(max_examples=100, deadline=None)
def test_float64_is_chosen_from_alike(rows):
    values_TE, k = rows
    assert torch.equal(topk(values_TE.double(), k), by_sorting(values_TE, k))


@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("experts", [20, 100])
def test_without_kernels_ties_are_the_same(without_kernels, k, experts):
    values_TE = (2 * random(200, experts)).round()
    assert torch.equal(topk(values_TE, k), by_sorting(values_TE, k))


def test_numbers_that_float32_cannot_tell_apart_are_told_apart_in_float64():
    assert topk(torch.tensor([[1.0, 1 + 1e-12]], dtype=torch.float64), 1).tolist() == [[1]]


def test_half_precision_is_chosen_from_too():
    values_TE = random(50, 40).bfloat16()
    assert torch.equal(topk(values_TE, 3), by_sorting(values_TE, 3))


@pytest.mark.parametrize("k", [1, 4, 20, 40])
def test_rows_with_nan_get_different_experts_that_exist(k):
    values_TE = random(100, 40)
    values_TE[random(100, 40, seed=1) < 0.5] = float("nan")
    values_TE[0] = float("nan")
    for chosen in topk(values_TE, k).tolist() + noisy_topk(values_TE, k, 0.1, torch.tensor(1))[0].tolist():
        assert len(set(chosen)) == k and set(chosen) <= set(range(40))


def test_several_threads_choose_alike():
    values_TE, seed, results = random(5000, 64), torch.tensor(3), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append((topk(values_TE, 3), *noisy_topk(values_TE, 3, 0.1, seed), normal_like(values_TE, seed)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_compiled_code_breaks_ties_alike():
    values_TE = random(50, 20).round()
    compiled = torch.compile(lambda values_TE: topk(values_TE, 4), fullgraph=True, backend="eager")
    assert torch.equal(compiled(values_TE), by_sorting(values_TE, 4))


def test_transformed_functions_and_meta_tensors_can_be_chosen_from():
    values_TE = random(5, 6)
    gradient_TE = torch.func.grad(lambda values_TE: values_TE.gather(1, topk(values_TE, 2)).sum())(values_TE)
    assert torch.equal(gradient_TE.nonzero()[:, 1].view(5, 2), by_sorting(values_TE, 2).sort(1).values)
    assert topk(values_TE.to("meta"), 2).shape == (5, 2)


class Best(torch.nn.Module):
    def forward(self, values_TE):
        return topk(values_TE, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.trace
def test_exported_and_traced_graphs_break_ties_alike():
    values_TE, other_TE = random(50, 20).round(), random(50, 20)  # nothing is tied where the graph is made
    expected_TK = by_sorting(values_TE, 4)
    assert torch.equal(torch.export.export(Best(), (other_TE,)).module()(values_TE), expected_TK)
    assert torch.equal(make_fx(Best())(other_TE)(values_TE), expected_TK)
    assert torch.equal(torch.jit.trace(Best(), other_TE)(values_TE), expected_TK)
    assert torch.equal(torch.vmap(Best())(torch.stack([values_TE, other_TE]))[0], expected_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["contiguous", "transposed", "every other column", "one row again and again"])
@pytest.mark.parametrize("kernels", [True, False])
def test_layout_dtype_and_kernels_do_not_change_a_choice(monkeypatch, kernels, form, dtype):
    values_TE = random(60, 24).round().to(dtype)
    if form == "transposed":
        values_TE = values_TE.t().contiguous().t()
    elif form == "every other column":
        values_TE = values_TE.repeat_interleave(2, dim=1)[:, ::2]
    elif form == "one row again and again":
        values_TE = values_TE[:1].expand(60, 24)
    if not kernels:
        monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(topk(values_TE, 3), by_sorting(values_TE, 3))


# -- ties in an order that is drawn ----------------------------------------------------------------------------------


def by_value_then_draw(values_TE, draws_TE, k):
    pairs = zip(values_TE.tolist(), draws_TE.tolist(), strict=True)
    return [sorted(range(len(row)), key=lambda j: (-row[j], -draw[j]))[:k] for row, draw in pairs]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_equal_values_come_in_the_order_of_their_draws_and_others_in_their_own(monkeypatch, kernels, dtype, k):
    if not kernels:
        monkeypatch.setattr(native, "load", lambda: None)
    values_TE, seed = random(80, 9).round().to(dtype), torch.tensor(4)
    expected = by_value_then_draw(values_TE, normal_like(values_TE, seed), k)
    assert topk(values_TE, k, seed).tolist() == expected
    compiled = torch.compile(lambda x, ties: topk(x, k, ties), fullgraph=True, backend="eager")
    assert compiled(values_TE, seed).tolist() == expected
    plain_TE = random(80, 9, seed=1)
    assert torch.equal(topk(plain_TE, k, seed), topk(plain_TE, k))


def test_equal_values_are_spread_evenly_and_anew_by_every_seed():
    values_TE = torch.zeros(4000, 8)
    one, other = (topk(values_TE, 2, torch.tensor(seed)) for seed in (1, 2))
    for experts_TK in (one, other):
        # 1000 expected, with a standard deviation of 27.
        assert (experts_TK.flatten().bincount(minlength=8) - 1000).abs().max() < 150
    assert (one == other).float().mean() < 0.2


# -- with noise ------------------------------------------------------------------------------------------------------


@given(rows(), st.sampled_from([0.0, 1e-3, 0.02, 0.3, 5.0]), st.integers(0, 2**63 - 1), st.booleans())
@settings(max_examples=300, deadline=None)
def test_noise_for_few_chooses_as_noise_for_all(rows, std, seed, biased):
    values_TE, k = rows
    seed, bias_E = torch.tensor(seed), random(values_TE.shape[1], seed=5) if biased else None
    noise_TE = normal_like(values_TE, seed)
    noisy_TE = values_TE + std * noise_TE
    expected_TK = by_sorting(noisy_TE if bias_E is None else noisy_TE + bias_E, k)
    experts_TK, noise_TK = noisy_topk(values_TE, k, std, seed, bias_E)
    assert torch.equal(experts_TK, expected_TK) and torch.equal(noise_TK, noise_TE.gather(1, expected_TK))


def test_rare_noise_lifts_an_expert_from_far_below():
    # Two numbers of 2e5 · 63 pairs are 7 apart about five times: P(N(0, 2) > 7) = 3.7e-7 each.
    values_TE, seed = torch.full((200_000, 64), -7.0), torch.tensor(2)
    values_TE[:, 0] = 0
    expected_T = (values_TE + normal_like(values_TE, seed)).argmax(1)
    assert 1 <= expected_T.count_nonzero() < 20
    assert torch.equal(noisy_topk(values_TE, 1, 1.0, seed)[0][:, 0], expected_T)


@pytest.mark.parametrize("biased", [True, False])
def test_without_kernels_noise_decides_too(without_kernels, biased):
    values_TE, seed, bias_E = random(60, 12), torch.tensor(8), random(12, seed=5) if biased else None
    noise_TE = normal_like(values_TE, seed)
    experts_TK, noise_TK = noisy_topk(values_TE, 3, 0.5, seed, bias_E)
    assert torch.equal(experts_TK, by_sorting(values_TE + 0.5 * noise_TE + (bias_E if biased else 0), 3))
    assert torch.equal(noise_TK, noise_TE.gather(1, experts_TK))


@needs_kernels
def test_a_strength_that_is_a_tensor_is_that_number():
    values_TE, seed = random(60, 12), torch.tensor(8)
    by_tensor = noisy_topk(values_TE, 3, torch.tensor(0.25, requires_grad=True), seed)
    by_number = noisy_topk(values_TE, 3, 0.25, seed)
    assert torch.equal(by_tensor[0], by_number[0]) and torch.equal(by_tensor[1], by_number[1])
    assert not by_tensor[1].requires_grad
