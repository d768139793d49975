"""A run from configuration to result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sinkroute.lab.config import Config, RouterConfig, from_mapping, to_mapping
from sinkroute.lab.data import Corpus, Vocabulary, load_corpus
from sinkroute.lab.data.corpus import encoded_corpus
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.machine import machine
from sinkroute.lab.run import execute
from sinkroute.lab.trained import load_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "few"], 8000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return load_corpus("text", path)


CONFIG = from_mapping(
    Config,
    {
        "label": "mine",
        "data": {"name": "text", "length": 32},
        "model": {"layers": 2, "d_model": 32, "heads": 2, "d_hidden": 16, "experts": 4, "top_k": 2},
        "router": {"name": "ssr-l", "options": {"probability": 0.5}},
        "train": {"steps": 8, "batch": 4, "warmup": 2, "log_every": 2},
        "eval": {"batch": 8},
    },
)


def test_the_result_holds_what_a_table_needs(corpus: Corpus, tmp_path: Path) -> None:
    result = execute(CONFIG, corpus, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["label"], result["seed"], result["steps"]) == ("ssr-l", "mine", 0, 8)
    assert result["probability"] == 0.5
    assert 0 < result["sinkhorn_steps"] < 8
    assert result["valid"]["bytes"] == len(corpus.valid)
    assert result["attacked"]["word-swap"]["rate"] == 0.025
    assert sum(map(sum, result["serving"]["load"])) == 2 * 2 * len(corpus.valid)  # layers · top-k
    assert result["parameters"]["active"] < result["parameters"]["total"]
    assert result["train"]["peak_memory_mb"] > 50
    assert result["train"]["tokens_per_second"] == pytest.approx(4 * 32 / result["train"]["ms_per_step"] * 1e3)


def test_a_stop_during_evaluation_is_heard_and_the_next_call_only_evaluates(corpus: Corpus, tmp_path: Path) -> None:
    stop, heard = StopRequest(), []

    def listen(text: str) -> None:
        heard.append(text)
        stop.asked = len(heard) == 3

    with pytest.raises(Interrupted, match="while it was evaluated; the same command continues"):
        execute(CONFIG, corpus, tmp_path, stop=stop, on_status=listen)
    assert len(heard) == 3
    assert heard[0].startswith("evaluating, clean: ")
    assert not (tmp_path / "result.json").exists()
    log = (tmp_path / "log.jsonl").read_text()
    assert execute(CONFIG, corpus, tmp_path)["steps"] == 8
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_finished_run_is_evaluated_again_when_its_evaluation_changes(corpus: Corpus, tmp_path: Path) -> None:
    first = execute(CONFIG, corpus, tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    changed = from_mapping(Config, {**to_mapping(CONFIG), "eval": {"attacks": {"word-swap": {"rate": 0.5}}}})
    second = execute(changed, corpus, tmp_path)
    assert second["attacked"]["word-swap"]["rate"] == 0.5
    assert second["valid"]["bits_per_byte"] == pytest.approx(first["valid"]["bits_per_byte"])
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_misspelt_attack_is_told_before_training(corpus: Corpus, tmp_path: Path) -> None:
    for name in ("wordswap", "wordswap@5%"):
        config = from_mapping(Config, {**to_mapping(CONFIG), "eval": {"attacks": {name: {}}}})
        with pytest.raises(ValueError, match="did you mean 'word-swap'"):
            execute(config, corpus, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def evaluated(**evaluation: object) -> Config:
    return from_mapping(Config, {**to_mapping(CONFIG), "eval": {"batch": 8, "limit": 500, **evaluation}})


def test_every_way_of_serving_is_measured_and_none_is_left_behind(corpus: Corpus, tmp_path: Path) -> None:
    result = execute(evaluated(inference=["noise", "sinkhorn", "both"]), corpus, tmp_path)
    ways = [result, *result["inference"].values()]
    assert list(result["inference"]) == ["noise", "sinkhorn", "both"]
    assert [way["valid"]["bytes"] for way in ways] == [500] * 4
    assert len({way["valid"]["bits_per_byte"] for way in ways}) == 4
    assert len({str(way["serving"]["load"]) for way in ways}) == 4
    plain = execute(evaluated(), corpus, tmp_path / "plain")
    for key in ("valid", "attacked", "serving"):
        assert plain[key] == result[key]
    assert {layer.router.inference for layer in load_run(tmp_path).model.moe_layers} == {"none"}


def test_a_way_of_serving_that_the_router_has_not_is_told_before_training(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(evaluated(inference=["noise"]), router=RouterConfig("softmax"))
    with pytest.raises(
        ValueError, match=r"eval\.inference=\['noise'\] is for routers of the SSR family, and 'softmax'"
    ):
        execute(config, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_attack_may_have_a_name_of_its_own_behind_an_at(corpus: Corpus, tmp_path: Path) -> None:
    attacks = {"word-swap": {"rate": 0.1}, "word-swap@again": {"rate": 0.1}, "word-swap@50%": {"rate": 0.5}}
    found = execute(evaluated(attacks=attacks), corpus, tmp_path)["attacked"]
    assert [entry["rate"] for entry in found.values()] == [0.1, 0.1, 0.5]
    assert found["word-swap"] == found["word-swap@again"]
    assert found["word-swap"]["bits_per_byte"] != found["word-swap@50%"]["bits_per_byte"]


def test_an_evaluation_may_be_limited_to_the_head_of_a_split(corpus: Corpus, tmp_path: Path) -> None:
    result = execute(evaluated(limit=300), corpus, tmp_path)
    assert result["valid"]["bytes"] == 300
    assert sum(map(sum, result["serving"]["load"])) == 2 * 2 * 300  # layers · top-k


def test_a_run_of_words_says_what_it_is_measured_in(tmp_path: Path) -> None:
    words = Vocabulary((*(f"word{number}" for number in range(20)), "<eos>", "AAA"))
    ids = np.random.default_rng(0).integers(20, size=3000)
    corpus = encoded_corpus("drawn", "drawn", words, ids, ids[:500], ids[500:900])
    config = evaluated(every=4)
    config.model.vocab = len(words)
    result = execute(config, corpus, tmp_path)
    assert (result["task"], result["metric"]) == ("text", "perplexity")
    assert result["valid"]["symbols"] == 500
    assert result["valid"]["perplexity"] == pytest.approx(2 ** result["valid"]["bits_per_symbol"])
    assert 5 < result["valid"]["perplexity"] < 40
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "eval"]
    assert [set(line) for line in found] == [{"kind", "step", "split", "perplexity"}] * 2
    assert found[-1]["perplexity"] == pytest.approx(result["valid"]["perplexity"])


def test_training_figures_do_not_depend_on_where_log_lines_fall(tmp_path: Path) -> None:
    from sinkroute.lab.run import _training_summary

    def summary(ends: list[int]) -> dict:
        lines = []
        for start, end in zip([0, *ends], ends, strict=False):
            values = [3.0 if step == 99 else 1.0 for step in range(start, end)]  # of steps, the last one is bad
            mean = sum(values) / len(values)
            line = {"kind": "train", "step": end, "loss": mean, "max_vio": [mean], "seconds": 1.0}
            lines.append({**line, "tokens_per_second": 1.0, "sinkhorn_steps": 0})
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return _training_summary(from_mapping(Config, {"train": {"steps": 100}}), tmp_path, tokens=1)

    regular, interrupted = summary(list(range(5, 101, 5))), summary([*range(5, 100, 5), 99, 100])
    assert regular["max_vio"] == pytest.approx(27 / 25)  # 24 steps of 1 and one of 3, of the last 25
    assert interrupted["max_vio"] == pytest.approx(27 / 25)
    assert interrupted["loss"] == pytest.approx(regular["loss"]) == pytest.approx(27 / 25)


def test_a_damaged_result_is_named(corpus: Corpus, tmp_path: Path) -> None:
    execute(CONFIG, corpus, tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is damaged.*delete it and run the same command"):
        execute(CONFIG, corpus, tmp_path)


def test_writing_json_replaces_the_file_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_machine_is_described() -> None:
    about = machine()
    assert about["cores"] >= 1
    assert about["cpu"]
    assert about["torch"].startswith("2.")
