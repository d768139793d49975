"""One process a folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sinkroute.lab.study.lock import hold, holder


def test_a_folder_is_held_once_and_then_free_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert holder(folder) is None
    with hold(folder) as mine:
        assert mine
        assert f"process {os.getpid()} on" in str(holder(folder))
        with hold(folder) as again:
            assert not again
    assert holder(folder) is None


def test_looking_takes_nothing_away(tmp_path: Path) -> None:
    with hold(tmp_path):
        for _ in range(3):
            assert holder(tmp_path)
    with hold(tmp_path) as mine:
        assert mine


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if not child:  # nothing but system calls happens here
        with hold(tmp_path):
            os.write(tell, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    assert f"process {child} " in str(holder(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with hold(tmp_path) as mine:
        assert mine


def test_a_torn_note_of_the_holder_is_no_error(tmp_path: Path) -> None:
    with hold(tmp_path):
        (tmp_path / ".lock").write_text("{")
        assert holder(tmp_path) == "another process"
