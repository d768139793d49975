"""The decoder: causal, position-aware, exact in its counts."""

from __future__ import annotations

import pytest
import torch

import sinkroute
from sinkroute.lab.config import ModelConfig, RouterConfig
from sinkroute.lab.models import Decoder
from sinkroute.lab.models.decoder import _rotate, _rotations

SMALL = ModelConfig(layers=2, d_model=32, heads=2, d_hidden=24, experts=4, top_k=2)


def decoder(router: str = "softmax", config: ModelConfig = SMALL, **options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config, RouterConfig(router, dict(options)))


def test_a_symbol_does_not_see_later_ones() -> None:
    model = decoder().eval()
    symbols = torch.randint(0, 256, (1, 12))
    changed = symbols.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 256
    # Not bit-equal: another grouping of rows by expert may sum in another order.
    torch.testing.assert_close(model(symbols)[0, :7], model(changed)[0, :7], atol=1e-6, rtol=0)
    assert not torch.allclose(model(symbols)[0, 7:], model(changed)[0, 7:])


def test_attention_sees_earlier_symbols_and_their_order() -> None:
    model = decoder().eval()
    one, other = torch.tensor([[65, 66, 67, 68]]), torch.tensor([[66, 65, 67, 68]])
    assert not torch.allclose(model(one)[0, -1], model(other)[0, -1], atol=1e-5)


def test_padding_at_the_end_changes_nothing_before_it() -> None:
    model = decoder().eval()
    symbols = torch.randint(0, 256, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    padded = symbols.masked_fill(~mask, 0)
    scores = model(padded, mask)
    assert int(model.moe_layers[0].routes.load.sum()) == 2 * int(mask.sum())
    torch.testing.assert_close(scores[mask], model(symbols)[mask])


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    cos, sin = _rotations(20, 8, torch.device("cpu"))
    query, key = torch.randn(8), torch.randn(8)
    turned_q = _rotate(query.expand(20, 8), cos, sin)
    turned_k = _rotate(key.expand(20, 8), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), query.norm().expand(20))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[5, 2], products[17, 14], atol=1e-5, rtol=1e-5)


def test_parameters_are_counted_exactly() -> None:
    # D=32, V=256, F=24, E=4, 2 layers. Embedding and head: 2·256·32 = 16384; final norm 32.
    # A block: norms 64, attention 4·32² = 4096, gate 4·32 = 128, experts 4·3·32·24 = 9216. Active: half the experts.
    model = decoder()
    total, active, per_moe = model.count_parameters()
    assert total == 16384 + 32 + 2 * (64 + 4096 + 128 + 9216) == sum(p.numel() for p in model.parameters())
    assert active == total - 2 * 9216 // 2
    assert per_moe == 9216 + 128


def test_a_shared_expert_is_always_active() -> None:
    config = ModelConfig(layers=1, d_model=32, heads=2, d_hidden=24, experts=4, top_k=1, shared_hidden=16)
    total, active, _ = decoder(config=config).count_parameters()
    assert total - active == 3 * 4 * 3 * 32 * 24 // 4


def test_auxiliary_losses_of_all_layers_are_added() -> None:
    model = decoder("load-balance", coefficient=1.0)
    assert model.auxiliary_loss() is None
    model(torch.randint(0, 256, (2, 16)))
    losses = [layer.routes.aux_loss for layer in model.moe_layers]
    torch.testing.assert_close(model.auxiliary_loss(), losses[0] + losses[1])
    plain = decoder("softmax")
    plain(torch.randint(0, 256, (2, 16)))
    assert plain.auxiliary_loss() is None


def test_all_methods_start_from_the_same_weights() -> None:
    first = decoder("softmax").state_dict()
    for name in ("load-balance", "z-loss", "sinkhorn", "ssr-l", "ssr-s"):
        other = decoder(name).state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_every_router_trains_a_step(router: str) -> None:
    model = decoder(router)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    symbols = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(2):
        sinkroute.set_step(model, step, total_steps=100)
        scores = model(symbols[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), symbols[:, 1:].flatten())
        auxiliary = model.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sinkroute.end_step(model)
    assert model.eval()(symbols).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "d_model=32 must be a multiple of 2 \\* heads"),
        ({"layers": 0}, "layers must be 1 or more"),
        ({"activation": "swiglo"}, "unknown activation 'swiglo'; did you mean 'swiglu'"),
        ({"top_k": 5}, "top_k must be between 1 and num_experts=4, got 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        decoder(config=replace(SMALL, **change))
