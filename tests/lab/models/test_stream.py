"""The stream decoder against slow loops over positions in float64, and what its memory and its quirks promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sinkroute
from sinkroute.lab.config import Config, RouterConfig, StreamConfig
from sinkroute.lab.models import StreamDecoder, make_model
from sinkroute.lab.models.stream import by_distance, by_place

SMALL = StreamConfig(
    vocab=11, layers=2, d_model=8, heads=2, span=3, d_hidden=6, experts=4, top_k=2, sub_tokens=1, dropout=0.0
)
SYMBOLS = torch.randint(11, (2, 10), generator=torch.Generator().manual_seed(0))


def stream(router: str = "softmax", config: StreamConfig = SMALL, **options: object) -> StreamDecoder:
    torch.manual_seed(0)
    return StreamDecoder(config, RouterConfig(router, dict(options)))


def shaken(model: StreamDecoder) -> StreamDecoder:
    """With random numbers in every parameter, so that a missing bias or gain shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To float32: the weights of attention are computed in it, whatever the model's dtype."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- the slow oracle: one symbol at a time, from the definition --


def slow_forward(model: StreamDecoder, symbols_L: list[int], memory_NSD: Tensor) -> tuple[Tensor, Tensor]:
    """(L, V) scores and the memory of one stream; `memory_NSD` holds what each block was last given."""
    weights = dict(model.named_parameters())
    h = [weights["embed.weight"][symbol] for symbol in symbols_L]
    kept = []
    for number in range(len(model.blocks)):
        own = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{number}.")
        }
        line = [*memory_NSD[number], *h]
        kept.append(torch.stack(line[-model.config.span :]))
        h = [slow_block(model.config, own, weights["positions_dS"], line, place) for place in range(len(h))]
    return torch.stack([weights["head.weight"] @ x + weights["head.bias"] for x in h]), torch.stack(kept)


def slow_block(config: StreamConfig, own: dict[str, Tensor], positions: Tensor, line: list[Tensor], l: int) -> Tensor:  # noqa: E741
    x, seen = line[config.span + l], line[l : config.span + l]
    x = norm(own, "attention_norm", x + slow_attention(config, own, positions, x, seen))
    if "dense.0.weight" in own:
        hidden = (own["dense.0.weight"] @ x + own["dense.0.bias"]).clamp(min=0)
        return norm(own, "dense_norm", x + own["dense.3.weight"] @ hidden + own["dense.3.bias"])
    if config.sub_tokens == 1:
        y = slow_mixture(config, own, "mixture.moe.", x)
    else:
        split = own["mixture.moe.split.weight"] @ x + own["mixture.moe.split.bias"]
        parts = [slow_mixture(config, own, "mixture.moe.moe.", part) for part in split.chunk(config.sub_tokens)]
        y = own["mixture.moe.merge.weight"] @ torch.cat(parts) + own["mixture.moe.merge.bias"]
    return norm(own, "mixture_norm", x + norm(own, "mixture.norm", x + y))


def slow_attention(
    config: StreamConfig, own: dict[str, Tensor], positions_dS: Tensor, x: Tensor, seen: list[Tensor]
) -> Tensor:
    """Score of the s-th symbol seen, oldest first: q·k_s + q·position_s, over √d. All of them lie before `x`."""
    width = config.d_model // config.heads
    heads = []
    for head in range(config.heads):
        rows = slice(head * width, (head + 1) * width)
        query = own["attention.query.weight"][rows] @ x
        scores, values = [], []
        for place, other in enumerate(seen):
            key = own["attention.key.weight"][rows] @ other
            scores.append((query @ key + query @ positions_dS[:, place]) / width**0.5)
            values.append(own["attention.value.weight"][rows] @ other)
        shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
    return own["attention.out.weight"] @ torch.cat(heads)


