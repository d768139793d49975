"""`sinkroute export`: a run's model as a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from sinkroute.lab.folders import require_run

__all__ = ["hide_progress_of_transformers", "run"]


@dataclass
class ExportCommand:
    """Write the model of a run's last checkpoint as a Hugging Face checkpoint that transformers loads without our code.

    Models that no architecture of transformers computes are refused, with the reason.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    output: str
    """The folder to write: new, empty, or an earlier export, which is replaced."""


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(ExportCommand, args=arguments, prog="sinkroute export")
    require_run(Path(command.run))

    from sinkroute.lab.export import export_run
    from sinkroute.lab.trained import load_run

    hide_progress_of_transformers()
    export = export_run(load_run(Path(command.run)), Path(command.output))
    agreement = export.agreement
    console.print(
        f"[bold]{escape(str(export.folder))}[/]: {export.architecture} of {export.checkpoint}. "
        f"Against the lab's model, on {agreement.symbols:,} random bytes: "
        f"logits differ by {agreement.logit_difference:.1e} at most (of {agreement.logit_size:.1f}), "
        f"the same experts are chosen at {agreement.same_experts:.2%}, "
        f"the same next byte is best at {agreement.same_best:.2%}.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def hide_progress_of_transformers() -> None:
    """Let transformers read and write files without bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files: over in a moment
