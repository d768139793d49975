"""Experts choose tokens: against a slow loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkroute.routing.expert_side import take_best_tokens


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 6),
    per_token=st.floats(0.3, 3),
    seed=st.integers(0, 2**32),
    masked=st.booleans(),
    tied=st.booleans(),
)
def test_each_expert_takes_its_best_real_tokens_of_equal_ones_the_first(tokens, experts, per_token, seed, masked, tied):
    generator = torch.Generator().manual_seed(seed)
    values_TE = torch.randn(tokens, experts, generator=generator)
    values_TE = values_TE.round() if tied else values_TE
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    real = [t for t in range(tokens) if mask is None or mask[t]]
    ranked = [sorted(real, key=lambda t: -values_TE[t, expert].item()) for expert in range(experts)]
    in_all = max(math.floor(len(real) * per_token + 1e-9), experts)
    sizes = [min(in_all // experts, len(real))] * experts
    if sizes[0] < len(real):
        wanted = sorted(range(experts), key=lambda expert: -values_TE[ranked[expert][sizes[0]], expert].item())
        for expert in wanted[: in_all % experts]:
            sizes[expert] += 1
    expected = {(token, expert) for expert in range(experts) for token in ranked[expert][: sizes[expert]]}
    experts_TK, chosen_TK = take_best_tokens(values_TE, per_token, mask, least_width=1)
    found = {
        (token, expert)
        for token in range(tokens)
        for expert, chosen in zip(experts_TK[token].tolist(), chosen_TK[token].tolist(), strict=True)
        if chosen
    }
    assert found == expected
    assert all(len(set(row)) == len(row) for row in experts_TK.tolist())
    width = max([1, *(sum(token == t for t, _ in expected) for token in range(tokens))])
    assert experts_TK.shape == (tokens, width)


def test_a_tokens_experts_come_by_descending_value():
    experts_TK, chosen_TK = take_best_tokens(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]), 1.5, None, 2)
    assert experts_TK[0].tolist() == [1, 2, 0] and chosen_TK[0].all() and not chosen_TK[1].any()


def test_equal_tokens_are_spread_over_the_experts_by_a_seed():
    values_TE = torch.zeros(64, 8)
    _, by_order_TK = take_best_tokens(values_TE, 2.0, None, 1)
    assert by_order_TK.sum(1).tolist() == [8] * 16 + [0] * 48  # every expert takes the same tokens
    _, drawn_TK = take_best_tokens(values_TE, 2.0, None, 1, torch.tensor(3))
    assert drawn_TK.sum() == 128 and drawn_TK.any(1).sum() > 48


@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_token_gives_the_least_width(mask):
    experts_TK, chosen_TK = take_best_tokens(torch.empty(0, 5), 2.0, mask, 2)
    assert experts_TK.shape == chosen_TK.shape == (0, 2)


def test_masked_tokens_are_never_taken():
    _, chosen_TK = take_best_tokens(torch.randn(4, 3), 1.0, torch.zeros(4, dtype=torch.bool), 1)
    assert not chosen_TK.any()
