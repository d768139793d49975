"""An export on the disk: a folder that appears whole, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sinkroute.lab.data.registry import BYTE_CORPORA
from sinkroute.lab.export.agreement import Agreement, measure_agreement
from sinkroute.lab.export.architectures import convert
from sinkroute.lab.export.card import write_card
from sinkroute.lab.export.serving import ExportError
from sinkroute.lab.export.tokenizer import make_tokenizer
from sinkroute.lab.files import write_json
from sinkroute.lab.models import Decoder
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
        output: a folder that does not exist, is empty, or holds an earlier export and nothing else, which is replaced.

    Raises:
        ExportError: no architecture computes this model, the folder holds something else, or the exported model does
            not say what the run's says.
        OSError: it cannot be written; what was there is untouched.
    """
    _refuse_others_files(output)
    length, corpus = run.config.data.length, run.config.data.name
    if isinstance(run.model, Decoder) and corpus not in BYTE_CORPORA:
        raise ExportError(
            f"data.name={corpus!r} cannot be exported: the tokenizer of an export has the bytes of a text for ids, and "
            "this corpus has others"
        )
    model = convert(run.model, run.config)
    agreement = measure_agreement(run.model, model, length)
    if not agreement.usual_difference <= _TOLERANCE * max(agreement.logit_size, 1):
        raise ExportError(
            f"the exported {type(model).__name__} does not compute what the model of {run.folder} does: logits differ "
            f"by {agreement.usual_difference:.1e} at the median symbol. The installed transformers may have changed; "
            "docs/export.md names the version that was tested"
        )
    export = Export(output, type(model).__name__, run.checkpoint.name, agreement)
    place = output.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
    draft, aside = work / "new", work / "old"
    try:
        draft.mkdir()
        model.save_pretrained(draft)
        make_tokenizer(length).save_pretrained(draft)
        write_card(run, export.architecture, agreement, draft / "README.md")
        mark = {
            "architecture": export.architecture,
            "checkpoint": export.checkpoint,
            "agreement": asdict(agreement),
            "files": sorted([_MARK, *(path.name for path in draft.iterdir())]),
        }
        write_json(mark, draft / _MARK)
        # A folder cannot be replaced in one step: the old one stands aside until it is done.
        if place.exists():
            place.rename(aside)
        draft.rename(place)
    finally:
        # Whatever came between, Ctrl-C included. If this rename fails, the old folder is not deleted either.
        if aside.exists() and not place.exists():
            aside.rename(place)
        shutil.rmtree(work, ignore_errors=True)
    return export


def _refuse_others_files(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output} is a file; choose a folder for --output")
    others = sorted({path.name for path in output.iterdir()} - _written(output))
    if others:
        raise ExportError(
            f"{output} holds something else than an earlier export ({', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}); move it away, or choose another --output"
        )


def _written(folder: Path) -> set[str]:
    """The names of an earlier export's files, as it wrote them down; empty if the folder holds none."""
    try:
        return set(json.loads((folder / _MARK).read_text(encoding="utf-8"))["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()
