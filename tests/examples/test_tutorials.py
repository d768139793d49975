"""The tutorials run; what their texts say of a run holds; what is stored in them is small and whole."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("transformers", "gensim", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "examples" / "tutorials").glob("*.ipynb"))
RUNNER = Path(__file__).with_name("notebook.py")
each_tutorial = pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)


def run(folder, program, *arguments):
    """What it says, in a folder that is thrown away; one thread, as in the other tests."""
    found = subprocess.run(
        [sys.executable, program, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


# -- they run ----------------------------------------------------------------------------------------------------------


@each_tutorial
def test_each_cell_runs(tutorial, tmp_path):
    run(tmp_path, RUNNER, str(tutorial), "--quick")


@pytest.mark.slow
def test_what_the_tutorials_claim_holds(tmp_path):
    for tutorial in TUTORIALS:  # the second finds the first one's checkpoint
        run(tmp_path, RUNNER, str(tutorial))


def test_lora_with_trl_runs_and_its_adapter_serves_as_trained(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    told = run(tmp_path, ROOT / "examples" / "lora_trl.py", "--out", str(tmp_path))
    vio = [float(line.split("│")[2]) for line in told.splitlines() if re.match(r"│ (before|after) ", line)]
    assert len(vio) == 2 and vio[1] < vio[0] / 2


# -- the runner --------------------------------------------------------------------------------------------------------


@pytest.fixture
def false_claim(tmp_path):
    """A notebook whose second cell claims what is not so."""
    sources = ["STEPS = 40\n", "assert STEPS == 41\n", "print(STEPS)\nSTEPS + 1\n"]
    book = {"cells": [{"cell_type": "code", "source": [source], "outputs": []} for source in sources]}
    (tmp_path / "small_mixture.py").write_text("STEPS = 60\n")
    path = tmp_path / "claim.ipynb"
    path.write_text(json.dumps(book))
    return path


def test_a_claim_that_does_not_hold_fails_and_is_named(false_claim, tmp_path):
    with pytest.raises(AssertionError, match=r'"claim\.ipynb\[2\]", line 1'):
        run(tmp_path, RUNNER, str(false_claim))


def test_a_quick_run_trains_two_steps_and_claims_nothing(false_claim, tmp_path):
    assert run(tmp_path, RUNNER, str(false_claim), "--quick").split() == ["2", "3"]
    assert [cell["outputs"] for cell in cells(false_claim)] == [[], [], []]


def test_write_stores_what_is_printed_and_the_last_value(false_claim, tmp_path):
    run(tmp_path, RUNNER, str(false_claim), "--quick", "--write")
    printed, value = cells(false_claim)[2]["outputs"]
    assert printed == {"name": "stdout", "output_type": "stream", "text": ["2\n"]}
    assert (value["output_type"], value["data"], value["execution_count"]) == (
        "execute_result",
        {"text/plain": ["3"]},
        3,
    )


# -- what is stored ----------------------------------------------------------------------------------------------------


@each_tutorial
def test_outputs_are_stored_of_all_cells_in_order_and_are_small(tutorial):
    code = [cell for cell in cells(tutorial) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        if re.search(r"^print\(|^console\.print", "".join(cell["source"]), flags=re.MULTILINE):
            assert cell["outputs"]
        pictures = [output["data"].get("image/png", "") for output in cell["outputs"] if "data" in output]
        assert all(len(base64.b64decode(picture)) < 30_000 for picture in pictures)
    assert tutorial.stat().st_size < 100_000


@each_tutorial
def test_no_line_of_a_tutorial_is_longer_than_120_characters_and_no_output_names_a_folder_of_a_machine(tutorial):
    for cell in cells(tutorial):
        assert all(len(line.rstrip("\n")) <= 120 for line in cell["source"])
        assert not re.search(r"/(home|root|tmp|Users|work)/", json.dumps(cell.get("outputs", [])))


@each_tutorial
def test_links_of_a_tutorial_lead_somewhere(tutorial):
    text = "".join("".join(cell["source"]) for cell in cells(tutorial) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert links and [link for link in links if not (tutorial.parent / link).exists()] == []


def test_the_page_of_tutorials_lists_each():
    page = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    assert [path.name for path in TUTORIALS if f"(../examples/tutorials/{path.name})" not in page] == []
