"""What the README shows can be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sinkroute

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_shows_code() -> None:
    assert len(BLOCKS) >= 1


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_readme_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_first_lines_of_the_readme_balance_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for router in ("model", 'model, "softmax"'):
        assert "sinkroute.patch(model)" in BLOCKS[0]
        exec(compile(BLOCKS[0].replace("patch(model)", f"patch({router})"), "README.md", "exec"), {})
        last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
        found[router] = float(last.split()[-3])  # MaxVio now; behind it are dead experts, then and now
    assert found["model"] < 0.3
    assert found['model, "softmax"'] > 0.8


def test_texts_name_as_many_routers_as_there_are() -> None:
    count = str(len(sinkroute.list_routers()))
    for page in (README, README.parent / "docs" / "which-router.md"):
        assert set(re.findall(r"(\d+)\s+routers", page.read_text(encoding="utf-8"))) == {count}, page.name


def test_the_table_of_which_router_names_routers_that_there_are() -> None:
    text = (README.parent / "docs" / "which-router.md").read_text(encoding="utf-8")
    taken = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]+ \|$", text, flags=re.MULTILINE)[1:]
    named = {name for cell in taken for name in re.findall(r"`([\w-]+)`", cell)}
    assert len(taken) >= 10
    assert named <= set(sinkroute.list_routers())


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    assert [line.split("  ")[0] for line in lines[:12] if line.startswith("make ")] == ["make demo", "make test"]
