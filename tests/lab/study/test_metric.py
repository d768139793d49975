"""Reports of runs that are not measured in bits per byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sinkroute.lab.page.palette import inks
from sinkroute.lab.study import figures
from sinkroute.lab.study.arrange import read_baselines
from sinkroute.lab.study.figures.history import evaluations
from sinkroute.lab.study.metric import METRICS
from sinkroute.lab.study.page import write_page
from sinkroute.lab.study.results import compare_runs
from sinkroute.lab.study.runs import group_runs, read_runs
from sinkroute.lab.study.table import Table
from sinkroute.lab.study.tables import sentences, size_tables

MakeRun = Callable[..., Path]
WORDS = {"vocab": 50_000, "name": "stream"}
VIT = {"name": "vit"}


def told(folder: Path, baselines: dict[str, Any] | None = None) -> tuple[Table, list[str]]:
    """The one table of these runs, and what it says in words."""
    found = compare_runs(read_runs(folder), baselines=baselines)
    ((_, table),) = size_tables(found)
    return table, sentences(found)


def model_of(folder: Path, model: dict[str, Any]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= model
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def words(make_run: MakeRun, root: Path, label: str, perplexity: float, **options: Any) -> Path:
    result = {
        "metric": "perplexity",
        "valid": {"symbols": 1000, "perplexity": perplexity, "bits_per_symbol": math.log2(perplexity)},
        "attacked": {
            "word-swap": {"symbols": 1000, "perplexity": 2 * perplexity, "bits_per_symbol": 7.0, "rate": 0.025},
            "word-swap@5%": {"symbols": 1000, "perplexity": 3 * perplexity, "bits_per_symbol": 8.0, "rate": 0.05},
        },
    }
    folder = make_run(root, label, options.pop("method", "softmax"), label, result=result, **options)
    model_of(folder, WORDS)
    return folder


def images(make_run: MakeRun, root: Path, label: str, error: float, **options: Any) -> Path:
    attack = {"images": 10, "error": 50.0, "nats": 2.0, "epsilon": 2, "steps": 10}
    result = {
        "metric": "error",
        "valid": {"images": 500, "error": error, "nats": 0.5},
        "attacked": {"fgsm@2": {"images": 500, "error": 4 * error, "nats": 2.0, "epsilon": 2}, "pgd": attack},
    }
    folder = make_run(root, label, options.pop("method", "softmax"), label, result=result, **options)
    model_of(folder, VIT)
    return folder


def test_a_result_without_a_metric_is_in_bits_per_byte(demo: Path) -> None:
    assert {run.metric.key for run in read_runs(demo)} == {"bits_per_byte"}


@pytest.mark.parametrize(
    ("model", "key"), [({}, "bits_per_byte"), (WORDS, "perplexity"), (VIT, "error"), ({"vocab": 205}, "bits_per_byte")]
)
def test_before_anything_was_measured_the_model_says_what_a_run_will_be_measured_in(
    make_run: MakeRun, tmp_path: Path, model: dict[str, Any], key: str
) -> None:
    model_of(make_run(tmp_path, "a", "softmax", "Vanilla", finished=False, lines=0), model)
    assert read_runs(tmp_path)[0].metric.key == key


def test_what_was_measured_on_the_way_comes_before_what_the_model_says(make_run: MakeRun, tmp_path: Path) -> None:
    model_of(make_run(tmp_path, "a", "softmax", "Vanilla", finished=False), {"vocab": 512})  # its log has bits per byte
    assert read_runs(tmp_path)[0].metric.key == "bits_per_byte"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"metric": "accuracy"}, r"result\.json: 'metric' must be one of bits_per_byte, perplexity, error; received"),
        ({"metric": "error"}, r"result\.json: 'valid\.error' must be a number; received None"),
        ({"metric": "perplexity", "valid": {"perplexity": True}}, r"'valid\.perplexity' must be a number"),
    ],
)
def test_a_result_whose_metric_is_unknown_or_missing_is_refused(
    make_run: MakeRun, tmp_path: Path, result: dict[str, Any], message: str
) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", result=result)
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path)


def test_the_table_of_words_shows_perplexity_and_no_columns_of_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    words(make_run, tmp_path, "Vanilla", 24.5, method="softmax")
    words(make_run, tmp_path, "SSR-L", 23.25, method="ssr-l", probability=0.1)
    table, said = told(tmp_path, {"bigram": {"bits_per_byte": 3.9}})
    titles = {column.key: (column.title, column.help) for column in table.columns}
    assert titles["headline"] == ("valid perplexity", "Perplexity over every validation word.")
    assert titles["attacked.word-swap@5%.perplexity"] == (
        "word-swap@5% perplexity",
        "Perplexity on text under the word-swap attack (5.0% of the words).",
    )
    assert "valid.perplexity" not in titles and [row.label for row in table.rows] == ["SSR-L", "Vanilla"]
    assert table.cell("SSR-L", "headline").text == "23.25"
    assert table.cell("SSR-L", "attacked.word-swap@5%.perplexity").text == "69.75"
    assert said[:2] == ["SSR-L has the lowest valid perplexity: 23.25.", "Against Vanilla: SSR-L -1.25."]


def test_the_table_of_images_shows_errors_in_per_cent_and_their_attacks(make_run: MakeRun, tmp_path: Path) -> None:
    images(make_run, tmp_path, "Vanilla", 8.0, method="softmax")
    images(make_run, tmp_path, "SSR-L", 8.5, method="ssr-l", probability=0.1)
    table, said = told(tmp_path)
    titles = {column.key: (column.title, column.help) for column in table.columns}
    assert titles["headline"] == ("valid error %", "Error over every validation image.")
    assert titles["attacked.fgsm@2.error"] == ("fgsm@2 error %", "Error on images under the fgsm attack (epsilon=2).")
    assert titles["attacked.pgd.error"][1] == "Error on images under the pgd attack (epsilon=2, steps=10)."
    assert not any("perplexity" in key or "word-swap" in key for key in titles)
    assert table.cell("SSR-L", "attacked.fgsm@2.error").text == "34.00"
    assert said[:2] == ["Vanilla has the lowest valid error %: 8.00.", "Against Vanilla: SSR-L +0.50."]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(words, "valid perplexity 8.25."), (images, "valid error % 8.25.")],
)
def test_a_run_alone_is_told_in_its_metric(
    make_run: MakeRun, tmp_path: Path, make: Callable[..., Path], sentence: str
) -> None:
    make(make_run, tmp_path, "Vanilla", 8.25)
    assert told(tmp_path)[1][0] == f"Only Vanilla has finished: {sentence}"


def test_differences_that_do_not_print_in_the_digits_of_the_metric_are_none(make_run: MakeRun, tmp_path: Path) -> None:
    words(make_run, tmp_path, "Vanilla", 24.501)
    words(make_run, tmp_path, "SSR-L", 24.504, method="ssr-l")
    assert told(tmp_path)[1][0] == "SSR-L and Vanilla have the lowest valid perplexity: 24.50."


def test_the_training_curve_of_words_is_a_perplexity_and_that_of_images_the_loss(
    make_run: MakeRun, tmp_path: Path
) -> None:
    one = words(make_run, tmp_path, "W", 20.0, loss=math.log(30.0))
    two = images(make_run, tmp_path, "I", 8.0, loss=1.25)
    np.testing.assert_allclose(figures.curve(read_runs(one), "loss").mean, 30.0)
    np.testing.assert_allclose(figures.curve(read_runs(two), "loss").mean, 1.25)
    assert METRICS["perplexity"].of_loss(1e9) < math.inf


def test_values_measured_on_the_way_are_drawn_where_the_curve_shows_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    for name, make, key in (("w", words, "perplexity"), ("i", images, "error")):
        folder = make(make_run, tmp_path / name, "Vanilla", 20.0)
        log = (folder / "log.jsonl").read_text().replace('"bits_per_byte"', f'"{key}"')
        (folder / "log.jsonl").write_text(log)
    assert len(evaluations(read_runs(tmp_path / "w"))) == 4
    assert evaluations(read_runs(tmp_path / "i")) == []


@pytest.mark.parametrize(
    ("make", "shown", "absent"),
    [
        (
            words,
            ["One word-level language model", "predict the next word", "Validation perplexity, further left",
             "Training perplexity; each", "perplexity, logarithmic", "the perplexity rises", "active per word"],
            ["bits per byte", "Bits per byte", "n-gram", "bigram"],
        ),
        (
            images,
            ["One image classifier", "Learning the images", "Validation error in %, further left",
             "Training loss in nats; each", "training loss in nats, magnified", "fgsm@2", "active per patch"],
            ["bits per byte", "Bits per byte", "erplexity", "Word-swap", "language model", "n-gram"],
        ),
    ],
)  # fmt: skip
def test_the_page_speaks_of_what_the_runs_are_measured_in(
    make_run: MakeRun, tmp_path: Path, make: Callable[..., Path], shown: list[str], absent: list[str]
) -> None:
    make(make_run, tmp_path, "Vanilla", 24.5)
    make(make_run, tmp_path, "SSR-L", 23.25, method="ssr-l", finished=True)
    baselines = {"bigram": {"bits_per_byte": 3.9}, "corpus": {"name": "somewhere"}}
    found = compare_runs(read_runs(tmp_path), baselines=baselines)
    text = write_page(found, tmp_path / "r.html").read_text(encoding="utf-8")
    assert [words for words in shown if words not in text] == []
    assert [words for words in absent if words in text] == []
    assert "somewhere" in text


def test_models_of_bytes_are_no_baselines_of_words(
    make_run: MakeRun, tmp_path: Path, baselines: dict[str, Any]
) -> None:
    words(make_run, tmp_path, "Vanilla", 24.5)
    assert set(read_baselines(baselines, read_runs(tmp_path))) == {"corpus", "machine"}


def test_figures_of_nothing_finite_are_drawn_in_every_metric(make_run: MakeRun, tmp_path: Path) -> None:
    for name, make in (("w", words), ("i", images)):
        make(make_run, tmp_path / name, "Vanilla", math.nan, loss=math.nan)
        make(make_run, tmp_path / name, "Other", 1e9, loss=600.0)
        groups = group_runs(read_runs(tmp_path / name))
        colours = inks(group.method for group in groups)
        for svg in (figures.training_figure(groups, colours, {}), figures.standing_figure(groups, colours, {})):
            assert svg.startswith("<svg")


def test_runs_of_different_metrics_are_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    words(make_run, tmp_path / "all", "of-words", 24.5)
    images(make_run, tmp_path / "all", "of-images", 8.0)
    runs = read_runs(tmp_path / "all")
    message = r"not measured alike, of-images in error; of-words in perplexity: .*Report the runs of each kind by them"
    with pytest.raises(ValueError, match=message):
        compare_runs(runs)


def test_images_that_were_not_attacked_have_no_column_for_it(make_run: MakeRun, tmp_path: Path) -> None:
    folder = images(make_run, tmp_path, "Vanilla", 8.0)
    result = json.loads((folder / "result.json").read_text())
    result["attacked"] = {}
    (folder / "result.json").write_text(json.dumps(result))
    assert [column.key for column in told(folder)[0].columns][:2] == ["headline", "serving.max_vio"]
