"""Checkpoint folders of transformers' `Trainer`: which one a run is resumed from, and its weights, all of them.

In 5.23 no event tells the folder, and `Trainer` drops weights when it loads: `save_pretrained` writes experts one by
one under the names of the published checkpoints, `Trainer` reads the file back without converting, finds no such
parameter, logs "missing keys" and goes on with the experts (Mixtral: and gates) that the model was built with:
https://github.com/huggingface/transformers/issues/48805.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

__all__ = ["checkpoint_folder", "find_checkpoint", "reload_converted"]


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer saves at this step."""
    assert args.output_dir is not None
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def find_checkpoint(candidates: Iterable[Path], state: TrainerState) -> Path | None:
    """The first folder whose `trainer_state.json` is the one that the trainer has just read, by its logs."""
    for folder in candidates:
        file = folder / TRAINER_STATE_NAME
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            # Losses and run times: those of two runs differ.
            if saved["global_step"] == state.global_step and saved["log_history"] == state.log_history:
                return folder
    return None


def reload_converted(model: nn.Module, folder: Path, args: TrainingArguments) -> None:
    """Put the weights in `folder` into `model`, in place, if the trainer could not: their names are not the model's.

    It takes the memory of a second model for a moment, on the CPU. What FSDP and DeepSpeed save has the model's own
    names, and adapters (PEFT) are loaded by their own library: all these are left alone.
    """
    if not isinstance(model, PreTrainedModel) or args.fsdp or args.deepspeed:
        return
    if _saved_names(folder) <= model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder, dtype="auto", device_map="cpu").state_dict())


def _saved_names(folder: Path) -> set[str]:
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if whole.is_file():
        with safe_open(whole, "pt") as weights:
            return set(weights.keys())
    return set()
