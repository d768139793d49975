"""Runs under the lm-evaluation-harness: its figures are the lab's own."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sinkroute.cli import main
from sinkroute.lab.config import Config, from_mapping
from sinkroute.lab.data import load_corpus
from sinkroute.lab.evaluation import evaluate_text
from sinkroute.lab.export.serving import ExportError
from sinkroute.lab.lm_eval import TaskError, _load, evaluate_run
from sinkroute.lab.run import execute
from sinkroute.lab.trained import TrainedRun, load_run

LENGTH = 32


def test_without_the_harness_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", "runs/none", "--lm-eval", "hellaswag"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert 'not installed; pip install "sinkroute[eval]" (SINKROUTE_TRACEBACK' in said


def test_split_and_inference_do_not_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/none", "--lm-eval", "hellaswag", "--split", "test"]) == 2
    assert "--lm-eval goes without --split" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("run")
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "few"], 8000)
    (folder / "words.txt").write_text(" ".join(words))
    config = from_mapping(
        Config,
        {
            "data": {"name": "text", "path": str(folder / "words.txt"), "length": LENGTH},
            "model": {"layers": 2, "d_model": 32, "heads": 2, "d_hidden": 16, "experts": 4, "top_k": 2},
            "router": {"name": "ssr-s", "options": {"probability": 0.2}},
            "train": {"steps": 30, "batch": 8, "warmup": 5},
            "eval": {"batch": 8},
        },
    )
    execute(config, load_corpus("text", folder / "words.txt"), folder / "run")
    return load_run(folder / "run")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_task(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A task file (JSON is YAML) over a jsonl beside it."""
    data = folder / f"{settings['task']}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **settings,
    }
    path = folder / f"{settings['task']}.yaml"
    path.write_text(json.dumps(task))
    return path


def rolling(folder: Path, texts: list[str], name: str = "rolling") -> Path:
    return write_task(
        folder,
        [{"text": text} for text in texts],
        task=name,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    )


def bits(run: TrainedRun, text: str) -> float:
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    return evaluate_text(run.model, data, length=LENGTH, batch=4).bits * len(data)


def test_bits_per_byte_are_those_of_the_labs_own_evaluation(run: TrainedRun, tmp_path: Path) -> None:
    texts = ["few tokens to the experts, née ☃"[:28], "route the few balanced tokens to"[:32] * 3]
    texts[0] = texts[0] + "x" * (LENGTH - len(texts[0].encode()))  # whole windows
    found = evaluate_run(run, [str(rolling(tmp_path, texts))])["rolling"]
    expected = sum(bits(run, text) for text in texts) / (4 * LENGTH)
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["metrics"]["byte_perplexity"]["value"] == pytest.approx(2**expected, rel=1e-6)
    assert (found["samples"], found["checkpoint"]) == (2, "step-000030")
    written = json.loads((run.folder / "evaluation-lm-eval-rolling.json").read_text())
    assert written == {"task": "rolling", **found}


