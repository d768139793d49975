"""`sinkroute inspect`: the expert load of a checkpoint on a text, or of a run on its images."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from sinkroute.commands import UsageError

if TYPE_CHECKING:
    from sinkroute.lab.inspect import Audit

__all__ = ["run"]


@dataclass
class InspectCommand:
    """Audit the expert load of a Hugging Face checkpoint on a text: who is overloaded, who is dead, what balance costs.

    Nothing is trained or changed. Weights are read from safetensors, and no code of the checkpoint's is run.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The checkpoint's folder, or its id on the Hugging Face hub, from where it is then downloaded."""
    text: str | None = None
    """A text in UTF-8; its head is used. A run of `sinkroute train` on images takes no text: its validation images."""
    tokens: int = 16384
    """At most so many tokens of the text, cut down to whole windows; of images, to whole images."""
    length: int | None = None
    """Tokens in a window; by default 512, or as many positions as the model has where they are fewer."""
    batch: int | None = None
    """Windows in a batch, over which the balanced alternatives are balanced; by default 8. Of images: as many as in the
    run's training."""
    by_layer: bool = False
    """For models that are larger than the memory: read one layer at a time. The hidden states of all windows are kept,
    tokens x width numbers; --tokens bounds them."""
    output: str | None = None
    """A folder for inspect.html, a self-contained page with a heat map, tokens.html, which shows every token with its
    experts, and inspect.json."""
    viewer_tokens: int = 4096
    """At most so many tokens on tokens.html; 0 for no such page."""
    against: str | None = None
    """Another checkpoint, which is then inspected on the same text and stands beside the first on tokens.html."""
    json: str | None = None
    """Write the JSON here."""


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(InspectCommand, args=arguments, prog="sinkroute inspect")
    # What cannot be written should not be found out after an hour.
    targets = []
    if command.json:
        targets.append(Path(command.json))
        if targets[0].is_dir() or not os.access(targets[0].parent, os.W_OK):
            raise UsageError(f"--json {command.json} cannot be written: it needs a file in a folder that is there")
    if command.output:
        folder = Path(command.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {folder} cannot be made a folder: {error.strerror}") from error
        targets.append(folder / "inspect.json")
    # Compiled products that oneDNN remembers, one for each number of tokens that an expert may get: of 1024 some
    # hundred MB come together. To be set before torch is loaded.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    from sinkroute.lab.files import write_json
    from sinkroute.lab.inspect import is_run, write_page, write_viewer
    from sinkroute.lab.inspect.loading import load_config

    if command.against and not is_run(command.against):
        load_config(command.against)  # nor that it is not there
    audits = [_inspected(model, command, console) for model in (command.model, command.against) if model]
    first, *others = audits
    for path in targets:
        write_json(first.json() | ({"against": others[0].json()} if others else {}), path)
    if command.output:
        pages = ["inspect.html", "against.html"][: len(audits)]
        viewer = "tokens.html" if command.viewer_tokens else None
        for audit, page in zip(audits, pages, strict=True):
            write_page(audit, folder / page, viewer=viewer)
        if viewer:
            write_viewer(audits, folder / viewer)
            pages.append(viewer)
        told = ", ".join(str(folder / page) for page in pages)
        console.print(f"Page{'s' * (len(pages) > 1)}: {told}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _inspected(model: str, command: InspectCommand, console: Console) -> Audit:
    """Inspect one checkpoint and print what was found."""
    from rich.progress import Progress

    from sinkroute.lab.inspect import advice, audit_table, facts, inspect_checkpoint, inspect_images, is_run, summary

    gc.collect()  # modules hold each other: without, the checkpoint before would still be in memory
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        shared: dict[str, Any] = {
            "tokens": command.tokens,
            "viewer_tokens": command.viewer_tokens if command.output else 0,
            "on_progress": lambda done, total: bars.update(task, completed=done, total=total),
        }
        if is_run(model):
            given = {"--text": command.text, "--length": command.length, "--by-layer": command.by_layer or None}
            for option, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{option} is of checkpoints and texts, and {model} is a run of the lab's, which is inspected "
                        f"on its images; leave {option} out (a run on text: sinkroute export it first)"
                    )
            audit = inspect_images(model, batch=command.batch, **shared)
        elif command.text is None:
            raise UsageError(f"--text is missing: inspect runs a text through {model}; --text FILE")
        else:
            audit = inspect_checkpoint(
                model,
                command.text,
                length=command.length,
                batch=8 if command.batch is None else command.batch,
                by_layer=command.by_layer,
                on_status=lambda words: bars.update(task, description=words),
                **shared,
            )
    console.print(audit_table(audit))
    for sentence in (*summary(audit), "", *advice(audit), "", *facts(audit)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return audit
