"""torchtitan's Trainer on four processes, with our routers: `make test-ranks`, in torchtitan's environment."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("torchtitan_matrix.py")
LAYOUTS = ("dp4", "dp2·ep2", "dp2·tp2", "dp2·tp2·ep2", "pp2·dp2")

needs_torchtitan = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="torchtitan is in the environment of `make test-ranks`"
)


def found(tmp_path, *arguments):
    out = tmp_path / "found.json"
    command = [sys.executable, str(PROGRAM), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.exists(), done.stderr.decode()
    return {tuple(row["cell"]): row for row in json.loads(out.read_text(encoding="utf-8"))}


@needs_torchtitan
@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_routes_as_one_process_counts_each_token_once_and_is_gone_on_with_on_fewer_ranks(layout, tmp_path):
    rows = found(tmp_path, "--layout", layout)
    assert len(rows) == 3
    assert [row for row in rows.values() if row["found"] != "right"] == []


@needs_torchtitan
def test_a_sample_of_the_matrix_is_right(tmp_path):
    (row,) = found(tmp_path, "--layout", "dp2·tp2", "--method", "ssr-l").values()
    assert row["found"] == "right", row["said"]


def test_the_page_shows_what_the_last_runs_found():
    spec = importlib.util.spec_from_file_location("torchtitan_matrix", PROGRAM)
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    rows = json.loads(matrix.FOUND.read_text(encoding="utf-8"))
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert page.partition(matrix.BEGIN)[2].partition(matrix.END)[0] == matrix.render(rows)
    assert not [row["cell"] for row in rows if row["found"] in ("wrong", "failed")]
