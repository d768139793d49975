"""Dropout inside the experts."""

from __future__ import annotations

import pytest
import torch

from sinkroute import MoE, MultiHeadMoE
from sinkroute.moe.experts import Experts

ENDS = torch.tensor([300, 500], dtype=torch.int32)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_a_share_of_the_hidden_numbers_is_zeroed_and_the_rest_enlarged(activation: str) -> None:
    # Maps that make every hidden number the same, and experts that hand out the 8 numbers as they are.
    experts = Experts(8, 8, 2, activation, dropout=0.25)
    with torch.no_grad():
        experts.w_in.fill_(0.5)
        experts.w_out.copy_(torch.eye(8))
    x_RD = torch.ones(500, 8)
    whole = experts.eval()(x_RD, ENDS)
    torch.manual_seed(0)
    kept = experts.train()(x_RD, ENDS)
    dropped = kept == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.028)  # 4 standard errors of 4000 draws
    torch.testing.assert_close(kept[~dropped], whole[~dropped] / 0.75)


def test_biases_behind_the_hidden_numbers_are_not_dropped() -> None:
    experts = Experts(8, 8, 2, "relu", bias=True, dropout=0.999).train()
    with torch.no_grad():
        experts.w_in.zero_()
        experts.b_out.fill_(3.0)
    assert torch.equal(experts(torch.ones(500, 8), ENDS), torch.full((500, 8), 3.0))


def test_serving_drops_nothing() -> None:
    plain, dropping = (Experts(8, 16, 2, "gelu", dropout=share) for share in (0.0, 0.5))
    dropping.load_state_dict(plain.state_dict())
    x_RD = torch.randn(500, 8)
    assert torch.equal(dropping.eval()(x_RD, ENDS), plain(x_RD, ENDS))


def test_a_repeated_generator_drops_the_same() -> None:
    layer, x = MoE(8, 16, 4, 2, "softmax", dropout=0.5), torch.randn(20, 8)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_layers_hand_it_to_their_experts_and_to_the_shared_one() -> None:
    layer = MoE(8, 16, 4, 2, "softmax", shared_hidden=8, dropout=0.5)
    assert (layer.experts.dropout, layer.shared.dropout) == (0.5, 0.5)
    assert MultiHeadMoE(8, 2, 16, 4, 2, "softmax", dropout=0.5).moe.experts.dropout == 0.5
    assert "dropout=0.5" in repr(layer.experts)
    assert "dropout" not in repr(MoE(8, 16, 4, 2).experts)


def test_without_it_no_generator_is_asked() -> None:
    layer, x = MoE(8, 16, 4, 2, "softmax"), torch.randn(20, 8)
    before = torch.get_rng_state()
    layer.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="dropout must be 0 or more and below 1, got"):
        MoE(8, 16, 4, 2, "softmax", dropout=share)
