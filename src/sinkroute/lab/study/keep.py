"""What finished cells of a study left, as one text file that a repository can hold; and the folders out of it again.

A study may take longer than a machine lasts. `keep` writes a line of JSON for each finished cell, sorted by name:
configuration, record, data, result, and of its log what a curve and a load trace need. A line depends on its cell
alone, so a later `keep` adds lines and changes none. `restore` lays the folders out as the runs left them, so that
`sinkroute compare` takes these cells as done, digests included, and runs the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkroute._errors import unknown_name
from sinkroute.lab.config import Config, from_mapping, read_yaml, to_mapping, write_yaml
from sinkroute.lab.files import write_json, write_text
from sinkroute.lab.log import read_lines
from sinkroute.lab.run_folder import begun
from sinkroute.lab.study.cells import Cell, Plan, configuration_hash
from sinkroute.lab.study.state import check_data, check_folders, read_record, read_result, read_state

__all__ = ["keep", "read_kept", "restore"]

LOG_LINES = 12
"""Of each kind, in equal distances, the last one among them."""
LOAD_LINES = 4
"""Of those of training, with the loads of all experts, which are most of a line: a study has many runs."""

# Of a line of the log: what says when, how good and how even. The rest can be had from these, or is the machine's.
_LOGGED = ("kind", "step", "split", "loss", "aux_loss", "seconds", "max_vio", "load", "branches", "plan_passes")
_DIGITS = 5


def keep(plan: Plan, path: Path) -> tuple[int, int]:
    """Write what is finished; lines that are in the file already, from another machine, stay.

    Args:
        plan: the study, `out` being the folder of its runs.
        path: of the text file.

    Returns:
        How many cells the file holds now, and how many of them it did not hold before.

    Raises:
        ValueError: a folder or the file holds something of another configuration, a result is not what its run wrote,
            or runs were trained on different data.
    """
    known = read_kept(plan, path) if path.is_file() else {}
    check_folders(plan.cells, plan.out)
    done = [cell for cell in plan.cells if read_state(cell, plan.out).kind == "done"]
    check_data(done, plan.out)
    lines = known | {cell.name: _line(cell, plan.out) for cell in done}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text("".join(f"{_compact(lines[name])}\n" for name in sorted(lines)), path)
    return len(lines), len(lines) - len(known)


def restore(plan: Plan, path: Path) -> tuple[list[str], list[str]]:
    """Lay out the folders of the cells that a file holds; one in which a run has begun is left as it is.

    Returns:
        The cells that were laid out, and those that were left because something is there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds a cell of another configuration; nothing has been written then.
    """
    laid, left = [], []
    kept = read_kept(plan, path)
    for cell in plan.cells:
        folder = plan.out / cell.name
        if cell.name not in kept:
            continue
        if begun(folder):
            left.append(cell.name)
            continue
        line = kept[cell.name]
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(from_mapping(Config, line["config"]), folder / "config.yaml")
        write_json(line["corpus"], folder / "corpus.json")
        write_text("".join(json.dumps(each) + "\n" for each in line["log"]), folder / "log.jsonl")
        result = line["result"]
        write_text(result if isinstance(result, str) else _as_run_writes(result), folder / "result.json")
        write_json(line["cell"], folder / "cell.json")  # last: it is what says that the cell is done
        read_result(cell, plan.out)
        laid.append(cell.name)
    return laid, left


def read_kept(plan: Plan, path: Path) -> dict[str, dict[str, Any]]:
    """Cell → its line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON, or of a cell that the study does not have or has with another configuration.
    """
    cells = {cell.name: cell for cell in plan.cells}
    kept: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            name, config = line["name"], from_mapping(Config, line["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not what `keep` writes: {error!r}") from None
        if name not in cells:
            raise unknown_name(f"cell in {path}", name, cells)
        was, wanted = {configuration_hash(config), str(line["cell"].get("hash"))}, cells[name].hash
        if was != {wanted}:
            told = " and ".join(each[:12] for each in sorted(was))
            raise ValueError(
                f"{path} holds {name} made under {told}, and {plan.path.name} asks for {wanted[:12]}: the study was "
                "changed after that run; take the commit under which it was registered, or delete the line"
            )
        kept[name] = line
    return kept


def _line(cell: Cell, out: Path) -> dict[str, Any]:
    folder = out / cell.name
    result = read_result(cell, out)
    raw = (folder / "result.json").read_text(encoding="utf-8")
    return {
        "name": cell.name,
        "cell": read_record(cell, out),
        "config": to_mapping(read_yaml(Config, folder / "config.yaml")),
        "corpus": json.loads((folder / "corpus.json").read_text(encoding="utf-8")),
        # The digest is of the text: an object where it gives the same text again.
        "result": result if _as_run_writes(result) == raw else raw,
        "log": _log(folder / "log.jsonl"),
    }


def _log(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path)
    trained = _spread([line for line in lines if line.get("kind") == "train"], LOG_LINES)
    chosen = {id(line) for line in [*trained, *_spread([x for x in lines if x.get("kind") == "eval"], LOG_LINES)]}
    loaded = {id(line) for line in _spread(trained, LOAD_LINES)}
    return [_slim(line, id(line) in loaded) for line in lines if id(line) in chosen]


def _slim(line: Mapping[str, Any], loaded: bool) -> dict[str, Any]:
    keys = line if line.get("kind") == "eval" else [key for key in _LOGGED if loaded or key != "load"]
    return {key: _short(line[key]) for key in keys if line.get(key) is not None}


def _spread(lines: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many, in equal distances, the last one among them."""
    step = -(-len(lines) // most)
    return list(lines[::-1][::step][::-1]) if lines else []


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _as_run_writes(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1)


def _compact(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))