def slow_mixture(config: StreamConfig, own: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Softmax over the K largest scores of the gate, which has a bias; experts with ReLU and biases."""
    logits = own[f"{prefix}gate.weight"] @ x + own[f"{prefix}gate.bias"]
    chosen = sorted(range(config.experts), key=lambda expert: -logits[expert].item())[: config.top_k]
    shares = logits[chosen].exp() / logits[chosen].exp().sum()
    y = torch.zeros_like(x)
    for share, e in zip(shares, chosen, strict=True):
        hidden = own[f"{prefix}experts.w_in"][e] @ x + own[f"{prefix}experts.b_in"][e]
        y = y + share * (own[f"{prefix}experts.w_out"][e] @ hidden.clamp(min=0) + own[f"{prefix}experts.b_out"][e])
    return y


def norm(own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * own[f"{name}.weight"] + own[f"{name}.bias"]


VARIANTS = [{}, {"sub_tokens": 2}, {"dense_blocks": True}, {"span": 7, "heads": 4}, {"top_k": 3}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_two_blocks_one_after_the_other_are_what_loops_compute(variant: dict) -> None:
    model = shaken(stream(config=replace(SMALL, **variant))).double().eval()
    memory_NBSD, slow_memory = None, model.start(2).transpose(0, 1)
    for block_BL in SYMBOLS.split(5, dim=1):
        scores_BLV, memory_NBSD = model(block_BL, memory_NBSD)
        slow = [slow_forward(model, *row) for row in zip(block_BL.tolist(), slow_memory, strict=True)]
        slow_memory = torch.stack([memory for _, memory in slow])
        assert_close(scores_BLV, torch.stack([scores for scores, _ in slow]))
        assert_close(memory_NBSD, slow_memory.transpose(0, 1))


def test_a_training_step_is_that_of_the_loops() -> None:
    model = shaken(stream()).double().train()
    scores_BLV, _ = model(SYMBOLS)
    scores_BLV.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    slow = [slow_forward(model, row, model.start(1)[:, 0])[0] for row in SYMBOLS.tolist()]
    torch.stack(slow).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in found
        else:
            assert_close(found[name], parameter.grad)


# -- quirks --


@pytest.mark.parametrize(("dense", "unused"), [(False, "dense_norm"), (True, "mixture_norm")])
def test_one_norm_of_each_block_is_counted_and_never_learns(dense: bool, unused: str) -> None:
    model = stream(config=replace(SMALL, dense_blocks=dense))
    model(SYMBOLS)[0].square().sum().backward()
    number = 1 if dense else 0  # with dense blocks, every second one
    idle = {name for name, parameter in model.blocks[number].named_parameters() if parameter.grad is None}
    assert idle == {f"{unused}.weight", f"{unused}.bias"}


def test_a_symbol_attends_to_the_span_before_it_and_not_to_itself() -> None:
    model = shaken(stream())
    own, seen = torch.randn(1, 5, 8), torch.randn(1, 8, 8, requires_grad=True)
    out = model.blocks[0].attention(own, seen, model.positions_dS)
    for place in range(5):
        (gradient,) = torch.autograd.grad(out[0, place].sum(), seen, retain_graph=True)
        met = gradient[0].any(-1).nonzero().flatten().tolist()
        assert met == [place, place + 1, place + 2]  # itself is place + 3 of the memory of 3 and the block of 5


def test_scores_depend_on_earlier_symbols_and_on_their_own_alone() -> None:
    model = shaken(stream())
    kept = []
    model.embed.register_forward_hook(lambda module, inputs, output: kept.append(output))
    scores_BLV, _ = model(SYMBOLS)
    for place in (0, 4, 9):
        (gradient,) = torch.autograd.grad(scores_BLV[0, place].sum(), kept[0], retain_graph=True)
        met = gradient[0].any(-1).nonzero().flatten().tolist()
        # 2 layers that see 3 back each: 6 symbols before their own.
        assert met == list(range(max(place - 6, 0), place + 1))
        assert not gradient[1].any()


def test_zeros_at_the_beginning_are_attended_to() -> None:
    # All scores equal: of the first symbol's 3 places all are zeros, of the second's 2.
    model = stream()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.value.weight.copy_(torch.eye(8))
        attention.out.weight.copy_(torch.eye(8))
    h = torch.arange(1.0, 6.0)[None, :, None].expand(1, 5, 8)
    out = attention(h, torch.cat((torch.zeros(1, 3, 8), h), 1), model.positions_dS)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.0, 1 / 3, 1.0, 2.0, 3.0]))


def test_places_are_shared_by_layers_and_heads_and_begin_as_normal_numbers() -> None:
    model = stream(config=replace(SMALL, d_model=64, span=400))
    assert [name for name, _ in model.named_parameters() if "position" in name] == ["positions_dS"]
    assert model.positions_dS.shape == (32, 400)
    assert model.positions_dS.std().item() == pytest.approx(1, abs=0.02)


def test_blocks_with_mixtures_and_dense_ones_take_turns() -> None:
    model = stream(config=replace(SMALL, dense_blocks=True))
    assert [block.mixture is not None for block in model.blocks] == [True, False, True, False]
    assert model.start(3).shape == (4, 3, 3, 8)


def test_rows_by_distance_and_by_place_are_each_others_inverse() -> None:
    weights = torch.randn(2, 3, 6, 4)  # 6 symbols, a span of 4
    spread = by_place(weights)
    assert spread.shape == (2, 3, 6, 10)
    for row in range(6):
        assert torch.equal(spread[..., row, row : row + 4], weights[..., row, :])
    torch.testing.assert_close(spread.sum(-1), weights.sum(-1))
    assert torch.equal(by_distance(spread, 4), weights)


# -- memory --


def test_a_text_read_in_blocks_is_a_text_read_at_once() -> None:
    model = shaken(stream()).eval()
    whole, _ = model(SYMBOLS)
    memory, parts = None, []
    for block in SYMBOLS.split([4, 1, 5], dim=1):
        scores, memory = model(block, memory)
        parts.append(scores)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_into_the_block_before() -> None:
    model = stream()
    _, memory = model(torch.tensor([[1, 2, 3, 4]]))
    assert not memory.requires_grad
    scores, _ = model(torch.tensor([[5, 6, 7, 8]]), memory)
    scores.square().sum().backward()
    assert model.embed.weight.grad.any(-1).nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_an_aligned_memory_is_that_of_its_own_stream() -> None:
    model = shaken(stream()).eval()
    _, memory = model(SYMBOLS)
    _, swapped = model(SYMBOLS.flip(0))
    torch.testing.assert_close(memory.flip(1), swapped)


def test_padding_at_the_end_changes_nothing_before_it_and_is_not_counted() -> None:
    model = shaken(stream("load-balance")).eval()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    scores, _ = model(SYMBOLS.masked_fill(~mask, 0), None, mask)
    assert [int(layer.routes.load.sum()) for layer in model.moe_layers] == [2 * 16] * 2
    torch.testing.assert_close(scores[mask], model(SYMBOLS)[0][mask])


# -- training --


@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_every_router_trains_a_step(router: str) -> None:
    model = stream(router)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for step in range(2):
        sinkroute.set_step(model, step, total_steps=100)
        scores, _ = model(SYMBOLS[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), SYMBOLS[:, 1:].flatten())
        auxiliary = model.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sinkroute.end_step(model)
    assert model.eval()(SYMBOLS)[0].isfinite().all()


@pytest.mark.parametrize("place", ["attention.dropout", "mixture.dropout", "mixture.moe.experts"])
def test_dropout_acts_in_attention_in_the_experts_and_behind_the_mixture(place: str) -> None:
    model = stream()
    module = model.blocks[0].get_submodule(place)
    before, _ = model(SYMBOLS)
    setattr(module, "dropout" if place.endswith("experts") else "p", 0.5)
    assert not torch.allclose(model(SYMBOLS)[0], before)
    assert torch.equal(model.eval()(SYMBOLS)[0], before)


def test_dropout_is_handed_to_all_three_and_to_dense_layers() -> None:
    blocks = stream(config=replace(SMALL, dropout=0.7, dense_blocks=True)).blocks
    mixture, dense = blocks[0], blocks[1]
    shares = (mixture.attention.dropout.p, mixture.mixture.dropout.p, mixture.mixture.moe.experts.dropout)
    assert (*shares, dense.dense[2].p) == (0.7,) * 4


@pytest.mark.parametrize("sub_tokens", [1, 2])
def test_the_gate_has_a_bias(sub_tokens: int) -> None:
    model = stream(config=replace(SMALL, sub_tokens=sub_tokens))
    assert all(layer.gate.bias.shape == (4,) for layer in model.moe_layers)


def test_autocast_changes_scores_by_rounding_only_and_leaves_the_memory_in_float32() -> None:
    model = shaken(stream()).eval()
    memory = rounded_memory = None
    for block in SYMBOLS.split(5, dim=1):
        exact, memory = model(block, memory)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, rounded_memory = model(block, rounded_memory)
        assert rounded_memory.dtype == torch.float32
        assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_weights_survive_a_round_trip() -> None:
    model = shaken(stream("ssr-s", config=replace(SMALL, sub_tokens=2)))
    other = make_model(Config(seed=5, model=replace(SMALL, sub_tokens=2), router=RouterConfig("ssr-s")))
    assert not torch.equal(other.eval()(SYMBOLS)[0], model.eval()(SYMBOLS)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(SYMBOLS)[0], model(SYMBOLS)[0])


# -- counts --


def test_parameters_are_counted_exactly() -> None:
    # D=8, V=11, F=6, E=4, 2 layers. Embedding 88, head 88 + 11, places 4·3 = 12.
    # A mixture: gate 4·8 + 4, experts 4·(48 + 6 + 48 + 8). A block: attention 4·64, four norms of 16.
    experts = 4 * (2 * 48 + 6 + 8)
    block = 4 * 64 + 4 * 16 + 36 + experts
    found = stream().count_parameters()
    assert found == (88 + 99 + 12 + 2 * block, 88 + 99 + 12 + 2 * (block - experts // 2), 36 + experts)


def test_of_two_sub_tokens_a_token_meets_twice_as_many_experts() -> None:
    # Width 4: split and merge 2·72, gate 4·4 + 4, experts 4·(24 + 6 + 24 + 4). 2·2 of 4 experts are all of them.
    config = replace(SMALL, sub_tokens=2)
    found = stream(config=config).count_parameters()
    assert found.per_moe == 144 + 20 + 4 * 58
    assert found.active == found.total
    assert stream(config=replace(config, top_k=1)).count_parameters().active == found.total - 2 * 4 * 58 // 2


# -- bad input --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "d_model=8 must be a multiple of heads=3"),
        ({"layers": 0}, r"model\.layers must be 1 or more, got 0"),
        ({"span": 0}, r"model\.span must be 1 or more, got 0"),
        ({"sub_tokens": 0}, "sub_tokens must be 1 or more, got 0"),
        ({"sub_tokens": 3}, "heads must divide d_model=8, got 3"),
        ({"dropout": 1.0}, "dropout must be 0 or more and below 1, got 1.0"),
        ({"top_k": 5}, "top_k must be between 1 and num_experts=4, got 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(config=replace(SMALL, **change))


def test_a_memory_of_another_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError):
        stream()(SYMBOLS, torch.zeros(3, 2, 3, 8))
