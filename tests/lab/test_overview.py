"""The list of all routers: what it says is what the classes do, at any width."""

import pytest

import sinkroute
from sinkroute.adapters._fit import FRAMEWORKS, fit_router, frameworks
from sinkroute.lab.overview import overview, remembers, serves_as
from sinkroute.routing.registry import ROUTERS


def rows(width=80):
    """Router → its line of columns, cut at two spaces or more."""
    lines = [line for line in overview(width).split("\n\n")[0].splitlines() if not line.startswith(" ")]
    return {line.split()[0]: [cell for cell in line.split("  ") if cell.strip()] for line in lines[1:]}


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_cut(width):
    shown = overview(width)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.split() == overview(10_000).split()


@pytest.mark.parametrize(("width", "out"), [(50, 2), (60, 2), (72, 1)])
def test_a_narrow_terminal_goes_without_columns_and_names_them(width, out):
    shown = overview(width)
    assert max(map(len, shown.splitlines())) <= width
    assert f"{out} column{'s' * (out > 1)} left out for the width: " in " ".join(shown.split())
    assert list(rows(width))[: len(ROUTERS)] == sinkroute.list_routers()


def test_every_router_has_a_line():
    assert list(rows()) == sinkroute.list_routers()


def test_the_papers_are_called_so():
    shown = " ".join(overview(80).split())
    assert "The paper's SSR-L:" in shown and "The paper's SSR-S:" in shown


def test_what_serves_and_what_is_remembered_is_read_off_the_classes():
    found = {name: [cell.strip() for cell in cells[3:5]] for name, cells in rows().items()}
    assert found["ssr-l"] == ["plain", "-"]
    assert found["smebu"] == ["with a bias", "2E"]
    assert found["ssr-bias"] == ["either", "E + 1"]
    for name, kind in ROUTERS.items():
        serving = kind(4, 2).serving()
        assert (serves_as(name) == "plain") == (serving is not None and serving.plain), name
        assert (remembers(kind) == "-") == (kind(4, 2).state is None), name


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_a_framework_is_named_where_its_adapter_takes_the_router(name, framework):
    takes = FRAMEWORKS[framework]
    try:
        router = fit_router(name, 4, 2, {}, "theirs", any_width=takes.any_width)
        fits = takes.loss or not router.losses
    except ValueError:
        fits = False
    assert (framework in frameworks(sinkroute.create_router(name, num_experts=4, top_k=2))) == fits
