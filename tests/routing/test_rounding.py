"""The best rounding of balanced loads, from the worst, by a linear programme of SciPy."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch

from sinkroute.routing.rounding import best_rounding


def best_assignment(scores_TE, top_k, lower_E, upper_E):
    """(T, K) experts and the largest sum with loads within the bounds; the programme's corners are whole numbers."""
    tokens, experts = scores_TE.shape
    columns = scipy.sparse.kron(np.ones((1, tokens)), scipy.sparse.eye(experts))
    found = scipy.optimize.linprog(
        -scores_TE.numpy().ravel(),
        A_ub=scipy.sparse.vstack([columns, -columns]),
        b_ub=np.concatenate([upper_E, -lower_E]),
        A_eq=scipy.sparse.kron(scipy.sparse.eye(tokens), np.ones((1, experts))),
        b_eq=[top_k] * tokens,
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen = found.x.reshape(tokens, experts).round().astype(bool)
    return torch.from_numpy(chosen.nonzero()[1].reshape(tokens, top_k)), -found.fun


def total(scores_TE, experts_TK):
    return scores_TE.gather(1, experts_TK).sum().item()


@pytest.mark.parametrize("rounded", [False, True])  # True: with many ties
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(13, 8, 1), (3, 9, 1), (1, 6, 2), (11, 7, 2), (15, 8, 3), (5, 6, 5)]
)
def test_from_any_best_assignment_the_best_rounding_is_reached(tokens, experts, top_k, rounded):
    least, more = divmod(tokens * top_k, experts)
    for seed in range(6):
        scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).double()
        scores_TE = scores_TE.round() if rounded else scores_TE
        scores_TE += torch.linspace(0, seed, experts)  # those at the end are wanted
        load_E = np.where(np.arange(experts) < more, least + 1, least)  # those at the start get one more
        start_TK, worse = best_assignment(scores_TE, top_k, load_E, load_E)
        _, best = best_assignment(scores_TE, top_k, np.full(experts, least), np.full(experts, least + 1))
        experts_TK = best_rounding(scores_TE, start_TK)
        assert total(scores_TE, experts_TK) == pytest.approx(best, abs=1e-6) and best >= worse - 1e-6
        assert set(torch.bincount(experts_TK.flatten(), minlength=experts).tolist()) <= {least, least + 1}
        assert all(len(set(row)) == top_k for row in experts_TK.tolist())


def test_padding_keeps_its_place_and_real_tokens_their_rows():
    scores_TE = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 1], [0, 0, 0], [0, 0, 5]])
    mask = torch.tensor([True, False, True, True, False])
    # Three of five are real. Loads must be one each: nothing may change.
    even_TK = torch.tensor([[0], [2], [2], [1], [0]])
    assert torch.equal(best_rounding(scores_TE, even_TK, mask), even_TK)
    # Two of five are real. They have experts 0 and 1; the second wants 2.
    mask[3] = False
    experts_TK = best_rounding(scores_TE, torch.tensor([[0], [2], [1], [1], [0]]), mask)
    assert experts_TK.flatten().tolist() == [0, 2, 2, 1, 0]


def test_equal_loads_are_left_alone():
    experts_TK = torch.tensor([[1], [0]])
    assert best_rounding(torch.zeros(2, 2), experts_TK) is experts_TK
