"""What a patch costs: whole training steps of a patched Mixtral and OLMoE, relative to the unpatched model's.

    python benchmarks/hf_overhead.py [--repeats 5] [--pairs 20] [--threads 2] [--out FILE.json]

Steps of all variants alternate in one process, in an order that is shuffled at each turn, and a variant's time is set
against the unpatched model's of the same turn; a repeat is the median of those ratios. All models are alike and stay
so: the learning rate is 0, so that no difference in routing shows as a difference in work. Steps with a plan are timed
apart (p = 1): the ratio at p = 0.001 is the mean of both, weighted. The unpatched model against a second one of itself
is what the benchmark calls a difference where there is none.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sinkroute
from sinkroute.lab.bench.timing import alternate
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine

VARIANTS: dict[str, dict[str, Any] | None] = {
    "unpatched": None,
    "unpatched again": None,
    "softmax": {"router": "softmax"},
    "ssr-l, p = 0, no noise": {"router": "ssr-l", "probability": 0.0, "noise": 0.0},
    "ssr-l, p = 0": {"router": "ssr-l", "probability": 0.0},
    "ssr-l, Sinkhorn step": {"router": "ssr-l", "probability": 1.0},
    "ssr-s, Sinkhorn step": {"router": "ssr-s", "probability": 1.0},
    "ssr-dual": {"router": "ssr-dual"},  # it moves the gates: its experts' loads become even, and their work alike
}
# Name → share of Sinkhorn steps, the variants of the steps between them and of these.
MIXED = {"ssr-l, p = 0.001": (0.001, "ssr-l, p = 0", "ssr-l, Sinkhorn step")}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: transformers.MixtralConfig(
        **SIZES,
        hidden_size=384,
        intermediate_size=768,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "OLMoE": lambda: transformers.OlmoeConfig(
        **SIZES,
        hidden_size=384,
        intermediate_size=384,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
    ),
}


@dataclass
class Benchmark:
    """Time of a training step of patched models, relative to the unpatched."""

    repeats: int = 5
    """Repeats; each gives one ratio per variant."""
    pairs: int = 20
    """Steps of each variant in a repeat."""
    batch: int = 4
    """Sequences in a batch."""
    length: int = 256
    """Tokens in a sequence."""
    threads: int = 2
    """Threads of torch."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def stepper(config: Any, options: dict[str, Any] | None, batch: int, length: int) -> Callable[[], None]:
    """A function that makes one training step."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if options is not None:
        sinkroute.patch(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    count = 0

    def step() -> None:
        nonlocal count
        if options is not None:
            sinkroute.set_step(model, count)
        count += 1
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(config: Any, benchmark: Benchmark) -> tuple[dict[str, list[float]], float]:
    """Ratios to the unpatched model by variant, one a repeat, and its median milliseconds."""
    steppers = {name: stepper(config, options, benchmark.batch, benchmark.length) for name, options in VARIANTS.items()}
    for step in steppers.values():
        for _ in range(2):
            step()

    def timed(name: str) -> float:
        begin = time.perf_counter()
        steppers[name]()
        return time.perf_counter() - begin

    repeats = track(range(benchmark.repeats), "repeats")
    found = alternate([list(VARIANTS)] * benchmark.pairs, "unpatched", timed, repeats=repeats)
    ratios = found.ratios
    for name, (share, between, sinkhorn) in MIXED.items():
        ratios[name] = [
            (1 - share) * one + share * other for one, other in zip(ratios[between], ratios[sinkhorn], strict=True)
        ]
    return ratios, found.milliseconds


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    torch.set_num_threads(benchmark.threads)
    about = {**machine(), "threads": benchmark.threads, "transformers": transformers.__version__}
    console, models = Console(), {}
    for model, make_config in CONFIGS.items():
        config = make_config()
        ratios, milliseconds = measure(config, benchmark)
        models[model] = {"unpatched_ms": milliseconds, "ratios": ratios, "config": config.to_diff_dict()}
        table = Table(
            title=f"{model}: step time relative to the unpatched ({milliseconds:.0f} ms; {benchmark.batch} × "
            f"{benchmark.length} tokens)",
            caption=f"{about['cpu']}, {benchmark.threads} threads, torch {about['torch']}, transformers "
            f"{about['transformers']}; {benchmark.repeats} repeats of {benchmark.pairs} alternating steps",
        )
        for column in ("variant", "median", "smallest", "largest"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for name, values in ratios.items():
            table.add_row(name, *(f"{value:.4f}" for value in (statistics.median(values), min(values), max(values))))
        console.print(table)
    if benchmark.out:
        settings = {name: getattr(benchmark, name) for name in ("repeats", "pairs", "batch", "length")}
        content = {"machine": about, "settings": settings, "models": models}
        write_json(json.loads(json.dumps(content)), Path(benchmark.out))


if __name__ == "__main__":
    main()
