"""Training steps of a full-size language model of the paper's family on this machine: time and peak memory.

    python benchmarks/wikitext_step.py [--preset wikitext103-medium] [--batch 4] [--out FILE.json]

The preset's own training loop, with its checkpoint at the end, on random symbols of its vocabulary: what is learnt does
not matter for what it costs. The batch is reduced (`--batch 4`), or cut into micro-batches (`--batch 48 --accumulation
12`). Memory is the highest resident one of the process, with the optimiser and the copies that the checkpoint makes.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from sinkroute.lab.config import Config, StreamConfig, find_preset, read_yaml
from sinkroute.lab.data import Corpus, Vocabulary
from sinkroute.lab.data.corpus import encoded_corpus
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory
from sinkroute.lab.run_folder import prepare_folder
from sinkroute.lab.training import train


@dataclass
class Benchmark:
    """Time and peak memory of a few training steps of a preset."""

    preset: str = "wikitext103-medium"
    """A preset, or a YAML file, of a "stream" model."""
    steps: int = 2
    """Optimiser steps; the first one pays for what happens once."""
    batch: int = 4
    """Streams in a step; the preset has 48."""
    accumulation: int = 1
    """Micro-batches that a step is cut into."""
    probability: float = 0.0
    """Share of Sinkhorn steps: 0 or 1 to time one kind."""
    threads: int = 2
    """Threads of torch."""
    out: str | None = None
    """Write the figures here, as JSON."""


def main() -> None:
    settings = tyro.cli(Benchmark)
    console = Console()
    torch.set_num_threads(settings.threads)
    config = read_yaml(Config, find_preset(settings.preset))
    assert isinstance(config.model, StreamConfig)
    config.router.options["probability"] = settings.probability
    config.train.steps, config.train.batch = settings.steps, settings.batch
    config.train.accumulation, config.train.log_every, config.eval.every = settings.accumulation, 1, 0
    corpus = _random_words(config.model.vocab, 2 * settings.batch * config.data.length)
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_folder(config, corpus, folder)
        started = time.perf_counter()
        model = train(config, corpus, folder)
        whole = time.perf_counter() - started
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = settings.batch * config.data.length
    found = {
        "settings": asdict(settings),
        "parameters": model.count_parameters()._asdict(),
        "tokens_per_step": tokens,
        "seconds_per_step": [tokens / line["tokens_per_second"] for line in lines],
        "seconds_with_checkpoint": whole,
        "losses": [line["loss"] for line in lines],
        "peak_memory_gb": peak_memory_mb() * 2**20 / 1e9,
        "machine": machine(),
    }
    console.print_json(json.dumps(found))
    if settings.out:
        write_json(found, Path(settings.out))


def _random_words(vocab: int, symbols: int) -> Corpus:
    ids = np.random.default_rng(0).integers(vocab, size=symbols)
    vocabulary = Vocabulary(tuple(f"word-{number}" for number in range(vocab)))
    return encoded_corpus("random words", "drawn with seed 0", vocabulary, ids, ids[:1], ids[:1])


if __name__ == "__main__":
    main()
