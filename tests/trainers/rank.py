"""One process of a group that runs cells of the matrix, one after the other: `python rank.py CELLS OUTPUT`.

A JSON object a line goes to OUTPUT, before each cell and after it, so that a crash is that of a cell.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import plain
import torch
import trained

# Said by us whatever is right or wrong.
_USUAL = ("callbacks that come before RouterCallback",)


def main(cells: Path, output: Path) -> None:
    torch.set_num_threads(1)
    listed = [trained.Cell(*words) for words in json.loads(cells.read_text(encoding="utf-8"))]
    if listed[0].wrapper not in ("single", "DDP"):
        trained.stand_for_accelerators(listed[0].wrapper)
    with open(output, "a", encoding="utf-8") as file:
        for number, cell in enumerate(listed):
            _tell(file, cell=cell, found="begun")
            since = time.monotonic()
            found = judge(cell, cells.parent / f"{cells.stem}-saved-{number}")
            _tell(file, cell=cell, **found, seconds=round(time.monotonic() - since, 1))
            if found["found"] == "failed" and trained.world() > 1:
                os._exit(1)  # the other rank may be anywhere
            _forget()


def judge(cell: trained.Cell, folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = trained.run(cell, folder)
        except Exception as error:
            return _failed(error)
    told = [str(warning.message) for warning in caught if _is_ours(warning)]
    wrong = plain.differences(run, plain.plain_run(trained.TRAINERS[cell.trainer], cell.method))
    if not wrong:
        return {"found": "right", "said": told}
    return {"found": "told" if told else "wrong", "said": told, "differs": wrong}


def _is_ours(warning: warnings.WarningMessage) -> bool:
    text = str(warning.message)
    if any(usual in text for usual in _USUAL):
        return False
    return "sinkroute" in text or "sinkroute" in Path(warning.filename).parts


def _failed(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = isinstance(error, ValueError | RuntimeError | TypeError) and (
        "sinkroute" in Path(frames[-1].filename).parts or "sinkroute" in str(error)
    )
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]]
    return {
        "found": "refused" if ours else "failed",
        "said": [f"{type(error).__name__}: {error}"[:600]],
        "where": where,
    }


def _forget() -> None:
    """What accelerate keeps from one run to the next."""
    from accelerate.state import AcceleratorState, GradientState

    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _tell(file: Any, cell: trained.Cell, **told: Any) -> None:
    file.write(json.dumps({"cell": list(cell), **told}) + "\n")
    file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
