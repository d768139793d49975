"""The matrix of trainers: `python tests/trainers/matrix.py [--trainer NAME ...] [--wrapper NAME ...] [--out FILE]`.

Each cell trains a tiny mixture for a few steps and is compared with a plain loop in one process: see `plain.py`. Cells
of one wrapper share a group of processes; one that crashes ends its group, and the rest goes on in another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINERS = ("accelerate loop", "Trainer", "TRL SFT", "TRL DPO", "TRL GRPO")
WRAPPERS = ("single", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
CHECKPOINTING = ("off", "reentrant", "not reentrant")
METHODS = ("ssr-dual in the gate", "ssr-dual in the bias", "ssr-l", "load-balance", "loss-free")
# The same without sinkroute: whether a cell that failed would have run.
CONTROLS = dict.fromkeys(METHODS, "none, Mixtral")
CONTROLS |= dict.fromkeys(("ssr-dual in the bias", "loss-free"), "none, DeepSeek-V3")
SECONDS = 400  # that a cell may take, start of the processes included

Cell = tuple[str, str, str, str]


def run_cells(cells: list[Cell], folder: Path, say: Any = print) -> dict[Cell, dict[str, Any]]:
    """Run cells of one wrapper, in as many groups of processes as it takes."""
    results: dict[Cell, dict[str, Any]] = {}
    attempt = 0
    while left := [cell for cell in cells if cell not in results]:
        attempt += 1
        found = _group(left, folder, f"{len(results)}-{attempt}", say)
        if not found:
            found = {left[0]: {"found": "failed", "said": ["no process came so far"]}}
        results |= found
    return results


def _group(cells: list[Cell], folder: Path, name: str, say: Any) -> dict[Cell, dict[str, Any]]:
    world = 1 if cells[0][1] == "single" else 2
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps(cells), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"{name}-{rank}.jsonl" for rank in range(world)]
    logs = [folder / f"{name}-{rank}.log" for rank in range(world)]
    processes = []
    try:
        for rank in range(world):
            with open(logs[rank], "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__).with_name("rank.py")), str(listed), str(outputs[rank])],
                        env=_environment(rank, world, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        since, seen = time.monotonic(), 0
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            lines = sum(len(_lines(output)) for output in outputs)
            if lines != seen:
                since, seen = time.monotonic(), lines
            ended = [process.poll() for process in processes]
            patience = 60 if any(code is not None for code in ended) else SECONDS
            if time.monotonic() - since > patience:
                break
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _read(outputs, logs, say)


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    found |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if world > 1:
        found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


_WORST = ("right", "told", "refused", "wrong", "failed", "begun")


def _read(outputs: list[Path], logs: list[Path], say: Any) -> dict[Cell, dict[str, Any]]:
    """What the ranks found: of a cell, the worst of them."""
    results: dict[Cell, dict[str, Any]] = {}
    for output, log in zip(outputs, logs, strict=True):
        own: dict[Cell, dict[str, Any]] = {}
        for told in _lines(output):
            own[tuple(told.pop("cell"))] = told
        for cell, told in own.items():
            if told["found"] == "begun":
                tail = log.read_text(errors="replace").strip().splitlines()[-3:]
                told = {"found": "begun", "said": tail}
            known = results.get(cell)
            if known is None or _worse(told, known):
                results[cell] = told
    for cell, told in results.items():
        if told["found"] == "begun":
            told["found"] = "failed"
        say(f"{' | '.join(cell)}: {told['found']} {'; '.join(told.get('differs', told.get('said', [])))[:300]}")
    return results


def _worse(told: dict[str, Any], known: dict[str, Any]) -> bool:
    # A rank that was left alone says less than the one that raised.
    new, old = (_WORST.index(found["found"]) + (0 if _alone(found) else 10) for found in (told, known))
    return new > old


def _alone(told: dict[str, Any]) -> bool:
    waited = told["found"] == "failed" and any(words in told["said"][0] for words in ("gloo", "Connection"))
    return waited or told["found"] in ("begun", "right")


def run_matrix(chosen: dict[str, list[str]], say: Any = print) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for wrapper in chosen["wrapper"]:
        cells = list(itertools.product(chosen["trainer"], [wrapper], chosen["checkpointing"], chosen["method"]))
        with tempfile.TemporaryDirectory() as folder:
            results = run_cells(cells, Path(folder), say)
        failed = {cell: (*cell[:3], CONTROLS[cell[3]]) for cell in cells if results[cell]["found"] == "failed"}
        with tempfile.TemporaryDirectory() as folder:
            controls = run_cells(sorted(set(failed.values())), Path(folder), say)
        for cell, control in failed.items():
            if controls[control]["found"] != "right":
                results[cell] = {"found": "theirs", "said": controls[control]["said"]}
        found += [{"cell": list(cell), **results[cell]} for cell in cells]
    return found


FOUND = Path(__file__).with_name("found.json")
PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BEGIN, END = "<!-- the matrix, by tests/trainers/matrix.py -->\n", "<!-- end of the matrix -->"
_WORDS = {"theirs": "fails without sinkroute too", "told": "told"}


def render(rows: list[dict[str, Any]]) -> str:
    """The table of the page: a row for each trainer and wrapper, a column for each router."""
    known = {tuple(row["cell"]): _WORDS.get(row["found"], row["found"]) for row in rows}
    counts = {word: list(known.values()).count(word) for word in dict.fromkeys(known.values())}
    told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda item: -item[1]))
    lines = [f"{len(known)} cells: {told}.", "", f"| | | {' | '.join(METHODS)} |", "|---|---|" + "---|" * len(METHODS)]
    for trainer, wrapper in itertools.product(TRAINERS, WRAPPERS):
        texts = []
        for method in METHODS:
            modes = [known.get((trainer, wrapper, mode, method), "not run") for mode in CHECKPOINTING]
            texts.append(modes[0] if len(set(modes)) == 1 else " / ".join(modes))
        lines.append(f"| {trainer} | {wrapper} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]]) -> None:
    """Put new rows among those that are kept, and the table on the page."""
    kept = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else []
    merged = {tuple(row["cell"]): row for row in (*kept, *rows)}
    order = list(itertools.product(TRAINERS, WRAPPERS, CHECKPOINTING, METHODS))
    rows = [
        {name: value for name, value in merged[cell].items() if name != "seconds"} for cell in order if cell in merged
    ]
    FOUND.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(head + BEGIN + render(rows) + END + rest.partition(END)[2], encoding="utf-8")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, known in (
        ("trainer", TRAINERS), ("wrapper", WRAPPERS), ("checkpointing", CHECKPOINTING), ("method", METHODS)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", nargs="+", default=list(known))
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--write", action="store_true", help="keep what was found, and put it into docs/trainers.md")
    return parser.parse_args(words)


def main() -> None:
    chosen = vars(parse())
    out, keep = chosen.pop("out"), chosen.pop("write")
    found = run_matrix(chosen, lambda text: print(text, flush=True))
    if out is not None:
        out.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n", encoding="utf-8")
    if keep:
        write(found)


if __name__ == "__main__":
    main()
