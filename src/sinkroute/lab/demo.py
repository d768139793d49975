"""The demo: SSR and the methods that it replaces, side by side, on real text, in minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from sinkroute._errors import unknown_name
from sinkroute.lab.checkpoint import CheckpointError
from sinkroute.lab.config import Config, DataConfig, EvalConfig, ModelConfig, RouterConfig, TrainConfig
from sinkroute.lab.data import Corpus, load_corpus
from sinkroute.lab.display import Display
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, stop_on_signal
from sinkroute.lab.machine import machine
from sinkroute.lab.ngram import ngram_bits_per_byte
from sinkroute.lab.run import execute
from sinkroute.lab.training import Diverged

__all__ = ["DemoConfig", "run_demo"]


@dataclass
class DemoConfig:
    """Train one small sparse language model per routing method on Wikipedia text, evaluate, attack, and report."""

    out: str = "runs/demo"
    """Folder for runs and report."""
    seeds: tuple[int, ...] = (0,)
    """A run per method and seed; three or more give intervals."""
    only: tuple[str, ...] = ()
    """Just these methods; empty: all."""
    fresh: bool = False
    """Delete earlier runs in the folder; otherwise finished runs are kept and unfinished ones continued."""
    methods: Annotated[dict[str, RouterConfig], tyro.conf.Suppress] = field(default_factory=dict)
    """Name → router."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def run_demo(demo: DemoConfig, console: Console) -> int:
    """Run it; returns the exit code of the command: 0, 1 if a method failed, or 130 if it was interrupted.

    Raises:
        ValueError: an unknown method, or a folder that holds runs with another configuration.
    """
    from sinkroute.lab.report import read_runs, result_table, write_report  # late: it imports matplotlib

    for name in demo.only:
        if name not in demo.methods:
            raise unknown_name("method in --only", name, demo.methods)
    out = Path(demo.out)
    out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(demo.data.name, demo.data.path)
    runs = _runs(demo)
    console.print(
        f"[bold]sinkroute demo[/]: {len(runs)} runs of {demo.train.steps} steps on {corpus.name} "
        f"({len(corpus.train):,} bytes to train on) → {escape(str(out))}",
        highlight=False,
    )
    write_json(_baselines(corpus, [name for name, _ in runs]), out / "baselines.json")
    interrupted, failures = "", []
    with Display(console) as display, stop_on_signal() as stop:
        for name, config in runs:
            display.begin(name, config.train.steps)
            try:
                result = execute(
                    config,
                    corpus,
                    out / name,
                    fresh=demo.fresh,
                    stop=stop,
                    on_progress=display.update,
                    on_status=display.status,
                )
                display.note(f"{result['valid']['bits_per_byte']:.3f} bits per byte", done=True)
            except (Diverged, CheckpointError) as error:  # the other methods can still be compared
                failures.append(f"{name}: {error}")
                display.note("failed")
            except Interrupted as error:
                interrupted = f"{name} {error}"
            if stop:
                break
    begun = [out / name for name, _ in runs if (out / name / "config.yaml").exists()]
    if begun:
        found = read_runs(begun)
        console.print(result_table(found))
        report = write_report(found, out / "report.html")
        console.print(f"Report: [bold]{escape(str(report))}[/] (open it in a browser)", highlight=False, soft_wrap=True)
    for failure in failures:
        console.print(f"[red]failed[/] {escape(failure)}", highlight=False, soft_wrap=True)
    if stop:
        console.print(
            f"[yellow]Interrupted[/]: {escape(interrupted) or 'between two runs'}; the report shows what is there.",
            soft_wrap=True,
        )
        return 130
    return 1 if failures else 0


def _runs(demo: DemoConfig) -> list[tuple[str, Config]]:
    """(folder name, configuration) of every run: seeds outside, so that an interrupted demo has all methods alike."""
    runs = []
    for seed in demo.seeds:
        for name, router in demo.methods.items():
            if not demo.only or name in demo.only:
                config = Config(name, seed, demo.data, demo.model, router, demo.train, demo.eval)
                runs.append((f"{name}-seed{seed}", config))
    return runs


def _baselines(corpus: Corpus, order: list[str]) -> dict[str, Any]:
    """What the report needs beside the runs: yardsticks, corpus, machine."""
    before = bytes(corpus.train[-2:])
    bits = {
        name: {"bits_per_byte": ngram_bits_per_byte(corpus.train, corpus.valid, n, before)}
        for name, n in (("bigram", 2), ("trigram", 3))
    }
    sizes = {split: len(getattr(corpus, split)) for split in ("train", "valid", "test")}
    about = {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256, **sizes}
    return {**bits, "corpus": about, "machine": machine(), "order": order}
