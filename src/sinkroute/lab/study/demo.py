"""The demo: SSR and the methods that it replaces, side by side, on real text, in minutes."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import Field
from rich.console import Console
from rich.markup import escape

from sinkroute._errors import unknown_name
from sinkroute.lab.bench import measure_steps
from sinkroute.lab.checkpoint import CheckpointError
from sinkroute.lab.config import Config, DataConfig, EvalConfig, ModelConfig, RouterConfig, TrainConfig, to_mapping
from sinkroute.lab.data import Corpus, load_corpus
from sinkroute.lab.display import Display
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest, stop_on_signal
from sinkroute.lab.machine import machine
from sinkroute.lab.ngram import ngram_bits_per_byte
from sinkroute.lab.run import execute
from sinkroute.lab.settings import Flag, Key, Natural, settings
from sinkroute.lab.training import Diverged

__all__ = ["DemoConfig", "run_demo"]


@settings()
class DemoConfig:
    """Train one small sparse language model per routing method on Wikipedia text, evaluate, attack, and report."""

    out: str = "runs/demo"
    """Folder for runs and report."""
    seeds: tuple[Natural, ...] = (0,)
    """A run per method and seed; three or more give intervals."""
    only: tuple[str, ...] = ()
    """Just these methods; empty: all."""
    fresh: Flag = False
    """Delete earlier runs in the folder; otherwise finished runs are kept and unfinished ones continued."""
    methods: Annotated[dict[Key, RouterConfig], tyro.conf.Suppress] = Field(default_factory=dict)
    """Name → router."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)


def run_demo(demo: DemoConfig, console: Console) -> int:
    """Run it; returns the exit code of the command: 0, 1 if a method failed, or 130 if it was interrupted.

    Raises:
        ValueError: an unknown method, or a folder that holds runs with another configuration.
    """
    from sinkroute.lab.study import (
        read_runs,
        result_table,
        write_picture,
        write_report,
    )  # late: they import matplotlib

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
    interrupted, failures = "", []
    with Display(console) as display, stop_on_signal() as stop:
        about = _baselines(corpus, [name for name, _ in runs])
        times = _step_times(runs, out, display, stop)
        write_json(about | ({"step_times": times} if times else {}), out / "baselines.json")
        waiting = {
            name: _work(config, corpus, times) for name, config in runs if not (out / name / "result.json").exists()
        }
        display.expect(waiting)
        for name, config in runs:
            if stop:
                break
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
    begun = [out / name for name, _ in runs if (out / name / "config.yaml").exists()]
    if begun:
        found = read_runs(begun)
        console.print(result_table(found))
        report = write_report(found, out / "report.html")
        write_picture(found, out / "demo.png")
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


def _step_times(runs: list[tuple[str, Config]], out: Path, display: Display, stop: StopRequest) -> dict[str, Any]:
    """A training step of each method, timed in turn: milliseconds of the first, ratios to it of all.

    What an earlier call has measured of these runs stays. Nothing of an interrupted measurement is kept.
    """
    configs = {config.label: config for _, config in runs}
    settings = {name: to_mapping(config) for name, config in configs.items()}
    for setting in settings.values():
        del setting["seed"]
    known = _known_times(out / "baselines.json")
    if known.get("settings") == settings:
        return known
    first = next(iter(configs))

    def pause() -> None:
        if stop:
            raise Interrupted("stopped")

    display.begin("time per step", 1)
    display.note(f"{len(configs)} methods in turn")
    with torch.random.fork_rng(), contextlib.suppress(Interrupted):
        found = measure_steps(configs, first, repeats=5, seconds=30, pause=pause)
        display.note(f"{found.milliseconds:.0f} ms ({first})", done=True)
        return {"baseline": first, "milliseconds": found.milliseconds, "ratios": found.ratios, "settings": settings}
    return {}


def _known_times(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["step_times"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _work(config: Config, corpus: Corpus, times: Mapping[str, Any]) -> float:
    """How long a run takes beside the others, in steps of the baseline."""
    ratios = times.get("ratios", {}).get(config.label, [1.0])
    texts = min(config.eval.limit or len(corpus.valid), len(corpus.valid)) * (1 + len(config.eval.attacks))
    # A forward pass is about a third of a step.
    evaluation = texts / (3 * config.train.batch * config.data.length)
    return config.train.steps * statistics.median(ratios) + evaluation


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