@torch.no_grad()
def test_a_choice_is_that_of_the_likelihood_of_its_bytes(run: TrainedRun, tmp_path: Path) -> None:
    rows = [
        {"context": "few tokens to", "choices": [" the", " few", " qqqq"], "answer": 0},
        {"context": "balanced", "choices": [" experts", " zzzzzz", " to"], "answer": 1},
        {"context": "route", "choices": [" 123", " tokens"], "answer": 1},
        {"context": "the", "choices": [" few few", " few"], "answer": 1},
    ]
    path = write_task(
        tmp_path,
        rows,
        task="choice",
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor(list((row["context"] + choice).encode()))
            log_probs = run.model.eval()(ids[None]).log_softmax(-1)[0, :-1].gather(-1, ids[1:, None])
            sums.append(log_probs[-len(choice.encode()) :].sum().item())
        right += sums.index(max(sums)) == row["answer"]
    assert 0 < right < 4
    found = evaluate_run(run, [str(path)])["choice"]["metrics"]["acc"]
    assert found["value"] == right / 4
    assert found["stderr"] > 0


def test_a_generation_ends_where_the_task_says(run: TrainedRun, tmp_path: Path) -> None:
    path = write_task(
        tmp_path,
        [{"text": "few tokens", "target": " "}],
        task="generation",
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    assert evaluate_run(run, [str(path)])["generation"]["metrics"]["exact_match"]["value"] in (0.0, 1.0)


def test_the_command_runs_several_tasks_and_prints_a_table(
    run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [str(rolling(tmp_path, ["to the few " * 6], name)) for name in ("first", "second")]
    assert main(["evaluate", str(run.folder), "--lm-eval", *tasks]) == 0
    out = capsys.readouterr().out
    assert "first" in out
    assert "second" in out
    assert "bits_per_byte" in out
    assert main(["evaluate", str(run.folder), "--json", "--lm-eval", *tasks]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["first"]["metrics"] == found["second"]["metrics"]


def test_the_table_has_long_and_strange_names_of_tasks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "[red]" + "abcdefghij" * 6 + "[/]"
    found = {task: {"metrics": {"acc[/]": {"value": 0.5, "stderr": 0.1}}, "samples": 4}}
    run = SimpleNamespace(folder=tmp_path / "[i]run", checkpoint=tmp_path / "step-000001")
    monkeypatch.setattr("sinkroute.lab.lm_eval.require_lm_eval", lambda: None)
    monkeypatch.setattr("sinkroute.lab.lm_eval.evaluate_run", lambda run, tasks: found)
    monkeypatch.setattr("sinkroute.commands.evaluate.require_run", lambda folder: None)
    monkeypatch.setattr("sinkroute.lab.trained.load_run", lambda folder: run)
    assert main(["evaluate", "[i]run", "--lm-eval", "mine"]) == 0
    title, _, table = capsys.readouterr().out.partition("task ")
    assert "[i]run at" in " ".join(title.split())
    first, *more = table.split("─\n")[1].splitlines()
    assert "".join(line.split()[0] for line in (first, *more)) == task
    assert first.split()[1:3] == ["acc[/]", "0.5000"]


@pytest.mark.parametrize("task", ["wikipedia", "wikipedia-cloze"])
def test_the_example_tasks_run(run: TrainedRun, task: str) -> None:
    experiments = Path(__file__).parents[2] / "experiments" / "lm-eval"
    (found,) = evaluate_run(run, [str(experiments / f"{task}.yaml")]).values()
    if task == "wikipedia":
        assert 2 < found["metrics"]["bits_per_byte"]["value"] < 12
    else:
        assert found["samples"] == 400
        assert 0.1 < found["metrics"]["acc"]["value"] < 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [unclosed", "is no task that lm-eval can load: ParserError"),
        ("- a list", "is no task that lm-eval can load: ValueError"),
        ("dataset_path: json", "is no task that lm-eval can load: ValueError: Unknown config shape"),
        ("task: t\ncustom_dataset: !function nowhere.at_all", "Cannot import module 'nowhere'"),
        ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}", "none.jsonl"),
    ],
)
def test_a_file_that_is_no_task_is_an_error_that_names_it(
    run: TrainedRun, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(TaskError, match=r"mine.yaml is no task") as caught:
        evaluate_run(run, [str(tmp_path / "mine.yaml")])
    assert message in str(caught.value)


def test_a_path_where_nothing_is_is_told(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no task file at .*none\.yaml"):
        evaluate_run(run, [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(("known", "hint"), [("hellaswag", "; did you mean 'hellaswag'?"), ("mmlu", ";")])
def test_an_unknown_name_is_told_with_where_all_are_listed(known: str, hint: str) -> None:
    manager = SimpleNamespace(task_index={known: {}}, all_tasks=[known])
    with pytest.raises(TaskError) as caught:
        _load(manager, "helaswag")
    assert str(caught.value) == f"unknown task 'helaswag'{hint} `lm-eval ls tasks` lists all; a file ends in .yaml"


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_the_nearest(run: TrainedRun) -> None:
    with pytest.raises(TaskError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        evaluate_run(run, ["helaswag"])


def test_a_model_that_cannot_be_exported_is_refused_before_any_task(run: TrainedRun) -> None:
    for layer in run.model.moe_layers:
        layer.router.inference = "noise"
    try:
        with pytest.raises(ExportError, match="with inference='noise'"):
            evaluate_run(run, ["none.yaml"])
    finally:
        for layer in run.model.moe_layers:
            layer.router.inference = "none"
