"""Each form of outputs, read and written by hand-worked numbers."""

import types

import pytest
import torch
from torch import nn

from sinkroute.adapters.hf.contracts import CONTRACTS, Site

CONTRACT = {contract.name: contract for contract in CONTRACTS}
LOGITS = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 0.5]])
OURS = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])  # experts, weights


def site(**attributes):
    host = nn.Module()
    for name, value in attributes.items():
        setattr(host, name, value)
    return Site("gate", host, nn.Module())


def write(name, outputs, where=None, experts_TK=OURS[0], weights_TK=OURS[1]):
    return CONTRACT[name].write(outputs, weights_TK, experts_TK, where or site())


def test_a_triple_keeps_its_logits_its_shapes_and_its_dtypes():
    outputs = LOGITS.view(1, 2, 3), torch.ones(1, 2, 2).bfloat16(), torch.zeros(1, 2, 2, dtype=torch.int32)
    assert CONTRACT["triple"].fits(outputs, site())
    logits, weights, experts = write("triple", outputs)
    assert logits is outputs[0]
    assert weights.dtype == torch.bfloat16 and experts.dtype == torch.int32
    assert weights.tolist() == OURS[1].bfloat16().view(1, 2, 2).tolist() and experts.tolist() == [OURS[0].tolist()]
    decision = CONTRACT["triple"].read((logits, weights, experts), site())
    assert decision.experts_TK.dtype == torch.int64 and decision.logits_TE.shape == (2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        (LOGITS, LOGITS[:, :2]),
        (LOGITS, LOGITS[:, :2], LOGITS[:, :2]),
        (LOGITS, LOGITS[:, :2], torch.zeros(2, 1, dtype=torch.long)),
        (LOGITS, LOGITS[:, :2], torch.full((2, 2), 3)),
        (LOGITS, LOGITS[:, :2], torch.full((2, 2), -1)),
        (LOGITS[:1], LOGITS[:, :2], torch.zeros(2, 2, dtype=torch.long)),
        [LOGITS, LOGITS[:, :2], torch.zeros(2, 2, dtype=torch.long)],
        LOGITS,
    ],
    ids=["two", "no whole numbers", "another width", "too large", "below 0", "other tokens", "a list", "one"],
)
def test_what_is_no_triple(outputs):
    assert not CONTRACT["triple"].fits(outputs, site())


def test_a_triple_in_reverse_stays_in_reverse():
    outputs = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2).bfloat16(), LOGITS
    assert [name for name, contract in CONTRACT.items() if contract.fits(outputs, site())] == ["reversed"]
    experts, weights, logits = write("reversed", outputs)
    assert logits is LOGITS and weights.dtype == torch.bfloat16 and experts.dtype == torch.int32
    decision = CONTRACT["reversed"].read((experts, weights, logits), site())
    assert torch.equal(decision.experts_TK, OURS[0]) and torch.equal(decision.weights_TK, OURS[1].bfloat16())
    assert torch.equal(decision.logits_TE, LOGITS)


def test_a_choice_of_zeros_and_ones_is_no_triple_in_reverse():
    assert not CONTRACT["reversed"].fits((torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), LOGITS), site())


def test_dense_scores_are_0_where_nothing_is_chosen_and_add_where_an_expert_comes_twice():
    outputs = torch.tensor([[0.0, 0.9, 0.8], [0.7, 0.6, 0.0]]), LOGITS
    where = site(top_k=2)
    assert CONTRACT["dense"].fits(outputs, where) and not CONTRACT["dense"].fits(outputs, site(top_k=1))
    decision = CONTRACT["dense"].read(outputs, where)
    assert decision.experts_TK.tolist() == [[1, 2], [0, 1]]
    scores, logits = write("dense", outputs, where)
    assert logits is LOGITS
    torch.testing.assert_close(scores, torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.6, 0.4]]))
    again, _ = write("dense", outputs, where, torch.tensor([[1, 1], [0, 0]]), torch.tensor([[0.5, 0.0], [0.2, 0.1]]))
    torch.testing.assert_close(again, torch.tensor([[0.0, 0.5, 0.0], [0.3, 0.0, 0.0]]))


def test_sorted_pairs_come_expert_by_expert():
    # Token 0 to experts 2 and 0, token 1 to 1 and 2: by expert, places 1 | 2 | 0, 3 of the flattened choice.
    places, tokens, weights, sizes, logits = written = write("sorted", (None, None, torch.ones(4), [1, 1, 2], LOGITS))
    assert places.tolist() == [1, 2, 0, 3] and tokens.tolist() == [0, 1, 0, 1] and sizes == [1, 1, 2]
    torch.testing.assert_close(weights, torch.tensor([0.3, 0.6, 0.7, 0.4]))
    assert logits is LOGITS and CONTRACT["sorted"].fits(written, site())
    decision = CONTRACT["sorted"].read(written, site())
    assert decision.experts_TK.tolist() == OURS[0].tolist()
    assert torch.equal(decision.weights_TK, OURS[1])


