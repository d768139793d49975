"""How far a cell is, read from its folder; and that what lies there belongs to the cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sinkroute.lab.config import Config, differences, read_yaml
from sinkroute.lab.files import write_json
from sinkroute.lab.log import last_step
from sinkroute.lab.run_folder import FREE_KEYS, begun
from sinkroute.lab.study.cells import Cell, configuration_hash
from sinkroute.lab.study.lock import holder

__all__ = [
    "State",
    "check_data",
    "check_folders",
    "read_result",
    "read_state",
    "record_begin",
    "record_end",
    "record_failure",
]

_RECORD, _FAILURE = "cell.json", "failed.json"


@dataclass(frozen=True)
class State:
    """Of one cell.

    Attributes:
        kind: "done", "failed", "running" (some process has it), "unfinished" or "waiting".
        step: of the latest line in its log.
        note: the error, who has it, or what is still to be done; empty where there is nothing to say.
    """

    kind: Literal["done", "failed", "running", "unfinished", "waiting"]
    step: int = 0
    note: str = ""


def read_state(cell: Cell, out: Path) -> State:
    """Read it. What was made under another hash than the cell's counts for nothing."""
    folder = out / cell.name
    step = last_step(folder / "log.jsonl")
    if (who := holder(folder)) is not None:
        return State("running", step, who)
    if (failure := _read(folder / _FAILURE)).get("hash") == cell.hash:
        return State("failed", step, str(failure.get("message", "")))
    if not begun(folder) or not (folder / "config.yaml").is_file():
        return State("waiting")
    written = read_yaml(Config, folder / "config.yaml")
    if configuration_hash(written) != cell.hash:
        return State("waiting", note="an earlier run with another configuration is there")
    if (folder / "result.json").is_file() and _read(folder / _RECORD).get("result"):
        asked = [line for line in differences(written, cell.config) if line.startswith("eval.")]
        if not asked:
            return State("done", cell.config.train.steps)
        return State("unfinished", step, f"to be evaluated again ({'; '.join(asked)})")
    return State("unfinished", step, "to be evaluated" if step >= cell.config.train.steps else "")


def read_result(cell: Cell, out: Path) -> dict[str, Any]:
    """What a finished cell's `result.json` holds.

    Raises:
        ValueError: it is not what the cell wrote.
    """
    folder = out / cell.name
    content = (folder / "result.json").read_bytes()
    if hashlib.sha256(content).hexdigest() != _read(folder / _RECORD).get("result"):
        raise ValueError(
            f"{folder / 'result.json'} is not what this run wrote; delete it and run the same command: "
            "training need not be repeated"
        )
    return json.loads(content)


def read_record(cell: Cell, out: Path) -> dict[str, Any]:
    """Under which hash, by which code and on which machine a cell was run."""
    return _read(out / cell.name / _RECORD)


def check_folders(cells: Iterable[Cell], out: Path) -> None:
    """Check that what earlier calls left in the folders of these cells was made with their configurations.

    Raises:
        ValueError: it was not; the message names the folders and says in what they differ.
    """
    wrong = []
    for cell in cells:
        folder = out / cell.name
        if not begun(folder):
            continue
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} holds something else than a run of this comparison; choose another --out")
        written = read_yaml(Config, folder / "config.yaml")
        lines = [line for line in differences(written, cell.config) if not line.startswith(FREE_KEYS)]
        if lines or configuration_hash(written) != cell.hash:
            wrong.append((folder.name, configuration_hash(written), cell.hash, lines))
    if not wrong:
        return
    told = [
        f"  {name}: made under {was[:12]}, asked for is {wanted[:12]} ({'; '.join(lines)})"
        for name, was, wanted, lines in wrong[:8]
    ]
    if len(wrong) > len(told):
        told.append(f"  and {len(wrong) - len(told)} more")
    raise ValueError(
        f"{out} holds results of other configurations, which must not be mixed with these:\n"
        + "\n".join(told)
        + "\nChoose another --out, or --fresh to delete them and start anew."
    )


def check_data(cells: Iterable[Cell], out: Path) -> None:
    """Check that runs whose configurations name the same data were trained on the same.

    Raises:
        ValueError: the data changed between runs; the message names two of them.
    """
    seen: dict[tuple[str, str | None, str | None], tuple[str, str]] = {}
    for cell in cells:
        digest = str(_read(out / cell.name / "corpus.json").get("sha256"))
        data = cell.config.data
        other, known = seen.setdefault((data.name, data.path, data.switch_to), (cell.name, digest))
        if digest != known:
            raise ValueError(
                f"{out}: {other} and {cell.name} were trained on different data (SHA-256 {known[:12]}… and "
                f"{digest[:12]}…), which must not be mixed; restore the data and run the one that is wrong with --fresh"
            )


def record_begin(folder: Path, hash_: str, about: dict[str, Any], fresh: bool = False) -> None:
    """Write down who runs a cell, before it runs; what an earlier failure left goes."""
    (folder / _FAILURE).unlink(missing_ok=True)
    seconds = 0.0 if fresh else _read(folder / _RECORD).get("seconds", 0.0)
    write_json({"hash": hash_, **about, "seconds": seconds}, folder / _RECORD)


def record_end(folder: Path, seconds: float, done: bool) -> None:
    """Write down how long a process worked on a cell and, when it is done, the digest of its result."""
    record = _read(folder / _RECORD)
    record["seconds"] = record.get("seconds", 0.0) + seconds
    if done:
        record["result"] = hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()
    write_json(record, folder / _RECORD)


def record_failure(folder: Path, hash_: str, message: str) -> None:
    """Write down why a cell failed; it is not run again unless somebody asks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"hash": hash_, "message": message}, folder / _FAILURE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
