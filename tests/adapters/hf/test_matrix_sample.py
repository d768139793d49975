"""A sample of the matrix of trainers (tests/trainers) that needs no package beyond those of `make test`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).parents[2] / "trainers" / "matrix.py"


@pytest.mark.parametrize("wrapper", ["single", "DDP"])
def test_trainer_and_a_loop_with_accelerate_train_as_one_plain_loop_does(wrapper, tmp_path):
    out = tmp_path / "found.json"
    chosen = ["--trainer", "Trainer", "accelerate loop", "--wrapper", wrapper, "--checkpointing", "not reentrant"]
    chosen += ["--method", "ssr-dual in the gate", "ssr-dual in the bias", "load-balance", "--out", str(out)]
    done = subprocess.run([sys.executable, str(PROGRAM), *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["found"] for row in rows] == ["right"] * 6, json.dumps(rows, indent=1)
