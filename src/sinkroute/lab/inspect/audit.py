"""The inspection: a checkpoint and a text in, an `Audit` out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkroute._errors import require_count
from sinkroute.lab.inspect.by_layer import LayeredCheckpoint, layers_of
from sinkroute.lab.inspect.loading import (
    checkpoint_files,
    explained,
    load_config,
    load_model,
    load_tokenizer,
    refuse_dense,
)
from sinkroute.lab.inspect.lockstep import run_in_lockstep
from sinkroute.lab.inspect.result import Audit, Setting
from sinkroute.lab.inspect.tally import Tallies
from sinkroute.lab.inspect.text import InspectError, read_windows
from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Progress", "inspect_checkpoint"]

Progress = Callable[[int, int], None]


def inspect_checkpoint(
    model: str,
    text: str | Path,
    *,
    tokens: int = 16384,
    length: int | None = None,
    batch: int = 8,
    by_layer: bool = False,
    viewer_tokens: int = 0,
    on_status: Callable[[str], None] = lambda words: None,
    on_progress: Progress = lambda done, total: None,
) -> Audit:
    """Run a text through a checkpoint and count what its routers do.

    Args:
        model: folder of a Hugging Face checkpoint, or a hub id. Safetensors only, and no code of the checkpoint's.
        text: a UTF-8 file; its head is used.
        tokens: at most so many, cut down to whole windows.
        length: of a window; None: 512, or as many positions as the model has where they are fewer.
        batch: windows in a batch, over which alternatives are balanced.
        by_layer: whether to have one layer in memory at a time, and the hidden states of all windows.
        viewer_tokens: the choices of the first so many tokens are kept for `write_viewer`: 16 bytes for each layer
            and expert of a token.
        on_status: is told what is being done.
        on_progress: is told how much of it is done: batches, or with `by_layer` layers times batches.

    Raises:
        InspectError: a checkpoint or a text that cannot be inspected.
        ValueError: a number out of range.
    """
    require_count("tokens", tokens, 1)
    if length is not None:
        require_count("length", length, 2)
    require_count("batch", batch, 1)
    require_count("viewer_tokens", viewer_tokens, 0)
    started = time.perf_counter()
    reset_peak_memory()
    config = load_config(model)
    refuse_dense(model, config)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        length = 512 if most is None else min(512, most)
    elif most is not None and length > most:
        raise InspectError(f"length={length} is more than the {most} positions that {model!r} has; lower --length")
    on_status("reading the text")
    windows = read_windows(Path(text), load_tokenizer(model, config), length, tokens, viewer_tokens)
    batches = windows.batches(batch)
    on_status("loading the model")
    if by_layer:
        folder = _download(model) if checkpoint_files(model) is None else model
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        layered = LayeredCheckpoint(folder, config, device or torch.device("cpu"))
        network, run = layered.model, partial(_run_layers, layered)
    else:
        folder, network = model, load_model(model, config)
        run = partial(_run_whole, network)
    on_status("routing")
    with (
        Tallies(network, model, length, windows.begun, len(windows.words)) as tallies,
        explained(f"{model!r} cannot be run"),
    ):
        run([site.path for site in tallies.sites], batches, on_progress)
    dtype = next(network.parameters()).dtype
    files = checkpoint_files(folder)
    width = getattr(config.get_text_config(), "hidden_size", 0)
    return Audit(
        Setting(
            model=model,
            architecture=type(network).__name__,
            dtype=str(dtype).removeprefix("torch."),
            device=(layered.device if by_layer else network.device).type,
            text=str(text),
            tokens=windows.counted,
            windows=len(windows.ids_NL),
            length=length,
            batch=batch,
            bos=windows.begun,
            by_layer=by_layer,
            held_mb=windows.ids_NL.numel() * width * dtype.itemsize / 2**20 if by_layer else 0.0,
        ),
        tallies.layers(),
        time.perf_counter() - started,
        peak_memory_mb(),
        None if files is None else sum(file.stat().st_size for file in files) / 2**20,
        windows.words,
    )


@torch.no_grad()
def _run_whole(network: PreTrainedModel, routers: list[str], batches: list[Tensor], on_progress: Progress) -> None:
    on_progress(0, len(batches))
    with _without_head(network):
        for done, ids_BL in enumerate(batches, start=1):
            network(input_ids=ids_BL.to(network.device), use_cache=False)
            on_progress(done, len(batches))


def _run_layers(layered: LayeredCheckpoint, routers: list[str], batches: list[Tensor], on_progress: Progress) -> None:
    network, layers = layered.model, layers_of(layered.model, routers)
    head = network.get_output_embeddings()
    layered.read_all_but(layers if head is None else [*layers, head])
    steps, done = len(batches) * len(layers), 0

    def advanced() -> None:
        nonlocal done
        done += 1
        on_progress(min(done, steps), steps)

    on_progress(0, steps)
    passes = [partial(network, input_ids=ids_BL.to(layered.device), use_cache=False) for ids_BL in batches]
    with _without_head(network):
        run_in_lockstep(passes, layers, layered.enter, advanced)


@contextmanager
def _without_head(network: PreTrainedModel) -> Iterator[None]:
    """Logits of the vocabulary would be larger than all else, and nobody looks at them."""
    head = network.get_output_embeddings()
    if head is not None:
        head.forward = lambda hidden_BLD, *_: hidden_BLD
    try:
        yield
    finally:
        if head is not None:
            del head.forward


def _download(model: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])
