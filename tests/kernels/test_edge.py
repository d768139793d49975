"""Who is at the edge of a top-k: the width and the counts by sorting, whatever computes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkroute.kernels import native
from sinkroute.kernels.edge import edge_topk
from sinkroute.kernels.topk import topk


def by_sorting(values_TE, bias_E, k, share, ties=None, token_mask=None):
    """Experts, counts and width by NumPy, and by `topk` where ties are drawn."""
    shifted_TE = values_TE if bias_E is None else values_TE + bias_E.to(values_TE.dtype)
    best_TK = np.argsort(-shifted_TE.double().numpy(), axis=1, kind="stable")[:, : k + 1]
    if ties is not None:
        best_TK = topk(shifted_TE, k + 1, ties).numpy()
    top_TK = np.take_along_axis(shifted_TE.double().numpy(), best_TK, 1)
    with np.errstate(invalid="ignore"):
        margin_T = top_TK[:, k - 1] - top_TK[:, k]
    real_T = np.ones(len(margin_T), bool) if token_mask is None else token_mask.numpy()
    margin_T = np.where(real_T, margin_T, np.inf)
    place = min(int(share * real_T.sum()), len(margin_T) - 1)
    width = max(np.sort(margin_T)[place], 1e-6)
    width = width if np.isfinite(width) else 1.0
    near_T = margin_T < width
    count_E = sum(np.bincount(best_TK[near_T, at], minlength=values_TE.shape[1]) for at in (k - 1, k))
    return best_TK[:, :k], count_E, width


def check(*problem):
    experts_TK, count_E, width = by_sorting(*problem)
    edge = edge_topk(*problem)
    np.testing.assert_array_equal(edge.experts_TK.numpy(), experts_TK)
    assert edge.width.tolist() == [width]
    np.testing.assert_array_equal(edge.count_E.numpy(), count_E)
    assert (edge.experts_TK.dtype, edge.count_E.dtype) == (torch.int64, torch.float64)


@st.composite
def problems(draw):
    """Values with ties, −inf or neither, in some layout; more tokens than are sorted at once, or fewer than experts."""
    experts = draw(st.integers(2, 40) | st.sampled_from([64, 100, 256]))
    tokens = draw(st.integers(1, 70) | st.sampled_from([200, 700]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    values_TE = torch.randn(tokens, experts, generator=generator, dtype=dtype)
    kind = draw(st.sampled_from(["plain", "bfloat16", "integers", "equal", "limited", "zeros"]))
    if kind == "bfloat16":
        values_TE = values_TE.bfloat16().to(dtype)
    elif kind == "integers":
        values_TE = values_TE.round()
    elif kind == "equal":
        values_TE = values_TE[:1].expand(tokens, experts)
    elif kind == "limited":
        values_TE[torch.rand(tokens, generator=generator) < 0.5, 1:] = float("-inf")
    elif kind == "zeros":
        values_TE = values_TE * 0
    form = draw(st.sampled_from(["contiguous", "rows apart", "columns apart"]))
    if form == "rows apart":
        values_TE = torch.cat([values_TE, torch.full((tokens, 3), 9.0, dtype=dtype)], 1)[:, :experts]
    elif form == "columns apart":
        values_TE = values_TE.t().contiguous().t()
    k = draw(st.integers(1, min(experts - 1, 8)) | st.integers(1, experts - 1))
    bias_E = torch.randn(experts, generator=generator) if draw(st.booleans()) else None
    ties = torch.tensor(5) if draw(st.booleans()) else None
    mask_T = None
    if draw(st.booleans()):
        mask_T = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))
    return values_TE, bias_E, k, draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), ties, mask_T


@given(problems())
@settings(max_examples=300, deadline=None)
def test_experts_width_and_counts_are_those_of_sorting(problem):
    check(*problem)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_without_kernels_they_are_the_same(problem):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "load", lambda: None)
        check(*problem)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "two values", "ascending", "descending", "heavy tails", "mostly equal"])
def test_a_width_among_many_tokens_is_the_order_statistic_whatever_the_margins_are(kind, share):
    margin_T = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).abs()
    if kind == "two values":
        margin_T = (margin_T > 0.6).float() + 1
    elif kind == "ascending":
        margin_T = margin_T.sort().values
    elif kind == "descending":
        margin_T = margin_T.sort(descending=True).values
    elif kind == "heavy tails":
        margin_T = (8 * margin_T).exp()
    elif kind == "mostly equal":
        margin_T = margin_T.clamp(min=1)
    check(torch.stack([margin_T, torch.zeros_like(margin_T)], 1), None, 1, share)


def test_of_margins_that_are_all_infinite_the_width_is_1_and_nobody_is_near():
    values_TE = torch.tensor([[1.0, float("-inf")], [2.0, float("-inf")]])
    edge = edge_topk(values_TE, None, 1, 0.3)
    assert (edge.width.tolist(), edge.count_E.tolist()) == ([1.0], [0.0, 0.0])


def test_equal_values_have_the_least_width_and_are_near():
    edge = edge_topk(torch.zeros(4, 3), None, 1, 0.3)  # all margins are 0, below a width of 1e-6
    assert (edge.width.tolist(), edge.count_E.tolist()) == ([1e-6], [4.0, 4.0, 0.0])


def test_padding_is_not_near_but_has_experts():
    values_TE = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 4.0]])
    edge = edge_topk(values_TE, None, 1, 0.9, token_mask=torch.tensor([True, False, True]))
    # Of the margins 3 and 1, the second, at place 0.9 · 2 = 1; below 3 is the third token alone.
    assert (edge.width.tolist(), edge.count_E.tolist()) == ([3.0], [0.0, 1.0, 1.0])
    assert edge.experts_TK.flatten().tolist() == [0, 0, 1]


def test_several_threads_find_the_same():
    values_TE, results = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(edge_topk(values_TE, None, 3, 0.3))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_compiled_code_and_tensors_without_values_do_too():
    values_TE = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).round()
    bias_E, mask_T = torch.linspace(0, 1, 20), torch.arange(50) % 3 > 0
    compiled = torch.compile(lambda *problem: tuple(edge_topk(*problem)), fullgraph=True, backend="eager")
    problem = (values_TE, bias_E, 4, 0.3, None, mask_T)
    for one, other in zip(compiled(*problem), edge_topk(*problem), strict=True):
        assert torch.equal(one, other)
    edge = edge_topk(values_TE.to("meta"), bias_E.to("meta"), 4, 0.3)
    assert [tuple(x.shape) for x in edge] == [(50, 4), (20,), (1,)]


def test_of_a_function_over_examples_each_has_its_edge():
    values_BTE = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    counts_BE = torch.vmap(lambda values_TE: edge_topk(values_TE, None, 2, 0.3).count_E)(values_BTE)
    assert torch.equal(counts_BE, torch.stack([edge_topk(x, None, 2, 0.3).count_E for x in values_BTE]))


def test_nothing_has_a_gradient():
    values_TE, bias_E = torch.randn(30, 6, requires_grad=True), torch.zeros(6, requires_grad=True)
    assert not any(x.requires_grad for x in edge_topk(values_TE, bias_E, 2, 0.3))
