"""Files that are there wholly or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sinkroute.lab.files import replace_whole, write_text


def test_processes_that_write_one_file_at_a_time_leave_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"

    def write(draft: Path) -> None:
        draft.write_text("mine, ")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            write_text("another process's", path)
        assert path.read_text() == "another process's"
        draft.write_text(draft.read_text() + "whole")

    replace_whole(path, write)
    assert path.read_text() == "mine, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_that_fails_leaves_the_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text("before", path)

    def write(draft: Path) -> None:
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_whole(path, write)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
