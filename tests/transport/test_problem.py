"""Every wrong argument is refused by name, and every odd but valid one is served."""

import math

import numpy as np
import pytest
import torch

from sinkroute.transport import balanced_topk, list_solvers, solve

LOGITS_TE = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]])


@pytest.mark.parametrize(
    ("logits", "error", "words"),
    [
        ([[1.0, 2.0]], TypeError, "logits_TE must be a torch.Tensor, got list"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, r"got torch.int64; call logits_TE.float\(\)"),
        (torch.ones(4, 2, dtype=torch.complex64), TypeError, "floating-point"),
        (torch.ones(2, 3, 4), ValueError, r"shape \(2, 3, 4\); flatten"),
        (torch.ones(4), ValueError, r"shape \(4,\)"),
        (torch.ones(4, 0), ValueError, "at least one expert"),
        (
            torch.tensor([[1.0, 2.0], [3.0, math.nan]]),
            ValueError,
            r"logits_TE\[1, 1\] is nan.*token_mask.*learning rate",
        ),
        (torch.tensor([[1.0, math.inf], [math.nan, 0.0]]), ValueError, r"logits_TE\[0, 1\] is inf"),
        (torch.ones(4, 2).to(torch.float8_e4m3fn), TypeError, r"16, 32 or 64 bits, got torch.float8_e4m3fn; call"),
        (torch.tensor([[1.0, 0.0], [-math.inf, -math.inf]]), ValueError, "all logits of token 1 are −inf.*token_mask"),
    ],
)
@pytest.mark.parametrize("method", list_solvers())
def test_wrong_logits_are_refused(logits, error, words, method):
    with pytest.raises(error, match=words):
        solve(logits, method=method)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"reg": 0.0}, ValueError, "reg must be a finite number above 0, got 0.0"),
        ({"reg": -1}, ValueError, "reg must be"),
        ({"reg": math.nan}, ValueError, "reg must be"),
        ({"reg": math.inf}, ValueError, "reg must be"),
        ({"reg": "0.1"}, TypeError, "reg must be a number, got str"),
        ({"reg": 1e-50}, ValueError, "reg=1e-50 is outside .* torch.float32"),
        ({"reg": 1e38}, ValueError, "reg=1e.38 is outside"),
        ({"cost": "sofmax"}, ValueError, "unknown cost 'sofmax'; did you mean 'softmax'"),
        ({"method": "sinkhron"}, ValueError, "unknown method 'sinkhron'; did you mean 'sinkhorn'"),
        ({"token_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"token_mask has shape \(3,\).* 4 tokens"),
        ({"token_mask": torch.ones(4)}, TypeError, "token_mask must be a bool tensor.*torch.float32"),
        ({"token_mask": [True] * 4}, TypeError, "token_mask must be a bool tensor.*list"),
        ({"token_mass": torch.ones(3)}, ValueError, r"token_mass has shape \(3,\).* 4 tokens"),
        ({"token_mass": [1.0] * 4}, TypeError, "token_mass must be a tensor.*list"),
        ({"token_mass": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, r"token_mass\[2\] is -1.0; masses must be"),
        ({"token_mass": torch.tensor([1.0, math.nan, 1.0, 1.0])}, ValueError, r"token_mass\[1\] is nan"),
        (
            {"token_mass": torch.full((4,), 1e-50, dtype=torch.float64)},
            ValueError,
            "1e-50, too small .* scale token_mass",
        ),
        ({"reg": torch.tensor(0.1)}, TypeError, r"reg must be a number, got Tensor; of a tensor give .item\(\)"),
        ({"process_group": object(), "reduce": lambda x: x}, ValueError, "process_group and reduce say the same"),
        ({"expert_mass": torch.ones(3)}, ValueError, r"expert_mass has shape \(3,\).* 2 experts"),
        ({"expert_mass": [1.0, -1.0]}, ValueError, "expert_mass must be finite"),
        ({"expert_mass": [1.0, math.inf]}, ValueError, "expert_mass must be finite"),
        ({"expert_mass": [1.0, math.nan]}, ValueError, "expert_mass must be finite"),
        ({"expert_mass": "x"}, TypeError, "expert_mass must be a tensor or a sequence of numbers, got 'x'"),
        ({"expert_mass": torch.ones(2) + 0j}, TypeError, "expert_mass must hold real numbers, got torch.complex64"),
        ({"token_mass": LOGITS_TE[:, 0] + 0j}, TypeError, "token_mass must hold real numbers, got torch.complex64"),
        ({"cost": ["linear"]}, ValueError, r"unknown cost \['linear'\]"),
        ({"expert_mass": [0.0, 0.0]}, ValueError, "positive for at least one expert"),
        ({"tol": 0.0}, ValueError, "tol must be a finite number above 0"),
        ({"max_passes": 0}, ValueError, "max_passes must be at least 1, got 0"),
        ({"max_passes": 2.5}, TypeError, "max_passes must be an int or None, got float"),
        ({"init": torch.zeros(3)}, ValueError, r"init has shape \(3,\).* 2 experts"),
        ({"init": [0.0, 0.0]}, TypeError, "init must be a tensor"),
    ],
)
def test_wrong_options_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        solve(LOGITS_TE, **arguments)


@pytest.mark.parametrize("method", list_solvers())
@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_tokens_is_a_valid_problem(method, mask):
    plan = solve(torch.zeros(0, 3), token_mask=mask, method=method)
    assert plan.potentials.tolist() == [0, 0, 0]
    assert plan.column_error == 0 and plan.converged and plan.passes == 0
    assert plan.matrix().shape == (0, 3)
    assert [x.shape for x in plan.topk(2)] == [(0, 2), (0, 2)]


def test_all_tokens_masked_is_a_valid_problem():
    plan = solve(torch.full((2, 3), math.nan), token_mask=torch.zeros(2, dtype=torch.bool))
    assert plan.converged and plan.passes == 0
    assert plan.matrix().tolist() == [[0, 0, 0], [0, 0, 0]]
    assert plan.topk(2)[0].tolist() == [[0, 0], [0, 0]]


def test_one_token_is_spread_evenly():
    # 1 token and 4 experts: every column must sum to 1/4, so the only row is (1/4, 1/4, 1/4, 1/4).
    plan = solve(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), reg=0.5)
    torch.testing.assert_close(plan.matrix(), torch.full((1, 4), 0.25), atol=1e-4, rtol=0)


