"""Loads and loss of Hugging Face models whose gates start skewed, by how they are routed in training.

    python benchmarks/hf_balance.py [--seeds 0 1 2] [--steps 300] [--out FILE.json] [--figure FILE.png]
    python benchmarks/hf_balance.py --steps 60 --probe 1 --methods none "load-balance, 0.01" ssr-dual --out FILE.json
    python benchmarks/hf_balance.py --against "quantile, ema 0.9" --methods "quantile, ema 0.9" ssr-dual --out FILE.json

A Mixtral and an OLMoE of 4 layers × 16 experts, top-2, with random weights, learn bytes of Wikipedia. To each gate's
weight a matrix of rank 1 is added that gives the experts of its layer an advantage, from 0 to `skew` in even steps and
in an order that is drawn:

    W += a mᵀ / |m|²,    a (E,) the advantages, m (D,) the mean input of that gate over the first batches

so that a typical token's logits are higher by a: MaxVio starts at 4, where E / K - 1 = 7 is the largest there is. All
methods of a seed have the same weights and read the same batches; the seed also keys the routers' draws.

With `probe`, the model is also served, plainly, after every so many steps, on the same 2048 validation bytes. "Steps
until balanced" is the first step at which MaxVio is below 0.5 and stays there for 3 probes or steps. With `against`
they are compared in training, seed by seed; where a run never is balanced, all its steps count.

"own loss" is the model's own balancing loss at its own coefficient. SSR's p is large beside the paper's 0.1 to 1 %: a
run is short, and is to have twenty or thirty Sinkhorn steps; with p = 0.01 it has a few.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sinkroute
from sinkroute.lab.data import Windows, load_corpus
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.progress import Bar
from sinkroute.lab.study.statistics import Estimate, holm, paired

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("softmax", {"keep_aux_loss": False}),
    "own loss": ("softmax", {"keep_aux_loss": True}),
    "load-balance, 0.01": ("load-balance", {"coefficient": 0.01}),
    "quantile, ema 0.9": ("quantile", {"ema": 0.9}),
    "ssr-l, p = 0.1": ("ssr-l", {"probability": 0.1}),
    "ssr-s, p = 0.1": ("ssr-s", {"probability": 0.1}),
    "ssr-b, p = 0.1": ("ssr-b", {"probability": 0.1}),
    "ssr-l, p = 0.01": ("ssr-l", {"probability": 0.01}),
    "ssr-l, p = 0.5": ("ssr-l", {"probability": 0.5}),
    "ssr-fold, p = 0.1": ("ssr-fold", {"probability": 0.1, "balance": "load", "weights": "scores", "noise": 0.3}),
    "ssr-dual": ("ssr-dual", {}),
    "ssr-dual, exact": ("ssr-dual", {"exact": True}),
}
EXPERTS, TOP_K, LAYERS = 16, 2, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


SETTINGS = ("steps", "batch", "length", "lr", "skew", "window", "probe")
BALANCED, STAYS = 0.5, 3


@dataclass
class Benchmark:
    """MaxVio over training, loss and serving of patched models whose gates start skewed."""

    models: list[str] = field(default_factory=lambda: ["mixtral", "olmoe"])
    """Which models."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Which rows of METHODS."""
    against: str = ""
    """The method with which the others' steps until balanced are compared."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run of every method per seed."""
    steps: int = 300
    """Training steps of a run."""
    batch: int = 8
    """Sequences in a batch."""
    length: int = 64
    """Bytes in a sequence."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, after 20 steps of warm-up; it falls to a tenth by a cosine."""
    skew: float = 1.0
    """Largest advantage of an expert, in logits."""
    window: int = 10
    """Steps that a point of the curve is the mean of."""
    probe: int = 0
    """After how many steps the loads of serving are looked at; 0: at the end only."""
    out: str = "benchmarks/results/hf_balance.json"
    """The figures, as JSON; written after every run. Runs that are there, with the same settings, are not repeated."""
    figure: str | None = None
    """Also draw MaxVio over training here."""


def make_model(name: str) -> transformers.PreTrainedModel:
    if name == "mixtral":
        mixtral = transformers.MixtralConfig(**SHAPE, intermediate_size=128, num_local_experts=EXPERTS)
        return transformers.MixtralForCausalLM(mixtral)
    olmoe = transformers.OlmoeConfig(**SHAPE, intermediate_size=128, num_experts=EXPERTS)
    return transformers.OlmoeForCausalLM(olmoe)


@torch.no_grad()
def skew_gates(model: Any, symbols: Tensor, skew: float, generator: torch.Generator) -> None:
    """Layer by layer: the skew of one changes what the next is given."""
    for layer in model.model.layers:
        seen: list[Tensor] = []
        hook = layer.mlp.gate.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(input_ids=symbols)
        hook.remove()
        mean_D = seen[0].reshape(-1, seen[0].shape[-1]).mean(0)
        advantages_E = torch.linspace(0, skew, EXPERTS)[torch.randperm(EXPERTS, generator=generator)]
        layer.mlp.gate.weight += torch.outer(advantages_E, mean_D / mean_D.square().sum())


