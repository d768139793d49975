"""A text read as streams: what a row remembers is its own, whatever happens between two steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinkroute.lab.checkpoint import CheckpointError, latest_checkpoint
from sinkroute.lab.interrupt import Interrupted
from sinkroute.lab.models import make_model
from sinkroute.lab.tasks import make_task
from sinkroute.lab.tasks.streams import StreamTask

from .small import WITHOUT_DRAWS, WORDS, Killed, config, losses, run, runs_of_two_ranks, saved, words

# -- stopping and continuing --


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(config(), folder)
    return folder


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_a_killed_run_continues_with_the_same_bits_and_memories(whole: Path, tmp_path: Path, kill_at: int) -> None:
    """With dropout, accumulation, plans in some steps and noise; checkpoints are those of steps 2 and 4."""
    with pytest.raises(Killed):
        run(config(), tmp_path, kill_at=kill_at)
    run(config(), tmp_path)
    assert losses(tmp_path) == losses(whole) and len(losses(whole)) == 6
    for name in ("model", "optimizer", "carried"):
        expected = saved(whole, name)
        found = saved(tmp_path, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_carried_is_a_memory_of_each_micro_batch_with_its_rows_first(whole: Path) -> None:
    carried = saved(whole, "carried")
    # 4 rows in 2 micro-batches; 2 blocks remember 12 symbols of width 16.
    assert {name: tuple(tensor.shape) for name, tensor in carried.items()} == {
        "memory-0": (2, 2, 12, 16),
        "memory-1": (2, 2, 12, 16),
    }
    assert not torch.equal(carried["memory-0"], carried["memory-1"])


def test_without_its_memories_a_run_does_not_continue(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), tmp_path, stop_at=2)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    (checkpoint / "carried.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"carried\.safetensors is missing.*Delete"):
        run(config(), tmp_path)


def test_an_evaluation_on_the_way_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run(config(eval={"every": 1}), tmp_path)
    assert losses(tmp_path) == losses(whole)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [1, 2, 3, 4, 5, 6]
    assert all(1 < line["perplexity"] < 100 for line in evals)


def test_two_processes_keep_their_rows_and_continue_with_the_same_bits(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    found = run_ranks(runs_of_two_ranks, 2)[0]
    run(config(**WITHOUT_DRAWS), tmp_path)
    assert found["plain"]["losses"] == pytest.approx(losses(tmp_path), rel=1e-4)
    for name, memory_BNSD in saved(tmp_path, "carried").items():
        torch.testing.assert_close(found["plain"][name], memory_BNSD, atol=1e-3, rtol=1e-3)
    assert found["stopped"]["losses"] == found["drawing"]["losses"] and len(found["drawing"]["losses"]) == 6
    for name in ("memory-0", "memory-1"):
        assert torch.equal(found["stopped"][name], found["drawing"][name])


# -- one step --


def test_micro_batches_remember_each_its_own_rows(tmp_path: Path) -> None:
    for parts in (1, 2, 4):
        run(config(**WITHOUT_DRAWS, train={"accumulation": parts}), tmp_path / str(parts))
    for parts in (2, 4):
        assert losses(tmp_path / str(parts)) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_row_that_begins_anew_remembers_nothing_and_the_others_all() -> None:
    settings = config(model={"dropout": 0.0}, router={"name": "softmax", "options": {}}, train={"accumulation": 1})
    task = StreamTask(settings, words())
    model = make_model(settings)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(WORDS), (2, 3, 9), generator=generator)
    task.loss(model, {"inputs": first[:, :-1], "targets": first[:, 1:], "fresh": torch.tensor([True] * 3)}, 0, 0)
    fresh = torch.tensor([False, True, False])
    loss = task.loss(model, {"inputs": second[:, :-1], "targets": second[:, 1:], "fresh": fresh}, 1, 0)
    nats = []
    for row, new in enumerate(fresh.tolist()):
        memory = None if new else model(first[row : row + 1, :-1])[1]
        scores_1LV, _ = model(second[row : row + 1, :-1], memory)
        nats.append(-scores_1LV[0].double().log_softmax(-1)[range(8), second[row, 1:]].mean().item())
    assert loss.item() == pytest.approx(sum(nats) / 3, rel=1e-5)


# -- evaluation --


@pytest.mark.parametrize("batch", [1, 3])
def test_an_evaluation_in_blocks_is_that_of_the_whole_streams(batch: int) -> None:
    settings = config(eval={"batch": batch, "limit": 100})
    corpus = words()
    model = make_model(settings)
    found = make_task(settings, corpus).evaluate(model, "valid")
    text = np.concatenate([corpus.train[-1:], corpus.valid[:100]]).astype(np.int64)
    edges = [100 * row // batch for row in range(batch + 1)]
    nats, wrong = 0.0, 0
    model.eval()
    for start, end in pairwise(edges):
        symbols = torch.from_numpy(text[start : end + 1])
        scores_LV = model(symbols[None, :-1])[0][0].double()  # one block as long as the stream
        nats -= scores_LV.log_softmax(-1)[range(end - start), symbols[1:]].sum().item()
        wrong += int((scores_LV.argmax(-1) != symbols[1:]).sum())
    assert found.count == 100
    assert found.nats == pytest.approx(nats / 100, rel=1e-5)
    assert found.wrong == wrong
    assert found.load_LE.sum(1).tolist() == [200, 200]  # top-2: padding is no load
    assert found.perplexity == pytest.approx(math.exp(nats / 100), rel=1e-5)


def test_an_evaluation_that_is_not_exact_drops_what_does_not_fill_the_batch() -> None:
    exact, rough = (config(eval={"batch": 3, "limit": 100, "exact": exact}) for exact in (True, False))
    model = make_model(exact)
    counts = [make_task(settings, words()).evaluate(model, "valid").count for settings in (exact, rough)]
    # Rows of 33 symbols, of which the first is not scored, in whole blocks of 8.
    assert counts == [100, 3 * 32]


def test_the_test_split_begins_behind_the_last_symbol_of_valid() -> None:
    settings = config(eval={"batch": 1, "limit": 1})
    corpus = words()
    model = make_model(settings).eval()
    found = make_task(settings, corpus).evaluate(model, "test")
    scores_11V, _ = model(torch.tensor([[int(corpus.valid[-1])]]))
    assert found.nats == pytest.approx(-scores_11V[0, 0].log_softmax(-1)[int(corpus.test[0])].item(), rel=1e-5)
