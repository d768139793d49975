"""Evaluation: every byte once, as the model serves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sinkroute.lab.config import ModelConfig, RouterConfig
from sinkroute.lab.evaluation import evaluate_text
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
    assert found.bits_per_byte == pytest.approx(nats / len(TEXT) / math.log(2), rel=1e-6)
    assert found.bytes == len(TEXT) == 70
    assert found.perplexity == pytest.approx(2**found.bits_per_byte)


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
    assert one.bits_per_byte == pytest.approx(all_.bits_per_byte, rel=1e-6)
    assert torch.equal(one.load_LE, all_.load_LE)


def test_a_stochastic_router_serves_without_noise_and_plan() -> None:
    plain = evaluate_text(decoder(), TEXT, length=16, batch=8)
    noisy = evaluate_text(decoder("ssr-s", probability=1.0, noise=4.0), TEXT, length=16, batch=8)
    assert noisy.bits_per_byte == plain.bits_per_byte


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = decoder().train()
    evaluate_text(model, TEXT, length=16, batch=8)
    assert model.training
    evaluate_text(model.eval(), TEXT, length=16, batch=8)
    assert not model.training


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        evaluate_text(decoder(), TEXT[:0], length=16, batch=8)