def run(benchmark: Benchmark, name: str, method: str, seed: int) -> dict[str, Any]:
    begun = time.perf_counter()
    corpus = load_corpus("wikipedia")
    data = Windows(corpus.train, benchmark.length, seed, benchmark.steps * benchmark.batch)
    torch.manual_seed(seed)
    model = make_model(name).train()
    router, options = METHODS[method]
    first = torch.stack([data[i]["inputs"] for i in range(4 * benchmark.batch)])
    skew_gates(model, first, benchmark.skew, torch.Generator().manual_seed(seed))
    model.config.output_router_logits = bool(options.get("keep_aux_loss"))
    handle = sinkroute.patch(model, router, seed=seed, **options)
    monitor = sinkroute.LoadMonitor(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=benchmark.lr, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, benchmark.steps))
    with torch.no_grad():
        model.eval()(input_ids=first[: benchmark.batch])
    start = statistics.fmean(layer["max_vio"] for layer in monitor.metrics("eval", reset=True).values())
    model.train()
    curve, served_curve, sinkhorn = [], [], 0
    probed = torch.from_numpy(corpus.valid[: 32 * benchmark.length].copy()).long().view(32, -1)
    for step in range(benchmark.steps):
        sinkroute.set_step(model, step, total_steps=benchmark.steps)
        items = data.__getitems__(range(step * benchmark.batch, (step + 1) * benchmark.batch))
        symbols = torch.stack([item["inputs"] for item in items])
        model(input_ids=symbols, labels=symbols).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        sinkroute.end_step(model)
        layers = list(monitor.metrics("train", reset=True).values())
        curve.append(statistics.fmean(layer["max_vio"] for layer in layers))
        sinkhorn += layers[0]["sinkhorn_share"] > 0
        if benchmark.probe and (step + 1) % benchmark.probe == 0:
            with torch.no_grad():
                model.eval()(input_ids=probed)
            layers = list(monitor.metrics("eval", reset=True).values())
            served_curve.append(statistics.fmean(layer["max_vio"] for layer in layers))
            model.train()
    loss, served = evaluate(benchmark, model, monitor, corpus.valid)
    handle.remove()
    last = benchmark.steps // 5
    return {
        "model": name,
        "method": method,
        "seed": seed,
        "max_vio_start": start,
        "max_vio_training": statistics.fmean(curve),
        "max_vio_last_fifth": statistics.fmean(curve[-last:]),
        "max_vio_serving": statistics.fmean(layer["max_vio_global"] for layer in served),
        "dead": sum(layer["dead"] for layer in served),
        "eval_loss": loss,
        "sinkhorn_steps": sinkhorn,
        "balanced_after": _balanced_after(curve),
        # A probe comes after its step.
        "served_balanced_after": None if (at := _balanced_after(served_curve)) is None else (at + 1) * benchmark.probe,
        "served_curve": [round(value, 4) for value in served_curve],
        "curve": [
            round(statistics.fmean(curve[i : i + benchmark.window]), 4) for i in range(0, len(curve), benchmark.window)
        ],
        "seconds": time.perf_counter() - begun,
    }


def _balanced_after(curve: list[float]) -> int | None:
    """From which place on MaxVio is low and stays so for some; None: never.

    >>> _balanced_after([4.0, 0.4, 0.7, 0.4, 0.3, 0.2, 0.6])
    3
    """
    for at in range(len(curve) - STAYS + 1):
        if max(curve[at : at + STAYS]) < BALANCED:
            return at
    return None


