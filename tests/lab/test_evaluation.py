"""Evaluation: every byte once, as the model serves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sinkroute.lab.config import ModelConfig, RouterConfig
from sinkroute.lab.evaluation import Score, evaluate_text
from sinkroute.lab.models import Decoder


def decoder(router: str = "softmax", **options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(layers=2, d_model=32, heads=2, d_hidden=16), RouterConfig(router, dict(options)))


TEXT = np.frombuffer(b"It was the best of times, it was the worst of times, and it was bytes.", dtype=np.uint8)


def test_bits_are_those_of_one_window_at_a_time() -> None:
    model = decoder()
    found = evaluate_text(model, TEXT, length=16, batch=3, before=ord("x"))
    nats, context = 0.0, np.concatenate([[ord("x")], TEXT[:-1]])
    model.eval()
    for start in range(0, len(TEXT), 16):  # 70 bytes: the last window has 6
        inputs = torch.from_numpy(context[start : start + 16].astype(np.int64))[None]
        targets = torch.from_numpy(TEXT[start : start + 16].astype(np.int64))
        nats += F.cross_entropy(model(inputs)[0].double(), targets, reduction="sum").item()
    assert found.bits == pytest.approx(nats / len(TEXT) / math.log(2), rel=1e-6)
    assert found.count == len(TEXT) == 70
    assert found.perplexity == pytest.approx(2**found.bits)


def test_loads_count_every_byte_once_per_layer_and_choice() -> None:
    found = evaluate_text(decoder(), TEXT, length=16, batch=2)
    assert found.load_LE.dtype == torch.int64
    assert found.load_LE.sum(1).tolist() == [2 * len(TEXT), 2 * len(TEXT)]
    serving = found.serving()
    assert serving["experts"] == 16
    assert serving["load"] == found.load_LE.tolist()
    by_hand = [load.max().item() / (2 * len(TEXT) / 8) - 1 for load in found.load_LE]
    assert serving["max_vio"] == pytest.approx(sum(by_hand) / 2)


def test_the_size_of_a_batch_does_not_matter() -> None:
    one = evaluate_text(decoder(), TEXT, length=8, batch=1)
    all_ = evaluate_text(decoder(), TEXT, length=8, batch=100)
    assert one.bits == pytest.approx(all_.bits, rel=1e-6)
    assert torch.equal(one.load_LE, all_.load_LE)


def test_a_stochastic_router_serves_without_noise_and_plan() -> None:
    plain = evaluate_text(decoder(), TEXT, length=16, batch=8)
    noisy = evaluate_text(decoder("ssr-s", probability=1.0, noise=4.0), TEXT, length=16, batch=8)
    assert noisy.bits == plain.bits


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = decoder().train()
    evaluate_text(model, TEXT, length=16, batch=8)
    assert model.training
    evaluate_text(model.eval(), TEXT, length=16, batch=8)
    assert not model.training


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        evaluate_text(decoder(), TEXT[:0], length=16, batch=8)


def test_a_score_is_that_of_one_symbol_after_another() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BLV = 3 * torch.randn(4, 5, 7, generator=generator)
    targets_BL = torch.randint(7, (4, 5), generator=generator)
    mask_BL = torch.rand(4, 5, generator=generator) < 0.6
    score = Score(load_LE=torch.ones(1, 2, dtype=torch.int64), violations=[0.0])
    score.add(scores_BLV[:2], targets_BL[:2], mask_BL[:2])
    score.add(scores_BLV[2:], targets_BL[2:], mask_BL[2:])
    score.add(scores_BLV[0], targets_BL[0])  # without a mask all count
    nats, wrong, count = 0.0, 0, 0
    places = [(b, i) for b in range(4) for i in range(5) if mask_BL[b, i]] + [(0, i) for i in range(5)]
    for b, i in places:
        row = [math.exp(value) for value in scores_BLV[b, i].tolist()]
        nats -= math.log(row[targets_BL[b, i]] / sum(row))
        wrong += max(range(7), key=row.__getitem__) != targets_BL[b, i]
        count += 1
    found = score.found()
    assert (found.count, found.wrong) == (count, wrong)
    assert found.nats == pytest.approx(nats / count, rel=1e-6)
    assert found.error == pytest.approx(100 * wrong / count)
    assert found.bits == pytest.approx(nats / count / math.log(2), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-6)


def test_a_model_that_is_lost_has_a_perplexity_that_can_be_written() -> None:
    score = Score(load_LE=torch.ones(1, 2, dtype=torch.int64), violations=[0.0])
    score.add(torch.tensor([[0.0, 5000.0]]), torch.tensor([0]))
    assert score.found().nats == 5000.0
    assert math.isfinite(score.found().perplexity)


@pytest.mark.parametrize("training", [True, False])
def test_serving_is_over_also_after_an_error(training: bool) -> None:
    model = decoder().train(training)

    def fail(done: int, whole: int) -> None:
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        evaluate_text(model, TEXT, length=16, batch=2, on_batch=fail)
    assert model.training is training and model.blocks[0].training is training
    assert torch.is_grad_enabled()


def test_a_router_that_is_noisy_when_serving_does_not_repeat_itself_and_does_not_change_with_what_was_before() -> None:
    model = decoder("ssr-s", noise=4.0, noise_scale="absolute", inference="noise")
    text = np.tile(TEXT[:16], 2)  # two passes over the same symbols
    first, again = (evaluate_text(model, text, length=16, batch=1) for _ in range(2))
    assert first.nats == again.nats and torch.equal(first.load_LE, again.load_LE)
    alone = evaluate_text(model, text[:16], length=16, batch=1)
    assert not torch.equal(first.load_LE, 2 * alone.load_LE)
