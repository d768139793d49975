"""The k largest by torch: the order of a stable sort, for every dtype and layout, in graphs and transforms too."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sinkroute.kernels.topk import largest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rounded(*shape, seed=0):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).round()


def by_sorting(values_TE, k):
    return torch.from_numpy(np.argsort(-values_TE.double().numpy(), axis=1, kind="stable")[:, :k].copy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (7, 7), (20, 3), (100, 20)])
def test_the_order_is_that_of_a_stable_sort(dtype, experts, k):
    values_TE = rounded(50, experts).to(dtype)
    top_TK, places_TK = largest(values_TE, k)
    assert torch.equal(places_TK, by_sorting(values_TE, k)) and torch.equal(top_TK, values_TE.gather(1, places_TK))


def test_the_layout_in_memory_does_not_matter():
    values_TE = rounded(50, 24)
    for same_TE in (values_TE.t().contiguous().t(), torch.cat([values_TE, values_TE], 1)[:, :24]):
        assert torch.equal(largest(same_TE, 5)[1], by_sorting(values_TE, 5))


def test_minus_zero_is_zero_on_every_path():
    values_TE = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert largest(values_TE, 3)[1].tolist() == [[0, 1, 2]]
    assert make_fx(lambda x: largest(x, 3)[1])(values_TE)(values_TE).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ties_go_by_the_numbers_that_are_given_for_them(k):
    values_TE, ties_TE = rounded(40, 8), rounded(40, 8, seed=1)
    expected = [
        sorted(range(8), key=lambda j: (-row[j], -second[j], j))[:k]
        for row, second in zip(values_TE.tolist(), ties_TE.tolist(), strict=True)
    ]
    assert largest(values_TE, k, ties_TE)[1].tolist() == expected
    assert torch.vmap(lambda x, y: largest(x[None], k, y[None])[1][0])(values_TE, ties_TE).tolist() == expected


def test_transforms_and_tracers_see_the_same_order():
    values_TE = rounded(30, 12)
    expected_TK = by_sorting(values_TE, 4)
    gradient_TE = torch.func.grad(lambda x: largest(x, 4)[0].sum())(values_TE)
    assert torch.equal(gradient_TE, torch.zeros(30, 12).scatter(1, expected_TK, 1.0))
    # Traced with other values, in which nothing is tied.
    traced = make_fx(lambda x: largest(x, 4)[1])(torch.randn(30, 12))
    assert torch.equal(traced(values_TE), expected_TK)


def test_without_rows_there_are_no_places():
    assert largest(torch.empty(0, 5), 2)[1].shape == largest(torch.empty(0, 5, device="meta"), 2)[1].shape == (0, 2)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_rows_with_nan_have_different_places(k):
    values_TE = rounded(60, 12)
    values_TE[rounded(60, 12, seed=1) > 0] = float("nan")
    values_TE[0] = float("nan")
    assert all(len(set(places)) == k for places in largest(values_TE, k)[1].tolist())