@torch.no_grad()
def evaluate(
    benchmark: Benchmark, model: nn.Module, monitor: sinkroute.LoadMonitor, data: Any
) -> tuple[float, list[dict[str, Any]]]:
    """Nats per byte without any balancing loss, and the loads in `eval()`."""
    model.eval()
    rows = 64 * (benchmark.length + 1)
    symbols = torch.tensor(data[: 8 * rows].copy(), dtype=torch.int64).view(8, 64, -1)
    losses = []
    for batch in symbols:
        logits = model(input_ids=batch[:, :-1]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    return statistics.fmean(losses), list(monitor.metrics("eval").values())


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def rows(benchmark: Benchmark, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with half the 95 % t-interval; the loss also paired by seed against "none"."""
    figures = ("max_vio_start", "max_vio_training", "max_vio_last_fifth", "max_vio_serving", "dead", "eval_loss")
    plain = {(run["model"], run["seed"]): run["eval_loss"] for run in runs if run["method"] == "none"}
    found = []
    for model in benchmark.models:
        for method in benchmark.methods:
            own = [run for run in runs if (run["model"], run["method"]) == (model, method)]
            if not own:
                continue
            row: dict[str, Any] = {"model": model, "method": method, "runs": len(own)}
            row |= {name: _spread([run[name] for run in own]) for name in figures}
            row["sinkhorn_steps"] = [run["sinkhorn_steps"] for run in own]
            for name in ("balanced_after", "served_balanced_after"):
                row[name] = [run.get(name) for run in own]
            if method != "none":
                pairs = [(run["eval_loss"], plain.get((model, run["seed"]))) for run in own]
                row["against_none"] = _spread([loss - other for loss, other in pairs if other is not None])
            found.append(row)
    return found


def _spread(values: list[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    spread = Estimate.of(values)
    return {"mean": spread.mean, "half": spread.half}


def compare_steps(benchmark: Benchmark, runs: list[dict[str, Any]]) -> Table:
    """Steps until training is balanced against those of one method, seed by seed; p by the paired t-test and Holm."""
    shown = Table(title=f"Steps until MaxVio in training is below {BALANCED}, paired by seed")
    for column in ("model", "method", "steps", "never", f"against {benchmark.against}", "p", "p (Holm)"):
        shown.add_column(column, justify="left" if column in ("model", "method") else "right")
    steps: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        after = benchmark.steps if run["balanced_after"] is None else run["balanced_after"]
        steps.setdefault((run["model"], run["method"]), {})[run["seed"]] = float(after)
    tests = {
        key: paired([value - other[seed] for seed, value in own.items() if seed in other])
        for key, own in steps.items()
        if key[1] != benchmark.against and (other := steps.get((key[0], benchmark.against)))
    }
    corrected = dict(zip(tests, holm([1.0 if test.p is None else test.p for test in tests.values()]), strict=True))
    for (model, method), own in steps.items():
        cells = [Estimate.of(list(own.values())).text(1), str(sum(value == benchmark.steps for value in own.values()))]
        if test := tests.get((model, method)):
            p = "" if test.p is None else f"{test.p:.2g}"
            cells += [test.difference.text(1, sign=True), p, f"{corrected[model, method]:.2g}"]
        shown.add_row(model, method, *cells)
    return shown


def table(rows: list[dict[str, Any]]) -> Table:
    titles = {
        "max_vio_start": "at the start",
        "max_vio_training": "training",
        "max_vio_last_fifth": "its last fifth",
        "max_vio_serving": "serving",
        "dead": f"dead of {LAYERS * EXPERTS}",
        "eval_loss": "nats/byte",
        "against_none": "against none",
    }
    shown = Table(title="MaxVio and loss, mean ± half the 95 % t-interval over seeds")
    for column in ("model", "method", *titles.values(), "Sinkhorn steps", "steps until balanced", "served"):
        shown.add_column(column, justify="left" if column in ("model", "method") else "right")
    for row in rows:
        cells = [
            _shown(row.get(name), 1 if name == "dead" else 3 if "loss" in name or "none" in name else 2)
            for name in titles
        ]
        lists = [row["sinkhorn_steps"], row["balanced_after"], row["served_balanced_after"]]
        texts = [" ".join("–" if value is None else str(value) for value in values) for values in lists]
        shown.add_row(row["model"], row["method"], *cells, *texts)
    return shown


def _shown(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return ""
    half = "" if spread["half"] is None else f" ± {spread['half']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{half}"


def draw(benchmark: Benchmark, runs: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(benchmark.models) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(benchmark.models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, benchmark.models, strict=True):
        for method in benchmark.methods:
            curves = [run["curve"] for run in runs if (run["model"], run["method"]) == (model, method)]
            if curves:
                steps = [(i + 0.5) * benchmark.window for i in range(len(curves[0]))]
                axis.plot(steps, [statistics.fmean(point) for point in zip(*curves, strict=True)], label=method, lw=1.4)
        axis.set(title=model, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"MaxVio in training, mean of {benchmark.window} steps")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def read_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured before with these settings."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    same = all(content["settings"].get(name, 0) == value for name, value in settings.items())
    return list(content["runs"]) if same else []


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    torch.set_num_threads(1)
    console = Console(width=170)
    about = {**machine(), "transformers": transformers.__version__, "threads": 1}
    if benchmark.against and benchmark.against not in benchmark.methods:
        raise SystemExit(f"--against {benchmark.against!r} must be one of --methods: {', '.join(benchmark.methods)}")
    todo = [
        (seed, name, method) for seed in benchmark.seeds for name in benchmark.models for method in benchmark.methods
    ]
    settings = {"experts": EXPERTS, "top_k": TOP_K, **{name: getattr(benchmark, name) for name in SETTINGS}}
    runs = read_runs(Path(benchmark.out), settings)
    done = {(run["seed"], run["model"], run["method"]) for run in runs}
    todo = [key for key in todo if key not in done]
    found = rows(benchmark, runs)
    with Bar(console, len(todo)) as bar:
        for seed, name, method in todo:
            bar.tell(name, f"{method}, seed {seed}")
            runs.append(run(benchmark, name, method, seed))
            bar.advance(f"{name}, {method}, seed {seed}")
            found = rows(benchmark, runs)
            content = {"machine": about, "settings": settings, "rows": found, "runs": runs}
            write_json(content, Path(benchmark.out))
    console.print(table(found))
    if benchmark.against:
        console.print(compare_steps(benchmark, runs))
    if benchmark.figure:
        draw(benchmark, runs, benchmark.figure)


if __name__ == "__main__":
    main()
