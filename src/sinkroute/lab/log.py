"""The log of a run: one JSON object a line, append only, cut back on resume to where the checkpoint stands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["RunLog"]


class RunLog:
    """Writes `log.jsonl`.

    Args:
        path: the file.
        last_step: of the checkpoint from which the run continues, 0 for a new one. What an earlier process logged
            after it will be done again, so it is removed.
        enabled: False on all but the main process: then nothing is written.

    Raises:
        OSError: the file cannot be written (a full disk, say); lines that are there stay.
    """

    def __init__(self, path: Path, last_step: int, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        if not enabled:
            return
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= last_step]
            draft = path.with_suffix(".draft")
            draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(draft, path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one object and hand it to the system at once: what was logged survives the process."""
        if self.enabled:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.enabled:
            self.file.close()


def _step(line: str) -> float:
    """The step of a logged line; one that a killed process left torn counts as never."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
