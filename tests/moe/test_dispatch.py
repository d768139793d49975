"""Sorting copies of tokens by expert, and undoing it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkroute.moe.dispatch import combine, dispatch, plan_dispatch


@st.composite
def choices(draw):
    tokens, experts, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(0, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(numbers, dtype=torch.int64).view(tokens, top_k), experts


@st.composite
def choices_and_masks(draw):
    experts_TK, experts = draw(choices())
    size = experts_TK.numel()
    chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return experts_TK, experts, torch.tensor(chosen, dtype=torch.bool).view(experts_TK.shape)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_plan_worked_by_hand():
    # Copies 0…5 go to experts 2 0 | 0 1 | 2 0. Sorted by expert, tokens in order: expert 0 gets copies 1, 2, 5,
    # expert 1 copy 3, expert 2 copies 0, 4, expert 3 none; they end at 3, 4, 6, 6.
    plan = plan_dispatch(torch.tensor([[2, 0], [0, 1], [2, 0]]), num_experts=4)
    assert plan.order_R.tolist() == [1, 2, 5, 3, 0, 4]
    assert plan.place_R.tolist() == [4, 0, 1, 3, 5, 2]
    assert plan.ends_E.tolist() == [3, 4, 6, 6] and plan.top_k == 2


@settings(deadline=None)
@given(choices())
def test_order_and_place_undo_each_other_and_ends_are_cumulative_counts(choice):
    experts_TK, experts = choice
    plan = plan_dispatch(experts_TK, experts)
    copies = torch.arange(experts_TK.numel())
    assert torch.equal(plan.order_R[plan.place_R], copies) and torch.equal(plan.place_R[plan.order_R], copies)
    assert plan.ends_E.tolist() == [int((experts_TK <= expert).sum()) for expert in range(experts)]
    assert plan.ends_E.dtype == torch.int32 and plan.order_R.dtype == plan.place_R.dtype == torch.int64
    expert_of = experts_TK.flatten().tolist()
    assert plan.order_R.tolist() == sorted(range(len(expert_of)), key=lambda copy: (expert_of[copy], copy))


@settings(deadline=None, max_examples=50)
@given(choices())
def test_dispatch_brings_each_copy_to_its_expert_and_combine_brings_it_home(choice):
    experts_TK, experts = choice
    tokens, top_k = experts_TK.shape
    plan, x_TD, weights_TK = plan_dispatch(experts_TK, experts), random(tokens, 3), random(tokens, top_k, seed=1)
    x_RD = dispatch(x_TD, plan)
    assert torch.equal(x_RD, torch.stack([x_TD[copy // top_k] for copy in plan.order_R.tolist()] or [x_TD]).view(-1, 3))
    # Each row times (1 + its expert): the token comes home as Σ_k w_k (1 + e_k) x.
    scale_R = 1 + experts_TK.flatten()[plan.order_R]
    expected = ((1 + experts_TK) * weights_TK).sum(1, keepdim=True) * x_TD
    torch.testing.assert_close(combine(x_RD * scale_R[:, None], weights_TK, plan), expected, rtol=1e-12, atol=1e-12)


def test_a_plan_without_two_copies_worked_by_hand():
    # As above without copies 2 and 4: expert 0 gets copies 1, 5, expert 1 copy 3, expert 2 copy 0; ends 2, 3, 4, 4.
    chosen_TK = torch.tensor([[True, True], [False, True], [False, True]])
    plan = plan_dispatch(torch.tensor([[2, 0], [0, 1], [2, 0]]), 4, chosen_TK)
    assert plan.order_R.tolist() == [1, 5, 3, 0] and plan.ends_E.tolist() == [2, 3, 4, 4] and plan.top_k == 2
    x_TD = torch.tensor([[10.0], [20.0], [30.0]])
    assert dispatch(x_TD, plan).flatten().tolist() == [10, 30, 20, 10]
    y_TD = combine(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.full((3, 2), 0.5), plan)
    assert y_TD.flatten().tolist() == [0.5 * 4 + 0.5 * 1, 0.5 * 3, 0.5 * 2]


@settings(deadline=None, max_examples=50)
@given(choices_and_masks())
def test_what_is_left_out_counts_as_0_and_nothing_else_changes(choice):
    experts_TK, experts, chosen_TK = choice
    tokens, top_k = experts_TK.shape
    x_TD, weights_TK = random(tokens, 3).requires_grad_(), random(tokens, top_k, seed=1).requires_grad_()
    slope_TD, results = random(tokens, 3, seed=2), []
    for mask_TK, factor_TK in ((chosen_TK, 1.0), (None, chosen_TK)):
        plan = plan_dispatch(experts_TK, experts, mask_TK)
        scale_R = 1 + experts_TK.flatten()[plan.order_R]
        y_TD = combine(dispatch(x_TD, plan) * scale_R[:, None], weights_TK * factor_TK, plan)
        results.append((y_TD, *torch.autograd.grad(y_TD, (x_TD, weights_TK), slope_TD)))
        assert len(plan.order_R) == plan.ends_E[-1] == (tokens * top_k if mask_TK is None else int(mask_TK.sum()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chosen_TK", [None, torch.tensor([[True, True], [False, False], [False, True]])])
def test_gradients_are_those_of_finite_differences(chosen_TK):
    plan = plan_dispatch(torch.tensor([[2, 0], [0, 1], [2, 0]]), 4, chosen_TK)
    rows = len(plan.order_R)
    x_TD, y_RD, weights_TK = (random(*shape).requires_grad_() for shape in ((3, 2), (rows, 2), (3, 2)))
    assert torch.autograd.gradcheck(lambda x: dispatch(x, plan), (x_TD,))
    assert torch.autograd.gradcheck(lambda y, weights: combine(y, weights, plan), (y_RD, weights_TK))
    assert torch.autograd.gradgradcheck(lambda x: dispatch(x, plan) ** 2, (x_TD,))
    assert torch.autograd.gradgradcheck(lambda y, weights: combine(y, weights, plan) ** 2, (y_RD, weights_TK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_combine_answers_in_the_dtype_of_the_experts(dtype):
    plan = plan_dispatch(torch.tensor([[1, 0]]), num_experts=2)
    y_TD = combine(torch.tensor([[1.0], [2.0]], dtype=dtype), torch.tensor([[0.5, 0.25]]), plan)
    assert y_TD.dtype == dtype and y_TD.tolist() == [[0.5 * 2 + 0.25 * 1]]