def test_one_hot_choices_beyond_capacity_are_dropped_in_the_order_of_the_sequence():
    logits = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]], [[0.0, 1.0]] * 3])
    chosen = torch.tensor([[[0, 1], [0, 0], [1, 0]], [[0, 1], [0, 0], [0, 0]]])
    outputs, where = (chosen, torch.rand(2, 3, 1), logits), site(expert_capacity=1)
    assert CONTRACT["one-hot"].fits(outputs, where) and not CONTRACT["one-hot"].fits(outputs, site())
    assert CONTRACT["one-hot"].read(outputs, where).experts_TK.flatten().tolist() == [1, 1, 0, 1, 1, 1]
    experts_TK = torch.tensor([[0], [1], [1], [1], [0], [1]])
    ours, weights, _ = write("one-hot", outputs, where, experts_TK, torch.arange(6.0)[:, None])
    assert ours.tolist() == [[[1, 0], [0, 1], [0, 0]], [[0, 1], [1, 0], [0, 0]]]
    assert weights.flatten().tolist() == [0, 1, 2, 3, 4, 5] and weights.shape == (2, 3, 1)


def test_by_logits_a_block_chooses_and_weighs_as_we_do():
    written = write("logits", LOGITS)
    weights, experts = written.softmax(-1).topk(2)
    assert experts.tolist() == [[2, 0], [1, 2]]
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), OURS[1])
    assert written.softmax(-1).gather(1, torch.tensor([[1], [0]])).max() < 1e-30


def test_a_shared_expert_keeps_its_share_of_the_scores():
    # w = c s / (Σ s + γ), shared c γ / (Σ s + γ), with c = 2, γ = 0.5 and sigmoids of 0, ln 3, -ln 3: 0.5, 0.75, 0.25.
    third = torch.tensor([[0.0, torch.log(torch.tensor(3.0)), -torch.log(torch.tensor(3.0))]])
    theirs = torch.tensor([[0.75, 0.5]]) * 2 / 1.75
    outputs = third, theirs, torch.tensor([[1, 0]]), torch.tensor([[0.5 * 2 / 1.75]])
    assert CONTRACT["joint"].fits(outputs, site())
    # Experts 0 and 2 instead: their scores are 0.5 and 0.25.
    normalised = torch.tensor([[0.5, 0.25]]) / 0.75
    _, weights, experts, shared = write("joint", outputs, None, torch.tensor([[0, 2]]), normalised)
    assert experts.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.25]]) * 2 / 1.25)
    torch.testing.assert_close(shared, torch.tensor([[0.5 * 2 / 1.25]]))


def test_a_token_that_skips_the_experts_names_the_first_with_weight_0():
    host = types.SimpleNamespace(num_experts=2)
    where = Site("gate", host, None)
    logits = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    state = torch.randn(3)
    outputs = logits, torch.tensor([[0.0], [0.4]]), torch.tensor([[0], [0]]), state
    assert CONTRACT["skipping"].fits(outputs, where)
    decision = CONTRACT["skipping"].read(outputs, where)
    assert decision.experts_TK.tolist() == [[2], [0]]
    torch.testing.assert_close(decision.weights_TK, torch.tensor([[logits[0].softmax(0)[2]], [0.4]]))
    written = write("skipping", outputs, where, torch.tensor([[1], [2]]), torch.tensor([[0.3], [0.9]]))
    assert written[2].tolist() == [[1], [0]] and written[1].tolist() == [[pytest.approx(0.3)], [0.0]]
    assert written[0] is logits and written[3] is state


@pytest.mark.parametrize("name", ["triple", "dense", "sorted", "logits"])
def test_gradients_go_through_the_weights(name):
    outputs = {
        "triple": (LOGITS, LOGITS[:, :2], torch.zeros(2, 2, dtype=torch.long)),
        "dense": (torch.zeros(2, 3), LOGITS),
        "sorted": (None, None, torch.ones(4), [1, 1, 2], LOGITS),
        "logits": LOGITS,
    }[name]
    weights_TK = OURS[1].clone().requires_grad_()
    written = write(name, outputs, None, OURS[0], weights_TK)
    value = {"triple": 1, "dense": 0, "sorted": 2}.get(name)
    result = written.softmax(-1) if value is None else written[value]
    (result * torch.arange(1.0, 1 + result.numel()).view(result.shape)).sum().backward()
    assert weights_TK.grad.isfinite().all() and weights_TK.grad.abs().sum() > 0
