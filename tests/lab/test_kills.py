"""`kill -9` of one process of a run, at every kind of place: all end with clear words, the same command continues."""

from __future__ import annotations

from pathlib import Path

import pytest

from .processes import Processes, lines

ranks = pytest.mark.ranks

# Place (see `hooks.py`), rank, first step in which it may happen, processes, and whether a launcher like torchrun keeps
# the store and asks the survivors to stop; else the store is in rank 0.
CELLS = [
    pytest.param("step", 1, 6, 2, True),
    pytest.param("plan", 0, 5, 2, False),
    pytest.param("writing", 0, 7, 2, True),
    pytest.param("evaluation", 1, 5, 2, False),
    *(
        pytest.param(*cell, marks=ranks)
        for cell in [
            ("start", 0, 0, 2, False),
            ("start", 1, 0, 2, True),
            ("step", 0, 2, 2, True),
            ("step", 0, 9, 2, False),
            ("step", 1, 5, 2, False),
            ("update", 0, 5, 2, True),
            ("update", 1, 7, 2, False),
            ("plan", 0, 1, 2, True),
            ("plan", 1, 6, 2, True),
            ("plan", 1, 8, 2, False),
            ("agreement", 0, 7, 2, True),
            ("agreement", 1, 5, 2, False),
            ("writing", 0, 3, 2, False),
            ("renaming", 0, 7, 2, True),
            ("renaming", 0, 9, 2, False),
            ("pruning", 0, 7, 2, False),
            ("barrier", 0, 7, 2, False),
            ("barrier", 1, 3, 2, False),
            ("barrier", 1, 7, 2, True),
            ("evaluation", 0, 5, 2, True),
            ("evaluation", 0, 2, 2, False),
            ("evaluation", 1, 8, 2, True),
            ("step", 2, 6, 4, False),
            ("plan", 3, 5, 4, True),
            ("writing", 0, 7, 4, True),
            ("barrier", 1, 7, 4, False),
        ]
    ),
]


@pytest.mark.parametrize(("at", "rank", "step", "number", "launcher"), CELLS)
def test_a_killed_process_ends_all_and_the_same_command_gives_the_same_bits(
    processes: Processes,
    small: Path,
    undisturbed: dict[int, Path],
    tmp_path: Path,
    at: str,
    rank: int,
    step: int,
    number: int,
    launcher: bool,
) -> None:
    words = [["train", str(small), "--out", str(tmp_path / "run")]] * number
    hook = ("kill", {"rank": rank, "at": at, "step": step})
    left = processes.run(words, tmp_path / "logs", hook, launcher=launcher)
    assert left.codes == [-9 if other == rank else 1 for other in range(number)], left.texts
    print(f"| {at} | {rank} of {number} | {step} | {launcher} | {left.seconds:.1f} |")
    assert left.seconds < 60
    for other in set(range(number)) - {rank}:
        text = " ".join(left.texts[other].split())
        named = f"gone, killed or out of reach: rank {rank} (" in text
        assert named or (rank == 0 and not launcher and "rank 0, at whose address the processes met, is gone" in text)
        assert "The same command continues" in text or "the same command starts anew" in text
        assert not any(noise in text for noise in ("Traceback", "frame #", "terminate"))
    again = processes.run(words, tmp_path / "logs")
    assert again.codes == [0] * number, again.texts
    assert lines(tmp_path / "run") == lines(undisturbed[number])
    assert len(lines(tmp_path / "run")) == 10
    weights = "checkpoints/step-000010/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (undisturbed[number] / weights).read_bytes()
