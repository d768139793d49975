from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkroute.lab.study.arrange import differences, read_baselines
from sinkroute.lab.study.runs import group_runs, read_runs

MakeRun = Callable[..., Path]


def test_a_folder_of_runs_is_read_in_the_order_of_its_baselines_file(demo: Path) -> None:
    assert [run.name for run in read_runs([demo])] == ["softmax", "balance", "ssr-l", "ssr-s"]


def test_without_an_order_folders_are_sorted_by_name(demo: Path) -> None:
    (demo / "baselines.json").unlink()
    assert [run.name for run in read_runs([demo])] == ["balance", "softmax", "ssr-l", "ssr-s"]


def test_paths_keep_their_order_and_a_run_named_twice_is_read_once(demo: Path) -> None:
    runs = read_runs([demo / "ssr-s", demo / "balance", demo / "ssr-s"])
    assert [run.name for run in runs] == ["ssr-s", "balance"]


def test_a_torn_last_line_is_ignored(demo: Path) -> None:
    log = demo / "ssr-s" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"kind": "train", "step": 50, "lo\xc3')
    run = read_runs(demo / "ssr-s")[0]
    assert run.last_step == 40 and len(run.train) == 4


def test_a_broken_line_elsewhere_is_an_error_with_file_and_line(demo: Path) -> None:
    log = demo / "ssr-s" / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([lines[0], '{"kind": "tra', *lines[1:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a JSON object"):
        read_runs(demo / "ssr-s")


def test_the_later_line_of_a_repeated_step_wins(demo: Path) -> None:
    log = demo / "ssr-s" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"kind": "train", "step": 20, "loss": 9.0}\n', encoding="utf-8")
    run = read_runs(demo / "ssr-s")[0]
    assert [line["step"] for line in run.train] == [10, 20, 30, 40]
    assert run.train[1]["loss"] == 9.0


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere", "is not there"), ("empty", "is no run folder")],
)
def test_a_path_without_runs_says_what_to_pass(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=says) as error:
        read_runs([tmp_path / name])
    assert "make demo" in str(error.value)


def test_no_paths_are_an_error() -> None:
    with pytest.raises(ValueError, match="paths is empty"):
        read_runs([])


def test_a_missing_configuration_is_named(demo: Path) -> None:
    (demo / "ssr-s" / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"ssr-s' has no config\.yaml"):
        read_runs(demo)


def test_a_missing_log_of_a_finished_run_is_named(demo: Path) -> None:
    (demo / "ssr-s" / "log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no log\.jsonl"):
        read_runs(demo)


def test_a_result_without_its_main_number_is_named(demo: Path) -> None:
    (demo / "ssr-s" / "result.json").write_text('{"method": "ssr-s", "valid": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"valid\.bits_per_byte.*received None"):
        read_runs(demo)


def test_a_run_killed_before_its_first_line_is_unfinished_at_step_0(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", "ssr-s", "SSR-S", finished=False)
    (folder / "log.jsonl").unlink()
    run = read_runs(folder)[0]
    assert not run.finished and run.last_step == 0 and run.planned_steps == 40 and run.label == "SSR-S"


def test_seeds_of_a_label_are_one_group_and_an_unfinished_seed_joins_them(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "ssr-s", "my SSR", seed=0)
    make_run(tmp_path, "b", "ssr-s", "my SSR", seed=1)
    make_run(tmp_path, "c", "ssr-s", "my SSR", seed=2, finished=False)
    make_run(tmp_path, "d", "softmax", "Vanilla", seed=0)
    groups = group_runs(read_runs(tmp_path))
    assert [(group.label, len(group.runs), len(group.finished)) for group in groups] == [
        ("my SSR", 3, 2),
        ("Vanilla", 1, 1),
    ]
    assert [run.seed for run in groups[0].drawn] == [0, 1]


def test_differences_name_the_dotted_keys_that_differ(demo: Path) -> None:
    found = differences(read_runs([demo / "softmax", demo / "ssr-s"]))
    assert found == {"label": ["Vanilla", "SSR-S"], "router.name": ["softmax", "ssr-s"]}


def test_baselines_come_from_the_argument_a_file_or_beside_the_runs(demo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"bigram": {"bits_per_byte": 1.0}}), encoding="utf-8")
    runs = read_runs(demo)
    assert read_baselines({"a": 1}, runs) == {"a": 1}
    assert read_baselines(other, runs)["bigram"]["bits_per_byte"] == 1.0
    assert read_baselines(None, runs)["bigram"]["bits_per_byte"] == 3.9
    with pytest.raises(FileNotFoundError, match="baselines: there is no file"):
        read_baselines(tmp_path / "missing.json")
