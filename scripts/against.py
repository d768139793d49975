"""Compare this checkout, edits included, with a commit: the same results, bit for bit? The same speed?

    python scripts/against.py COMMIT                       results and speed
    python scripts/against.py COMMIT --results [WORD...]   results alone, of problems with one of the words in the name
    python scripts/against.py COMMIT --speed [WORD...]     speed alone
    SINKROUTE_NATIVE=0 python scripts/against.py COMMIT    without the C kernels

The commit is checked out into a temporary git worktree; `recorded.py` of this checkout asks both, each in its process.
Results are those of transport, of every router with many options, of layers and of patched models. The exit code is 1
if one differs.

Speed is processor time on one thread. In a round the processes take turns, in an order that is drawn anew, and the
ratio is that of the round, as machines drift: below 1 where this checkout is faster. The table has its median with the
quartiles, and the ratio of the least times. The floor is the same for a second process of the commit: a ratio within
the floor is noise of the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).with_name("recorded.py")
ROUND_SECONDS = 0.05  # of one call's repeats in a round
SHOWN = 4  # numbers of a problem that differ


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The commit in a folder, which goes afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "base"
        subprocess.run([*git, "add", "--quiet", "--detach", str(where), commit], check=True)
        try:
            yield where
        finally:
            subprocess.run([*git, "remove", "--force", str(where)], check=True)


def asked(checkout: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command that asks a checkout, and its environment."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return [sys.executable, str(RECORDED), *arguments], environment


# -- results -------------------------------------------------------------------------------------------------------


def results(checkouts: list[Path], words: list[str]) -> list[dict[str, np.ndarray]]:
    """`PROBLEM: NUMBER` → array, of each checkout."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.npz" for n in range(len(checkouts))]
        processes = []
        for checkout, file in zip(checkouts, files, strict=True):
            command, environment = asked(checkout, "results", str(file), *words)
            processes.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("against: a checkout could not be asked; see above")
        found = []
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                found.append(dict(arrays))
    return found


def differences(base: Mapping[str, np.ndarray], this: Mapping[str, np.ndarray]) -> dict[str, str]:
    """`PROBLEM: NUMBER` → how the two differ, for those that do.

    >>> one = {"p: x": np.array([1.0, 2.0]), "p: y": np.array(0.0), "p: z": np.array("softmax")}
    >>> differences(one, {"p: x": np.array([1.0, 2.5]), "p: y": np.array(-0.0)})
    {'p: x': '1 of 2 numbers, by up to 0.5', 'p: y': '1 of 1 numbers, by up to 0', 'p: z': 'only the commit has it'}
    """
    found = {}
    for name in [*base, *(name for name in this if name not in base)]:
        if name not in this:
            found[name] = "only the commit has it"
        elif name not in base:
            found[name] = "only this checkout has it"
        elif said := difference(base[name], this[name]):
            found[name] = said
    return found


def difference(base: np.ndarray, this: np.ndarray) -> str:
    """How two arrays differ; empty if every bit is the same."""
    if (base.dtype, base.shape) != (this.dtype, this.shape):
        if base.dtype.kind == this.dtype.kind == "U":
            return f"{base} became {this}"
        return f"{base.dtype} {base.shape} became {this.dtype} {this.shape}"
    if base.tobytes() == this.tobytes():
        return ""
    if base.dtype.kind not in "fiub":
        return f"{base} became {this}"
    width = f"V{base.itemsize}"
    count = int((np.atleast_1d(base).view(width) != np.atleast_1d(this).view(width)).sum())
    gap = np.abs(base.astype(np.float64) - this.astype(np.float64))
    return f"{count} of {base.size} numbers, by up to {np.nanmax(gap):.3g}"


def by_problem(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`PROBLEM: NUMBER` → value as problem → number → value."""
    problems: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        problem, _, number = name.partition(": ")
        problems.setdefault(problem, {})[number] = value
    return problems


def report_results(base: dict[str, np.ndarray], this: dict[str, np.ndarray]) -> bool:
    """Print what differs; whether nothing does."""
    different, asked, refused = by_problem(differences(base, this)), by_problem(base | this), 0
    for problem, numbers in asked.items():
        said = different.get(problem, {})
        refused += "refused" in numbers and not said
        for number in [*said][:SHOWN]:
            print(f"{problem}: {number}: {said[number]}")
        if len(said) > SHOWN:
            print(f"{problem}: and {len(said) - SHOWN} more of {len(numbers)}")
    same = len(asked) - len(different) - refused
    print(f"{len(asked)} problems: {same} with the same bits, {refused} refused by both, {len(different)} different")
    return not different


# -- speed ---------------------------------------------------------------------------------------------------------


class Timed:
    """A process that times calls of a checkout when it is told to."""

    def __init__(self, checkout: Path) -> None:
        command, environment = asked(checkout, "speed")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.calls = self._line().split("\t")

    def seconds(self, call: str, repeats: int) -> float:
        """Of the fastest of so many repeats."""
        assert self.process.stdin is not None
        print(f"{call}\t{repeats}", file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("against: a checkout could not be timed; see above")
        return line.rstrip("\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def speed(base: Path, this: Path, rounds: int, words: list[str]) -> None:
    """Print a table: ratio of this checkout to the commit, and of the commit to itself."""
    processes = {"base": Timed(base), "again": Timed(base), "this": Timed(this)}
    try:
        calls = [c for c in processes["base"].calls if not words or any(word in c for word in words)]
        columns = "  ".join(f"{name:>6} {'quartiles':>14} {'least':>7}" for name in ("ratio", "floor"))
        print(f"{'':<32} {'commit':>9}  {columns}")
        for call in calls:
            fastest = max(process.seconds(call, 4) for process in processes.values())  # warm
            repeats = max(1, min(100, round(ROUND_SECONDS / fastest)))
            times: dict[str, list[float]] = {name: [] for name in processes}
            for _ in range(rounds):
                for name in random.sample(list(processes), len(processes)):
                    times[name].append(processes[name].seconds(call, repeats))
            shown = f"{call:<32} {1e3 * statistics.median(times['base']):>6.2f} ms"
            for name in ("this", "again"):
                shown += "  " + ratio(times["base"], times[name])
            print(shown, flush=True)
    finally:
        for process in processes.values():
            process.close()


def ratio(base: list[float], other: list[float]) -> str:
    """The median of the ratios of single rounds with their quartiles, and the ratio of the least times.

    >>> ratio([1.0, 2.0, 1.0], [2.0, 2.0, 2.5])
    ' 2.000 [1.500, 2.250]   2.000'
    """
    single = [b / a for a, b in zip(base, other, strict=True)]
    low, middle, high = statistics.quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
    return f"{middle:6.3f} [{low:.3f}, {high:.3f}] {min(other) / min(base):7.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what git calls the commit to compare with: HEAD~1, a tag, a hash")
    parser.add_argument("--results", nargs="*", metavar="WORD", help="results alone")
    parser.add_argument("--speed", nargs="*", metavar="WORD", help="speed alone")
    parser.add_argument("--rounds", type=int, default=15, help="of each call, for speed (default: 15)")
    options = parser.parse_args()
    both = options.results is None and options.speed is None
    same = True
    with checked_out(options.commit) as base:
        if both or options.results is not None:
            same = report_results(*results([base, ROOT], options.results or []))
        if both or options.speed is not None:
            speed(base, ROOT, options.rounds, options.speed or [])
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
