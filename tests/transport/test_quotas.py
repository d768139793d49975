"""Quotas of the ranks: whole numbers that each rank can keep, and that keep the loads of all within bounds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from sinkroute.transport.quotas import quotas

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """Loads of ranks with 0 to 30 tokens, and bounds about equal shares."""
    experts = draw(st.integers(1, 7))
    k = draw(st.integers(1, experts))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    tokens_R = np.array(draw(st.lists(st.sampled_from([0, 1, 2, 3, 10, 30]), min_size=1, max_size=5)))
    likes_RE = draw(st.sampled_from([0.0, 3.0])) * generator.normal(size=(len(tokens_R), experts))
    loads_RE = np.zeros((len(tokens_R), experts), np.int64)
    for rank, tokens in enumerate(tokens_R):
        for _ in range(tokens):
            loads_RE[rank, np.argsort(-likes_RE[rank] - generator.normal(size=experts))[:k]] += 1
    target = k * tokens_R.sum() / experts
    slack = draw(st.sampled_from([0.0, 0.01, 0.3]))
    lower_E = np.full(experts, min(np.floor(target), np.ceil((1 - slack) * target)), np.int64)
    upper_E = np.full(experts, max(np.ceil(target), np.floor((1 + slack) * target)), np.int64)
    return loads_RE, tokens_R, k, lower_E, upper_E


@few
@given(problems())
def test_quotas_can_be_kept_by_each_rank_and_keep_the_loads_of_all_within_bounds(problem):
    loads_RE, tokens_R, k, lower_E, upper_E = problem
    before_RE = loads_RE.copy()
    lower_RE, upper_RE = quotas(loads_RE, tokens_R, lower_E, upper_E)
    assert (loads_RE == before_RE).all()
    assert lower_RE.dtype == upper_RE.dtype == np.int64
    assert (lower_RE >= 0).all() and (lower_RE <= upper_RE).all() and (upper_RE <= tokens_R[:, None]).all()
    # Loads between 0 and the tokens with the right sum are those of some choice of distinct experts.
    assert (lower_RE.sum(1) <= k * tokens_R).all() and (k * tokens_R <= upper_RE.sum(1)).all()
    assert (lower_RE.sum(0) >= lower_E).all() and (upper_RE.sum(0) <= upper_E).all()


@few
@given(problems())
def test_no_more_is_moved_than_the_bounds_ask_for_where_ranks_have_enough_tokens(problem):
    loads_RE, tokens_R, _, lower_E, upper_E = problem
    lower_RE, upper_RE = quotas(loads_RE, tokens_R, lower_E, upper_E)
    moved = (lower_RE - loads_RE).clip(min=0).sum() + (loads_RE - upper_RE).clip(min=0).sum()
    loads_E = loads_RE.sum(0)
    needed = (lower_E - loads_E).clip(min=0).sum() + (loads_E - upper_E).clip(min=0).sum()
    if (tokens_R >= 10).all():
        assert moved <= 2 * needed
    if needed == 0:
        assert moved == 0


@few
@given(problems())
def test_as_little_is_moved_as_by_a_linear_programme(problem):
    # min Σ |q − L| over all q that can be kept; with a rank's few tokens a path over others may be longer.
    loads_RE, tokens_R, k, lower_E, upper_E = problem
    ranks, experts = loads_RE.shape
    lower_RE, upper_RE = quotas(loads_RE, tokens_R, lower_E, upper_E)
    ours = (lower_RE - loads_RE).clip(min=0).sum() + (loads_RE - upper_RE).clip(min=0).sum()
    each = np.eye(ranks * experts)
    by_rank, by_expert = each.reshape(ranks, experts, -1).sum(1), each.reshape(ranks, experts, -1).sum(0)
    zero = np.zeros_like
    found = linprog(
        np.concatenate([np.zeros(ranks * experts), np.ones(ranks * experts)]),
        A_eq=np.hstack([by_rank, zero(by_rank)]),
        b_eq=k * tokens_R,
        A_ub=np.vstack(
            [
                np.hstack([by_expert, zero(by_expert)]),
                np.hstack([-by_expert, zero(by_expert)]),
                np.hstack([each, -each]),
                np.hstack([-each, -each]),
            ]
        ),
        b_ub=np.concatenate([upper_E, -lower_E, loads_RE.ravel(), -loads_RE.ravel()]),
        bounds=[(0, t) for t in tokens_R.repeat(experts)] + [(0, None)] * (ranks * experts),
        method="highs",
    )
    assert found.status == 0
    assert ours <= found.fun + 1e-6


def test_what_is_too_much_is_taken_from_the_ranks_in_proportion_to_their_loads():
    lower_RE, upper_RE = quotas(
        np.array([[60, 20], [30, 50]]), np.array([80, 80]), np.array([81, 79]), np.array([81, 79])
    )
    assert (lower_RE == upper_RE).all()
    assert (np.array([60, 30]) - lower_RE[:, 0]).tolist() == [6, 3]


def test_ranks_that_cannot_help_alone_help_together():
    # Expert 0 has one too many and expert 2 one too few; rank 0 has no token without expert 2.
    loads_RE = np.array([[1, 0, 1], [0, 1, 0]])
    lower_RE, upper_RE = quotas(loads_RE, np.array([1, 1]), np.array([0, 1, 2]), np.array([0, 1, 2]))
    assert lower_RE.tolist() == upper_RE.tolist() == [[0, 1, 1], [0, 0, 1]]


def test_large_counts_do_not_overflow():
    loads_RE = np.array([[2**45 + 2**40, 2**45 - 2**40], [2**45, 2**45]])
    aim_E = np.array([2**46, 2**46])
    lower_RE, upper_RE = quotas(loads_RE, np.array([2**46, 2**46]), aim_E, aim_E)
    assert (lower_RE == upper_RE).all() and (lower_RE.sum(0) == aim_E).all() and (lower_RE.sum(1) == 2**46).all()
