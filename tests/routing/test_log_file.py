"""A log file is JSONL at all times, whatever was killed while it wrote."""

import json

import pytest

from sinkroute.routing.log_file import append_line


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"step": 1}\n{"step": 2, "la', ['{"step": 1}']),
        ('{"step": 2, "la', []),
        ('{"step": 1}\n{"step": 2}', ['{"step": 1}', '{"step": 2}']),
        ('{"step": 1}\n', ['{"step": 1}']),
        ("", []),
    ],
)
def test_a_torn_line_is_cut_off_and_whole_ones_stay(tmp_path, before, kept):
    path = tmp_path / "load.jsonl"
    path.write_text(before)
    append_line(path, {"step": 3})
    assert path.read_text().splitlines() == [*kept, '{"step": 3}'] and path.read_text().endswith("\n")


def test_what_json_cannot_say_is_null_at_any_depth(tmp_path):
    append_line(tmp_path / "new.jsonl", {"a": float("nan"), "b": {"c": float("inf"), "d": 1.5}})
    assert json.loads((tmp_path / "new.jsonl").read_text()) == {"a": None, "b": {"c": None, "d": 1.5}}
