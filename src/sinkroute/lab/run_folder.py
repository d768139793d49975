"""The folder of a run: made, checked against the configuration and the data, emptied where that is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol

from sinkroute.lab.checkpoint import latest_checkpoint
from sinkroute.lab.config import Config, differences, read_yaml, write_yaml
from sinkroute.lab.files import write_json

__all__ = ["FREE_KEYS", "Data", "begun", "check_data", "prepare_folder"]


class Data(Protocol):
    """What identifies a text or a set of images."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def sha256(self) -> str: ...


# What a run writes; --fresh deletes these and nothing else.
_OWN_FILES = ("config.yaml", "corpus.json", "log.jsonl", "result.json", "evaluation-*.json", "checkpoints", "sinkroute")

# What may change between two calls of a run: it decides what is shown and kept, not which numbers come out of training.
FREE_KEYS = (
    "label", "eval.", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.trackers",
    "train.timeout_minutes", "train.sharded_checkpoints",
)  # fmt: skip


def prepare_folder(config: Config, data: Data, folder: Path, fresh: bool = False) -> None:
    """Make a run's folder, or check that the one there belongs to this configuration and these data.

    A folder in which nothing was trained yet (the run failed at once, say of a misspelt option) is taken over; what
    does not change the trained model, such as `eval`, may differ and is written anew.

    Raises:
        ValueError: the folder holds a run with another configuration or of other data, or something else.
    """
    written = folder / "config.yaml"
    if written.exists():
        try:
            earlier = read_yaml(Config, written)
        except ValueError as error:
            raise ValueError(f"{folder} holds something else than a run ({error}); choose another --out") from None
        if fresh:
            for pattern in _OWN_FILES:
                for path in folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif begun(folder):
            lines = differences(earlier, config)
            changed = [line for line in lines if not line.startswith(FREE_KEYS)]
            if changed:
                raise ValueError(
                    f"{folder} holds a run with another configuration ({'; '.join(changed)}); "
                    "choose another --out, or --fresh to delete it and start anew"
                )
            check_data(data, folder)
            if any(line.startswith("eval.") for line in lines):
                (folder / "result.json").unlink(missing_ok=True)  # it answers other questions; training is not repeated
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(config, written)
    about = {"name": data.name, "source": data.source, "sha256": data.sha256}
    write_json(about, folder / "corpus.json")


def begun(folder: Path) -> bool:
    """Whether a run has left something that a new one must not be mixed with."""
    log = folder / "log.jsonl"
    logged = log.exists() and log.stat().st_size > 0
    return logged or (folder / "result.json").exists() or latest_checkpoint(folder / "checkpoints") is not None


def check_data(data: Data, folder: Path) -> None:
    """Check that a run was trained on this very data: others would be split elsewhere, training examples in the test.

    Raises:
        ValueError: the data have changed since.
    """
    try:
        known = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'corpus.json'} cannot be read ({error!r}); --fresh starts the run anew") from None
    if known != data.sha256:
        raise ValueError(
            f"{folder} was trained on other data: SHA-256 {known[:12]}…, now {data.sha256[:12]}… "
            f"({data.source}); restore it, or --fresh to start anew"
        )
