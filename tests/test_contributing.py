"""What CONTRIBUTING shows runs, and what it counts is so."""

import re
from pathlib import Path

import pytest

import sinkroute

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
READING = re.findall(r"^\| ([\w ]+) \| (`.*`) \| (\d+) \|$", TEXT, flags=re.MULTILINE)


def test_a_new_router_trains_serves_and_is_patched_in_as_the_page_shows(newcomer):
    assert newcomer in sinkroute.list_routers()
    pytest.importorskip("transformers")
    names = {}
    for block in BLOCKS[1:]:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    assert len(BLOCKS) == 3


def test_the_options_of_a_new_router_are_known_and_checked(newcomer):
    router = sinkroute.create_router(newcomer, num_experts=4, top_k=1, rate=0.25)
    assert router.rate == 0.25 and "rate: float = 0.01" in type(router).__doc__
    with pytest.raises(ValueError, match=r"rate must be .*0 or more, got -1"):
        sinkroute.create_router(newcomer, num_experts=4, top_k=1, rate=-1)


def test_an_evenings_reading_is_as_long_as_it_says():
    assert len(READING) == 5
    whole = 0
    for step, files, stated in READING:
        paths = [ROOT / "src" / "sinkroute" / name for name in re.findall(r"`([^`]+)`", files)]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        assert abs(lines - int(stated)) <= 25, f"{step}: {lines} lines"
        whole += lines
    assert whole <= 3500
