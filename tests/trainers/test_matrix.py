"""The matrix of trainers, in the environment of `make test-trainers`; elsewhere what it needs is not installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("matrix.py")
NEEDED = ("accelerate", "datasets", "deepspeed", "trl")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(missing), reason=f"{missing} are in the environment of `make test-trainers`")
@pytest.mark.parametrize("wrapper", ["single", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_a_patched_model_is_trained_as_by_one_plain_loop_or_refused_by_name(wrapper, tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, str(PROGRAM), "--wrapper", wrapper, "--out", str(out), "--write"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert len(rows) == 5 * 3 * 5
    bad = {" | ".join(row["cell"]): row for row in rows if row["found"] in ("wrong", "failed")}
    assert not bad, json.dumps(bad, indent=1)


def test_the_page_shows_what_the_last_runs_found():
    spec = importlib.util.spec_from_file_location("matrix", PROGRAM)
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    rows = json.loads(matrix.FOUND.read_text(encoding="utf-8"))
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert page.partition(matrix.BEGIN)[2].partition(matrix.END)[0] == matrix.render(rows)
    assert not [row["cell"] for row in rows if row["found"] in ("wrong", "failed")]
