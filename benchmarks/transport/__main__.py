"""The command: pin the process, go over the problems, write each down, show tables."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
NOT_OF_FIGURES = ("quick", "only", "out", "fresh", "memory", "faults")
"""Settings that no figure depends on."""


@dataclass
class Benchmark:
    """`sinkroute.solve` against public solvers of the same problem. The same --out continues after Ctrl-C."""

    quick: bool = False
    """A cross-section of 20 problems instead of all."""
    only: tuple[str, ...] = ()
    """Only these sizes, such as 65536x256 or 1048576x64."""
    methods: tuple[str, ...] = ("auto",)
    """Methods of `sinkroute.solve`; peers are compared with the first."""
    peers: bool = True
    """Measure the peers too."""
    peers_everywhere: bool = False
    """Bring peers to 1e-6 at the large sizes too, where it takes them longer than all the rest together."""
    threads: int = 1
    """Cores that everything is pinned to."""
    repeats: int = 9
    """Timings of each method on each problem; slow ones get fewer."""
    cap: float = 1.2
    """Seconds that a run of a peer may take at 65536x256; elsewhere in proportion, but not less than a third of it."""
    seed: int = 0
    """Of the logits."""
    out: str = "runs/transport.json"
    """Figures, written after every problem."""
    fresh: bool = False
    """Begin anew instead of continuing what --out holds."""
    memory: bool = True
    """Measure peak memory too, at the end."""
    faults: bool = False
    """Only show the logits on which Megatron-Core's function goes wrong."""


def main() -> None:
    benchmark = tyro.cli(Benchmark, prog="python -m benchmarks.transport")
    pin(benchmark.threads)
    import torch  # after pinning, which libraries look at when they are loaded

    torch.set_num_threads(benchmark.threads)
    try:
        run(benchmark)
    except KeyboardInterrupt:
        sys.exit(130)


def pin(threads: int) -> None:
    """Give this process so many cores and as many threads in every library."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    os.environ.update(dict.fromkeys(THREADS, str(threads)))


def run(benchmark: Benchmark) -> None:
    from rich.console import Console

    from sinkroute.lab.files import write_json
    from sinkroute.lab.progress import Bar
    from sinkroute.transport import list_solvers

    from .faults import measure_faults, show_faults
    from .measure import Bench
    from .memory import measure_memory
    from .peers import PEERS
    from .problems import grid
    from .summary import show, show_memory, summarise

    console = Console(width=None if sys.stdout.isatty() else 130)
    if benchmark.faults:
        show_faults(measure_faults(benchmark.methods[0], benchmark.seed, 5 * benchmark.cap), console)
        return
    todo = grid(benchmark.seed, benchmark.quick, benchmark.only)
    check("--only", benchmark.only, {problem.size for problem in grid(benchmark.seed, benchmark.quick, ())})
    check("--methods", benchmark.methods, {"auto", *list_solvers()})
    path = Path(benchmark.out)
    content = begin(benchmark, path)
    problems: dict[str, dict[str, Any]] = content["problems"]
    bench = Bench(
        methods=benchmark.methods,
        peers=tuple(PEERS) if benchmark.peers else (),
        peers_everywhere=benchmark.peers_everywhere,
        repeats=benchmark.repeats,
        cap=benchmark.cap,
    )
    try:
        with Bar(console, len(todo)) as bar:
            for problem in todo:
                if problem.name not in problems:
                    bench.tell = partial(bar.tell, problem.name)
                    record = {"name": problem.name, "size": problem.size, **asdict(problem), **bench.measure(problem)}
                    # JSON knows no NaN, the error of a peer that gave one. More than four digits are noise.
                    problems[problem.name] = json.loads(
                        json.dumps(record),
                        parse_constant=lambda constant: None,
                        parse_float=lambda x: float(f"{float(x):.4g}"),
                    )
                    write_json(content, path, indent=None)
                bar.advance(problem.name)
            if benchmark.memory and "memory" not in content:
                content["memory"] = measure_memory(benchmark.methods, benchmark.seed, partial(bar.tell, "memory"))
    finally:
        if problems:
            for method in benchmark.methods:
                content["summary"][method] = summarise(list(problems.values()), method)
                show(content["summary"][method], list(problems.values()), method, console)
            if "memory" in content:
                show_memory(content["memory"], console)
            write_json(content, path, indent=None)
            console.print(f"{described(content)}\nfigures: {path}", highlight=False)


def check(option: str, given: Iterable[str], known: set[str]) -> None:
    for value in given:
        if value not in known:
            sys.exit(f"{option} {value}: unknown; known are {', '.join(sorted(known))}")


def begin(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    """What --out holds, if it was measured in the same way; else an empty record of this machine and these settings."""
    from sinkroute.lab.machine import machine

    from .peers import versions

    settings = {
        key: value for key, value in asdict(benchmark).items() if key not in ("out", "fresh", "memory", "faults")
    }
    content = {
        "machine": {**machine(), "packages": versions()},
        "settings": {**settings, "solver": digest()},
        "problems": {},
        "summary": {},
    }
    content = json.loads(json.dumps(content))
    if benchmark.fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return content
    before = json.loads(path.read_text(encoding="utf-8"))
    for part in ("machine", "settings"):
        for key, value in content[part].items():
            if before[part].get(key) != value:
                sys.exit(
                    f"{path} was measured with {part} {key}={before[part].get(key)!r}, now it is {value!r}: "
                    "give another --out, or --fresh to begin anew"
                )
    return dict(before)


def digest() -> str:
    """Of the solver's text: figures of one text do not continue with another."""
    from sinkroute import transport

    files = sorted(path for path in Path(transport.__file__).parent.rglob("*") if path.suffix in (".py", ".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def described(content: dict[str, Any]) -> str:
    machine, settings = content["machine"], content["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {settings['threads']} core(s), Python {machine['python']}, "
        f"torch {machine['torch']}, {packages}; seed {settings['seed']}, median of up to {settings['repeats']}"
    )


if __name__ == "__main__":
    main()
