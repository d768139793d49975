"""A training that turns to another text in its midst."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinkroute.lab.config import Config, from_mapping, to_mapping
from sinkroute.lab.data import Corpus, split_corpus, switched_corpus
from sinkroute.lab.run import execute, steps_to_balance
from sinkroute.lab.tasks import make_task
from sinkroute.lab.training import Progress

from .small import Killed

# Two texts without a common byte.
LOW, HIGH = ([offset + number for number in range(64)] for offset in (0, 128))


def text(name: str, letters: list[int]) -> Corpus:
    drawn = np.random.default_rng(0).choice(letters, 30_000).astype(np.uint8)
    return split_corpus(name, "drawn with a seed", drawn.tobytes())


BOTH = switched_corpus(text("low", LOW), text("high", HIGH))


def config(kind: str = "stream", **sections: dict[str, Any]) -> Config:
    kinds = {"stream": {"span": 12, "dropout": 0.1}, "decoder": {}}
    defaults: dict[str, dict[str, Any]] = {
        "data": {"name": "low", "length": 8, "switch_to": "high", "switch_at": 5},
        "model": {"name": kind, "layers": 2, "d_model": 16, "heads": 2, "d_hidden": 8, "experts": 4, **kinds[kind]},
        "router": {"name": "quantile"},
        "train": {"steps": 12, "batch": 4, "accumulation": 2, "warmup": 2, "log_every": 4, "checkpoint_every": 3},
        "eval": {"batch": 16, "limit": 256, "attacks": {}},
    }
    return from_mapping(Config, {name: {**defaults[name], **sections.get(name, {})} for name in defaults})


@pytest.mark.parametrize("kind", ["stream", "decoder"])
def test_items_are_of_the_first_text_before_the_switch_and_of_the_other_from_it_on(kind: str) -> None:
    task = make_task(config(kind), BOTH)
    items = [task.items[index] for index in range(12 * 4)]
    assert all(bool((item[key] < 64).all()) for item in items[:20] for key in ("inputs", "targets"))
    assert all(bool((item[key] >= 128).all()) for item in items[20:] for key in ("inputs", "targets"))


def test_a_stream_forgets_the_first_text_at_the_switch() -> None:
    items = make_task(config(), BOTH).items
    assert [step for step in range(12) if bool(items[step * 4]["fresh"])] == [0, 5]


def test_what_is_evaluated_is_the_second_text() -> None:
    found, before = make_task(config(), BOTH).text("valid", None)
    assert found.min() >= 128 and before >= 128


def logged(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum(len(line["each_step"]["loss"]) for line in lines) == 12
    for line in lines:  # the means of a line are those of its steps
        assert np.mean(line["each_step"]["loss"]) == pytest.approx(line["loss"], rel=1e-5)
        assert np.mean(line["each_step"]["max_vio"]) == pytest.approx(np.mean(line["max_vio"]), rel=1e-5)
    return {name: [value for line in lines for value in line["each_step"][name]] for name in ("loss", "max_vio")}


def test_the_result_tells_the_steps_after_the_switch(tmp_path: Path) -> None:
    result = execute(config(), BOTH, tmp_path)
    steps = logged(tmp_path)
    found = steps_to_balance(steps["max_vio"][5:])
    assert result["switch"] == {
        "steps_to_balance": 7 if found is None else found,
        "censored": int(found is None),
        "loss": pytest.approx(np.mean(steps["loss"][5:])),
        "max_vio": pytest.approx(np.mean(steps["max_vio"][5:])),
    }


@pytest.mark.parametrize("kill_at", [4, 8])
def test_a_killed_run_tells_the_same_of_the_switch(tmp_path: Path, kill_at: int) -> None:
    def kill(progress: Progress) -> None:
        if progress.step == kill_at:
            raise Killed

    whole = execute(config(), BOTH, tmp_path / "whole")
    with pytest.raises(Killed):
        execute(config(), BOTH, tmp_path / "killed", on_progress=kill)
    continued = execute(config(), BOTH, tmp_path / "killed")
    assert continued["switch"] == whole["switch"] and continued["valid"] == whole["valid"]
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_balance_is_three_steps_in_a_row_below_a_half() -> None:
    assert steps_to_balance([0.1] * 3) == 1
    assert steps_to_balance([0.5, 0.49, 0.49, 0.49]) == 2
    assert steps_to_balance([0.4, 0.4, 0.5, 0.4, 0.4]) is None
    assert steps_to_balance([0.4, 0.4]) is None


def test_even_choices_by_chance_are_far_below_the_bound() -> None:
    """MaxVio of 512 tokens that each choose 2 of 16 experts: the floor that docs/data.md names."""
    loads = np.random.default_rng(0).random((2000, 512, 16)).argsort(-1)[..., :2].reshape(2000, -1)
    violations = [np.bincount(load, minlength=16).max() / 64 - 1 for load in loads]
    assert np.mean(violations) == pytest.approx(0.22, abs=0.005)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"switch_to": "high"}, "data.switch_at must be above 0 and below train.steps=12, got 0"),
        ({"switch_to": "high", "switch_at": 12}, "below train.steps=12, got 12"),
        ({"switch_to": None, "switch_at": 5}, "data.switch_at=5 needs data.switch_to"),
    ],
)
def test_a_switch_that_cannot_be_is_refused(data: dict[str, Any], message: str) -> None:
    mapping = {**to_mapping(config()), "data": {"name": "low", **data}}
    with pytest.raises(ValueError, match=message):
        from_mapping(Config, mapping)


def test_images_do_not_switch() -> None:
    data = {"name": "mnist-5k", "switch_to": "high", "switch_at": 5}
    with pytest.raises(ValueError, match=r"data\.switch_to='high' is for texts"):
        from_mapping(Config, {"data": data, "model": {"name": "vit"}})


def test_one_text_where_two_are_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.switch_to='high', but the data are 'low'; load them with load_data"):
        make_task(config(), text("low", LOW))


# -- a capacity --


@pytest.mark.parametrize("kind", ["stream", "decoder"])
def test_the_result_tells_the_share_of_choices_that_a_capacity_drops(tmp_path: Path, kind: str) -> None:
    model = {**to_mapping(config(kind))["model"], "capacity": 0.25}
    settings = config(kind, model=model, data={"switch_to": None, "switch_at": 0})
    result = execute(settings, text("low", LOW), tmp_path)
    # An expert has room for 2 · 16 / 4 / 4 = 2 of the 16 tokens of a micro-batch: at most 8 of 32 choices are kept.
    assert 0.75 <= result["train"]["dropped"] < 1
    assert "switch" not in result


def test_without_a_capacity_nothing_is_told_of_it(tmp_path: Path) -> None:
    result = execute(config(), BOTH, tmp_path)
    assert "dropped" not in result["train"] and "dropped" not in (tmp_path / "log.jsonl").read_text()
