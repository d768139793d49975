"""BASE: the best balanced assignment there is, by two solvers of SciPy."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch

import sinkroute


def make(experts, top_k=1, **options):
    return sinkroute.create_router("base", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def best_total_of_one_each(logits_TE):
    """The largest sum with loads ⌊T/E⌋ or ⌈T/E⌉, as a square assignment: an expert has ⌊T/E⌋ places that must be taken
    and one that may be; rows without a token take what is left of the latter."""
    values = logits_TE.double().numpy()
    tokens, experts = values.shape
    must = tokens // experts
    square = np.zeros((experts * (must + 1), experts * (must + 1)))
    square[:tokens] = np.repeat(values, must + 1, axis=1)
    square[tokens:] = np.where(np.arange(experts * (must + 1)) % (must + 1) < must, -1e9, 0.0)
    return square[scipy.optimize.linear_sum_assignment(square, maximize=True)].sum()


def best_total(logits_TE, top_k):
    """The same for any K, as a linear programme (its corners are whole numbers)."""
    values = logits_TE.double().numpy()
    tokens, experts = values.shape
    rows = scipy.sparse.kron(scipy.sparse.eye(tokens), np.ones((1, experts)))
    columns = scipy.sparse.kron(np.ones((1, tokens)), scipy.sparse.eye(experts))
    low, high = tokens * top_k // experts, -(-tokens * top_k // experts)
    found = scipy.optimize.linprog(
        -values.ravel(),
        A_ub=scipy.sparse.vstack([columns, -columns]),
        b_ub=[high] * experts + [-low] * experts,
        A_eq=rows,
        b_eq=[top_k] * tokens,
        bounds=(0, 1),
    )
    return -found.fun


def total(logits_TE, routes):
    return logits_TE.double().gather(1, routes.experts).sum().item()


@pytest.mark.parametrize(("tokens", "experts"), [(24, 4), (25, 4), (27, 4), (3, 5), (1, 4), (5, 1), (40, 16)])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties", "all equal"])
def test_no_balanced_assignment_has_a_larger_sum(kind, tokens, experts):
    logits_TE = random(tokens, experts)
    if kind == "skewed":
        logits_TE[:, 0] += 8
    elif kind == "ties":
        logits_TE = logits_TE.round()
    elif kind == "all equal":
        logits_TE.zero_()
    routes = make(experts)(logits_TE)
    assert total(logits_TE, routes) == pytest.approx(best_total_of_one_each(logits_TE), abs=1e-9)
    assert set(routes.load.tolist()) <= {tokens // experts, -(-tokens // experts)}
    assert routes.branch == "assignment"


@pytest.mark.parametrize("top_k", [2, 3, 5])
@pytest.mark.parametrize("skew", [0.0, 6.0])
def test_several_experts_per_token_are_distinct_and_best_too(top_k, skew):
    logits_TE = random(23, 5)
    logits_TE[:, 1] += skew
    routes = make(5, top_k)(logits_TE)
    assert total(logits_TE, routes) == pytest.approx(best_total(logits_TE, top_k), abs=1e-6)
    assert all(len(set(row)) == top_k for row in routes.experts.tolist())
    assert set(routes.load.tolist()) <= {23 * top_k // 5, -(-23 * top_k // 5)}
    assert (logits_TE.gather(1, routes.experts).diff(dim=1) <= 0).all()  # best first


def test_padding_takes_no_place_in_the_assignment():
    logits_TE, mask = random(30, 4), torch.arange(30) % 3 != 0
    logits_TE[~mask] = 50
    routes = make(4)(logits_TE, mask)
    assert routes.load.tolist() == [5, 5, 5, 5] and not routes.weights[~mask].any()
    chosen = logits_TE.double().gather(1, routes.experts)[mask].sum().item()
    assert chosen == pytest.approx(best_total_of_one_each(logits_TE[mask]), abs=1e-9)


def test_bfloat16_logits_are_assigned_by_their_values():
    logits_TE = random(32, 4).bfloat16()
    routes = make(4)(logits_TE)
    assert total(logits_TE, routes) == pytest.approx(best_total_of_one_each(logits_TE), abs=1e-9)
    assert routes.weights.dtype == torch.float32


def test_weights_are_sigmoids_and_so_is_their_gradient():
    # Both tokens want expert 0; the second wants it more, the first gets expert 1 with logit ln 3: σ = 3/4.
    # The second's is ln 4: σ = 4/5. Derivatives σ(1 − σ): 3/16 and 4/25.
    logits_TE = torch.tensor([[4.0, 3.0], [4.0, 1.0]]).log().requires_grad_()
    routes = make(2)(logits_TE)
    routes.weights.sum().backward()
    assert routes.experts.tolist() == [[1], [0]]
    torch.testing.assert_close(routes.weights.detach(), torch.tensor([[0.75], [0.8]]))
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[0, 3 / 16], [4 / 25, 0]]))


def test_several_weights_are_sigmoids_that_need_not_sum_to_1():
    routes = make(2, 2)(torch.tensor([[3.0, 1.0]]).log())
    torch.testing.assert_close(routes.weights, torch.tensor([[0.75, 0.5]]))
    normalised = make(2, 2, norm_topk=True)(torch.tensor([[3.0, 1.0]]).log())
    torch.testing.assert_close(normalised.weights, torch.tensor([[0.6, 0.4]]))


def test_serving_is_greedy():
    routes = make(2).eval()(torch.tensor([[4.0, 3.0], [4.0, 1.0]]).log())
    assert routes.experts.tolist() == [[0], [0]] and routes.branch == "softmax"
    torch.testing.assert_close(routes.weights, torch.tensor([[0.8], [0.8]]))


def test_the_same_logits_get_the_same_experts():
    logits_TE = random(50, 4).round()  # many ties
    assert torch.equal(make(4)(logits_TE).experts, make(4)(logits_TE).experts)


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"top_groups=1 of groups=2: BaseRouter cannot"):
        make(4, groups=2, top_groups=1)