def test_one_expert_takes_all():
    plan = solve(torch.randn(5, 1, generator=torch.Generator().manual_seed(0)))
    assert plan.matrix().tolist() == [[1.0]] * 5 and plan.converged


@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_values_of_masked_rows_reach_neither_values_nor_gradients(cost):
    logits_TE = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask_T = torch.tensor([True, False, True, True, False, True])
    dirty_TE = logits_TE.clone()
    dirty_TE[1], dirty_TE[4] = math.nan, math.inf
    dirty_TE.requires_grad_()
    plan = solve(dirty_TE, 0.5, cost, token_mask=mask_T, tol=1e-10, differentiable=True)
    matrix_TE, (weights_TK, experts_TK) = plan.matrix(), plan.topk(2)
    torch.testing.assert_close(matrix_TE[mask_T], solve(logits_TE[mask_T], 0.5, cost, tol=1e-10).matrix())
    assert (matrix_TE[~mask_T] == 0).all() and (weights_TK[~mask_T] == 0).all()
    assert experts_TK.min() >= 0 and experts_TK.max() < 3
    (gradient_TE,) = torch.autograd.grad((matrix_TE**2).sum() + (weights_TK**3).sum(), dirty_TE)
    assert gradient_TE.isfinite().all()
    assert (gradient_TE[~mask_T] == 0).all() and (gradient_TE[mask_T] != 0).any()


def test_an_expert_without_mass_gets_nothing():
    logits_TE = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    plan = solve(logits_TE, expert_mass=[1, 0, 2, 1], reg=0.5)
    # 12 tokens shared 1 : 0 : 2 : 1 are 3, 0, 6, 3.
    torch.testing.assert_close(plan.matrix().sum(0), torch.tensor([3.0, 0.0, 6.0, 3.0]), rtol=1e-4, atol=0)
    assert plan.converged and plan.potentials[1] == -math.inf
    assert plan.potentials[[0, 2, 3]].mean().abs() < 1e-6
    weights_TK, _ = plan.topk(4)
    assert (weights_TK[:, 3] == 0).all() and weights_TK.isfinite().all()


@pytest.mark.parametrize("mass", [1e30, 1e31, -1.0, math.inf, math.nan])
def test_a_mass_that_cannot_be_is_named(mass):
    # In float32 the 1e30 is a little more than that, and must be named all the same.
    with pytest.raises(ValueError, match=r"token_mass\[1\] is .*at most 1e30"):
        solve(torch.zeros(3, 2), token_mass=torch.tensor([1.0, mass, 0.0]))


def test_a_token_whose_experts_all_lack_mass_is_named():
    logits_TE = torch.tensor([[0.0, 0.0, 1.0], [0.0, -math.inf, -math.inf], [0.0, 1.0, 0.0]])
    for method in list_solvers():
        with pytest.raises(ValueError, match=r"token 1 .*expert_mass of 0.*token_mask"):
            solve(logits_TE, expert_mass=[0.0, 1.0, 1.0], method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_expert_mass_of_any_dtype_gives_the_same_targets(dtype):
    logits_TE = torch.randn(1100, 3, generator=torch.Generator().manual_seed(3))
    plan = solve(logits_TE, 0.5, expert_mass=torch.tensor([1, 3, 7]).to(dtype), tol=1e-6)
    torch.testing.assert_close(
        plan.matrix().double().sum(0), torch.tensor([100.0, 300.0, 700.0]).double(), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_does_not_matter(dtype):
    logits_TE = torch.randn(3000, 20, generator=torch.Generator().manual_seed(4))
    expected = [solve(logits_TE, 0.1, "softmax").potentials, balanced_topk(logits_TE, 2)[0]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [solve(logits_TE, 0.1, "softmax").potentials, balanced_topk(logits_TE, 2)[0]]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_numpy_numbers_are_numbers():
    assert solve(LOGITS_TE, np.float64(0.5), tol=np.float64(1e-4)).converged


def test_a_mask_that_hides_the_whole_sample_is_harmless():
    mask_T = torch.arange(2000) % 3 != 0  # the sample is every third token
    logits_TE = torch.randn(2000, 4, generator=torch.Generator().manual_seed(5))
    for reduce in (None, lambda x: x):
        assert solve(logits_TE, token_mask=mask_T, reduce=reduce).converged


def test_topk_refuses_more_experts_than_there_are():
    plan = solve(LOGITS_TE)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k must be 1 to 2, the number of experts, got {k}"):
            plan.topk(k)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint16, torch.float16, torch.float8_e4m3fn])
def test_token_mass_of_any_real_dtype_gives_the_same_plan(dtype):
    logits_TE, mass_T = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 1, 1, 1, 0])
    plan, expected = (solve(logits_TE, token_mass=x) for x in (mass_T.to(dtype), mass_T.float()))
    assert plan.potentials.equal(expected.potentials) and plan.token_mass.equal(expected.token_mass)
