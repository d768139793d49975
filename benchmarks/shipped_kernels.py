"""What it costs that a wheel's C kernels are compiled for a class of processors, and not for this very one.

    python benchmarks/shipped_kernels.py [--wheel FILE.whl] [--rounds 40] [--out FILE.json]

The libraries of a wheel (built here, unless one is named) against what this machine compiles for itself, in turn, in
an order that is shuffled at each turn, on one thread, in the process's own time. A ratio is the median over turns;
"native, again" is the noise. Of a level below this processor's, "native" is compiled without what that level lacks.
"""

from __future__ import annotations

import ctypes
import importlib.util
import random
import statistics
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

import sinkroute
from sinkroute.kernels import native
from sinkroute.kernels.native import build, functions, shipped
from sinkroute.kernels.normal import normal_like
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine

ROOT = Path(__file__).parents[1]
# What this processor is told not to have, for a native build to set beside a level below its own.
LACKS = {"x86-64-v3": ("-mno-avx512f",), "x86-64-v2": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")}
SIZES = ((4096, 16, 2), (4096, 64, 8), (2048, 256, 8))


@dataclass
class Benchmark:
    """The kernels of a wheel against those that are compiled for this processor."""

    wheel: Path | None = None
    """A wheel; by default the kernels are compiled as for one."""
    rounds: int = 40
    """Turns; each gives one ratio for every operation."""
    seed: int = 0
    """Of the logits and of the order."""
    out: Path = Path("runs/bench/shipped_kernels.json")
    """Where the figures are written, as JSON."""


def operations(tokens: int, experts: int, k: int) -> dict[str, Callable[[], object]]:
    """What users call, by name; all of it runs in the C kernels for the most part."""
    logits_TE = torch.randn(tokens, experts) + torch.linspace(0, 3, experts)
    plan, seed = sinkroute.solve(logits_TE, reg=0.1), torch.tensor(1)
    router = sinkroute.create_router("ssr-dual", num_experts=experts, top_k=k)
    noisy = sinkroute.create_router("noisy", num_experts=experts, top_k=k)

    def route(one: sinkroute.Router) -> object:
        sinkroute.set_step(one, 0)
        return one(logits_TE)

    return {
        "solve": lambda: sinkroute.solve(logits_TE, reg=0.1),
        "solve, softmax cost": lambda: sinkroute.solve(logits_TE, reg=0.1, cost="softmax"),
        "plan.topk": lambda: plan.topk(k),
        "balanced_topk": lambda: sinkroute.balanced_topk(logits_TE, k, tol=0.01),
        "ssr-dual": lambda: route(router),
        "noisy": lambda: route(noisy),
        "normal": lambda: normal_like(logits_TE, seed),
    }


def libraries(folder: Path, wheel: Path | None) -> list[Path]:
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".so"):
                    (folder / Path(name).name).write_bytes(archive.read(name))
    else:
        spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
        assert spec is not None and spec.loader is not None
        hook = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(hook)
        hook.compile_kernels(build.SOURCES, folder)
    return shipped.suitable(folder)


def native_without(folder: Path, level: str) -> ctypes.CDLL:
    path = folder / f"native-{level}.so"
    flags = [*build.compiler(), *build.FLAGS, *build.THREADS[0], *LACKS.get(level, ())]
    subprocess.run([*flags, "-shared", "-o", str(path), *map(str, build.SOURCES.glob("*.c"))], check=True)
    return loaded(path)


def loaded(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    functions.declare(kernels)
    return kernels


def timed(call: Callable[[], object], kernels: ctypes.CDLL) -> float:
    native._found = build.Found(kernels, "")
    before = time.process_time()
    call()
    return time.process_time() - before


def main(benchmark: Benchmark) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(benchmark.seed)
    order = random.Random(benchmark.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in libraries(folder, benchmark.wheel):
            level = path.stem.removeprefix("kernels-")
            ours = native_without(folder, level)
            kinds = {"native": ours, "shipped": loaded(path), "again": ours}
            for size in SIZES:
                for name, call in operations(*size).items():
                    took: dict[str, list[float]] = {kind: [] for kind in kinds}
                    for turn in range(benchmark.rounds + 1):
                        for kind in order.sample(list(kinds), len(kinds)):
                            seconds = timed(call, kinds[kind])
                            if turn:  # the first is for the caches
                                took[kind].append(seconds)
                    ratios = {
                        kind: statistics.median(a / b for a, b in zip(took[kind], took["native"], strict=True))
                        for kind in ("shipped", "again")
                    }
                    ms = 1000 * statistics.median(took["native"])
                    rows.append(
                        {"level": level, "size": "x".join(map(str, size)), "operation": name, "ms": ms, **ratios}
                    )
    table = Table("level", "tokens x experts x k", "operation", "ms, native", "shipped", "native, again")
    for row in rows:
        table.add_row(
            row["level"], row["size"], row["operation"], *(f"{row[key]:.3f}" for key in ("ms", "shipped", "again"))
        )
    console = Console()
    console.print(table)
    for level in dict.fromkeys(row["level"] for row in rows):
        of_level = [row["shipped"] for row in rows if row["level"] == level]
        console.print(f"{level}: geometric mean {statistics.geometric_mean(of_level):.3f}, worst {max(of_level):.3f}")
    write_json({"benchmark": "shipped_kernels", "machine": machine(), "rows": rows}, benchmark.out)


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
