"""Windows of a text, each by itself."""

from __future__ import annotations

import pytest
import torch

from sinkroute.lab.config import Config, ModelConfig
from sinkroute.lab.models import make_model
from sinkroute.lab.tasks import make_task
from sinkroute.lab.tasks.windows import WindowTask

from .small import WORDS, config, words


def of_windows(**sections: dict) -> Config:
    settings = config(**sections)
    settings.model = ModelConfig(vocab=len(WORDS), layers=1, d_model=16, heads=2, d_hidden=8, experts=4)
    return settings


def test_a_decoder_reads_windows_and_carries_nothing() -> None:
    settings = of_windows()
    task = make_task(settings, words())
    assert isinstance(task, WindowTask)
    assert len(task.items) == 6 * 4 and task.items_each == 8
    assert task.carried() == {}


def test_the_loss_is_the_mean_cross_entropy_in_nats() -> None:
    settings = of_windows(router={"name": "softmax", "options": {}})
    task, model = make_task(settings, words()), make_model(settings)
    batch = torch.utils.data.default_collate([task.items[i] for i in range(3)])
    scores_BLV = model(batch["inputs"]).double().log_softmax(-1)
    nats = [-scores_BLV[b, i, batch["targets"][b, i]].item() for b in range(3) for i in range(8)]
    assert task.loss(model, batch, 0, 0).item() == pytest.approx(sum(nats) / 24, rel=1e-6)


def test_an_evaluation_is_limited_to_the_head_of_the_split() -> None:
    settings = of_windows(eval={"limit": 20})
    corpus = words()
    model = make_model(settings).eval()
    found = make_task(settings, corpus).evaluate(model, "valid")
    text = torch.tensor([int(corpus.train[-1]), *map(int, corpus.valid[:20])])
    nats = 0.0
    for start in (0, 8, 16):
        window = text[start : start + 9]
        scores_LV = model(window[None, :-1])[0].double().log_softmax(-1)
        nats -= scores_LV[range(len(window) - 1), window[1:]].sum().item()
    assert found.count == 20
    assert found.nats == pytest.approx(nats / 20, rel=1e-5)
