"""Files of comparisons: what extends what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sinkroute.lab.study.config import common_config, find_study, merged, read_base, read_study

Write = Callable[..., Path]
FOLDER = Path(__file__).parents[3] / "experiments"


def test_a_file_changes_what_it_extends_entry_by_entry(write: Write) -> None:
    methods = {
        "vanilla": {"router": {"name": "softmax"}},
        "ssr-l": {"router": {"name": "ssr-l", "options": {"noise": 1}}},
    }
    write("parent", title="T", config={"train": {"steps": 9, "lr": 0.1}}, methods=methods, seeds=[0, 1, 2])
    child = write(
        extends="parent.yaml",
        config={"train": {"lr": 0.2}},
        methods={"vanilla": None, "ssr-l": {"router": {"options": {"reg": 2}}}},
        seeds=[5],
    )
    found = read_study(child)
    assert found.title == "T"
    assert found.config == {"train": {"steps": 9, "lr": 0.2}}
    assert found.methods == {"ssr-l": {"router": {"name": "ssr-l", "options": {"noise": 1, "reg": 2}}}}
    assert found.seeds == (5,)


def test_a_router_of_another_name_starts_over() -> None:
    old = {"router": {"name": "ssr-l", "options": {"noise": 1}}}
    assert merged(old, {"router": {"name": "softmax"}}) == {"router": {"name": "softmax"}}
    assert merged(old, {"router": {"name": "ssr-l"}}) == old


def test_attacks_are_replaced_as_a_whole() -> None:
    old = {"eval": {"batch": 3, "attacks": {"word-swap": {"rate": 0.1}}}}
    assert merged(old, {"eval": {"attacks": {}}}) == {"eval": {"batch": 3, "attacks": {}}}


def test_null_is_a_value_where_names_are_not_chosen_by_the_author() -> None:
    assert merged({"train": {"clip": 1.0}}, {"train": {"clip": None}}) == {"train": {"clip": None}}
    assert merged({"grid": {"a.b": [1]}}, {"grid": {"a.b": None}}) == {"grid": {}}


def test_merging_leaves_both_as_they_were() -> None:
    old, new = {"train": {"steps": 1}}, {"train": {"lr": 2}}
    merged(old, new)["train"]["steps"] = 7
    assert (old, new) == ({"train": {"steps": 1}}, {"train": {"lr": 2}})


def test_a_ring_of_files_is_refused(write: Write) -> None:
    write("a", extends="b.yaml")
    with pytest.raises(ValueError, match="extends itself"):
        read_study(write("b", extends="a.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methds": {}}, "unknown key.*did you mean 'methods'"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"a": {}}, "seeds": []}, "seeds is empty"),
        ({"methods": {"a": {}}, "seeds": [1, 1]}, "seeds must differ"),
        ({"methods": {"a": {}}, "equivalence": 0}, "equivalence must be a finite number above 0, got 0"),
        ({"methods": {"a": {}}, "jobs": 0}, "jobs must be 1 or more, got 0"),
        ({"methods": {"a": {}}, "primary": {"effect": 0.1}}, "primary.method is empty"),
        (
            {"methods": {"a": {}}, "primary": {"method": "a", "effect": -0.1}},
            r"primary\.effect must be a finite number above 0, got -0\.1",
        ),
        ({"methods": {"a": {}}, "primary": {"methd": "a"}}, "unknown key in primary 'methd'; did you mean 'method'"),
        ({"extends": 3}, "extends must be a name or a path, got 3"),
    ],
)
def test_a_wrong_file_is_refused_by_name(write: Write, content: dict, message: str) -> None:
    path = write(**content)
    with pytest.raises(ValueError, match=message) as error:
        read_study(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_study(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_study(path)


def test_a_misspelt_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown study.*'paper-lmm'; did you mean 'paper-lm'"):
        read_study(find_study("paper-lmm"))


def test_a_name_that_is_none_is_answered_with_all_that_can_be_taken() -> None:
    with pytest.raises(ValueError, match=r"neither a preset nor a file.*Known: .*demo, .*paper-lm, .*study/dual, "):
        read_study(find_study("nosuch"))


def test_a_configuration_of_one_run_is_told_from_a_study() -> None:
    with pytest.raises(ValueError, match="has no methods to compare: it is a configuration of `sinkroute train`"):
        read_study(FOLDER / "wikipedia-ssr.yaml")


def test_the_demo_is_a_study_like_the_others() -> None:
    study = read_study(find_study("demo"))
    assert study.methods["ssr-l"] == {"router": {"name": "ssr-l", "options": {"probability": 0.08}}}
    config = common_config(study, find_study("demo"))
    assert (config.train.steps, config.model.layers, config.data.name) == (1000, 4, "wikipedia")


def test_a_name_is_a_preset_and_a_path_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_study("ablation-p").parent.name == "compare"
    assert find_study("study/ablation-p").parent.name == "study"
    (tmp_path / "mine.yaml").touch()
    assert find_study("mine.yaml") == Path("mine.yaml")


def test_a_base_is_a_preset_or_a_file_beside_the_comparison(tmp_path: Path) -> None:
    assert read_base("", tmp_path) == {}
    assert read_base("wikipedia-ssr", tmp_path)["router"]["name"] == "ssr-s"
    (tmp_path / "own.yaml").write_text("train: {steps: 3}")
    assert read_base("own.yaml", tmp_path) == {"train": {"steps": 3}}
    (tmp_path / "own.yaml").write_text("train: {stepps: 3}")
    with pytest.raises(ValueError, match=r"own.yaml.*did you mean 'steps'"):
        read_base("own.yaml", tmp_path)
    with pytest.raises(FileNotFoundError, match="base: no configuration at"):
        read_base("nowhere.yaml", tmp_path)


def test_a_configuration_of_one_run_and_an_empty_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wikipedia-ssr is a configuration of one run.*sinkroute train wikipedia-ssr"):
        read_study(find_study("wikipedia-ssr"))
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty.yaml is empty; name at least methods"):
        read_study(tmp_path / "empty.yaml")
