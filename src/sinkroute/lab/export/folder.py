"""An export on the disk: a folder that appears whole, and replaces nothing but an earlier export."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sinkroute.lab.export.agreement import Agreement, measure_agreement
from sinkroute.lab.export.architectures import convert
from sinkroute.lab.export.card import write_card
from sinkroute.lab.export.serving import ExportError
from sinkroute.lab.export.tokenizer import make_tokenizer
from sinkroute.lab.files import write_json
from sinkroute.lab.trained import TrainedRun

__all__ = ["Export", "export_run"]

_MARK = "sinkroute-export.json"

# Rounding makes 1e-5; more at a symbol for which it chose another expert, of which there are few.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        architecture: the class of transformers that loads it.
        checkpoint: of the run, by name.
        agreement: with the lab's model.
    """

    folder: Path
    architecture: str
    checkpoint: str
    agreement: Agreement


def export_run(run: TrainedRun, output: Path) -> Export:
    """Write a run's model as a Hugging Face checkpoint: safetensors, tokenizer and model card, no code.

    Args:
        run: from `load_run`.
        output: a folder that does not exist, is empty, or holds an earlier export, which is replaced.

    Raises:
        ExportError: no architecture computes this model, the folder holds something else, or the exported model does
            not say what the run's says.
        OSError: it cannot be written; what was there is untouched.
    """
    _refuse_others_folder(output)
    length = run.config.data.length
    model = convert(run.model, run.config)
    agreement = measure_agreement(run.model, model, length)
    if not agreement.usual_difference <= _TOLERANCE * max(agreement.logit_size, 1):
        raise ExportError(
            f"the exported {type(model).__name__} does not compute what the model of {run.folder} does: logits differ "
            f"by {agreement.usual_difference:.1e} at the median symbol. The installed transformers may have changed; "
            "docs/export.md names the version that was tested"
        )
    export = Export(output, type(model).__name__, run.checkpoint.name, agreement)
    draft = output.with_name(f".{output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
    try:
        draft.mkdir(parents=True)
        model.save_pretrained(draft)
        make_tokenizer(length).save_pretrained(draft)
        write_card(run, export, draft / "README.md")
        mark = {"architecture": export.architecture, "checkpoint": export.checkpoint, "agreement": asdict(agreement)}
        write_json(mark, draft / _MARK)
        _put(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return export


def _refuse_others_folder(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output} is a file; choose a folder for --output")
    names = sorted(path.name for path in output.iterdir())
    if names and _MARK not in names:
        raise ExportError(
            f"{output} holds something else than an earlier export ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}); choose another --output"
        )


def _put(draft: Path, output: Path) -> None:
    """Give the draft its name. A folder cannot be replaced in one step: the old one stands aside until it is done."""
    aside = output.with_name(f".{output.name}.old")
    if output.exists():
        shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
        output.rename(aside)
    try:
        draft.rename(output)
    except OSError:
        if aside.exists():
            aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
