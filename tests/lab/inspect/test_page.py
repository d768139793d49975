"""The page and the terminal's table, from results made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sinkroute.lab.inspect import Alternative, Audit, Layer, audit_table, facts, summary, write_page
from sinkroute.lab.inspect.advice import advice, recipe
from sinkroute.lab.inspect.result import Setting

from ..test_screen import left_out, printed

HOSTILE = "<script>alert(1)</script>[red]&\"'"
MOVE = Alternative(0.5, 0.25, 0.125, torch.tensor([10, 10, 10, 10]), 0.0)


def layer(path: str, load: list[int], **more: object) -> Layer:
    told = {"router": "Gate", "rule": "softmax, top 2 of 4", "reason": None, "tokens": 20, "top_k": 2} | more
    return Layer(path, load=torch.tensor(load), max_vio_batch=1.5, gate_entropy=0.5, **told)  # type: ignore[arg-type]


def audit(*layers: Layer, name: str = "tiny") -> Audit:
    setting = Setting(name, "MixtralForCausalLM", "bfloat16", "cpu", f"{name}.txt", 20, 5, 4, 2, False, True, 0.5)
    return Audit(setting, list(layers), 2.0, 100.0, 900.0)


SKEWED = layer("model.layers.0.mlp.gate", [30, 9, 1, 0], alternatives={"balanced": MOVE})
EVEN = layer("model.layers.1.mlp.gate", [10, 10, 10, 10], alternatives={"balanced": MOVE})
UNREAD = Layer("model.layers.2.mlp.gate", "Odd", None, "it returns a list")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(found: Audit, folder: Path) -> str:
    write_page(found, folder / "inspect.html")
    return (folder / "inspect.html").read_text(encoding="utf-8")


def test_dead_and_near_dead_experts_are_told_apart() -> None:
    assert (SKEWED.dead, SKEWED.near_dead) == ([3], [])  # 1 of a mean of 10 is a tenth, which is enough
    assert layer("x", [31, 9, 0, 0]).dead == [2, 3]
    assert layer("x", [32, 7, 0, 1]).near_dead == []
    assert layer("x", [70, 7, 0, 1]).near_dead == [3]  # 1 of a mean of 19.5
    rare = layer("x", [397, 2, 0, 1])  # of a mean of 100
    assert (rare.dead, rare.unseen, rare.near_dead) == ([2], [2], [1, 3])
    rarer = layer("x", [795, 2, 0, 3])
    assert (rarer.dead, rarer.unseen, rarer.near_dead) == ([2], [2], [1, 3])
    assert layer("x", [1197, 1, 0, 2]).dead == [1, 2, 3]


def test_the_advice_is_the_router_that_patch_takes_and_what_it_would_change() -> None:
    words = " ".join(advice(audit(*ROWS, UNREAD)))
    assert "Train on with ssr-dual, the router that sinkroute.patch(model) takes unless told." in words
    assert "MaxVio 0.10 in place of 1.50: the busiest expert would have 1.1 times its share, and not 2.5" in words
    assert "moves 40.0% of the tokens" in words and "loses 6.2% of the gate's scores" in words
    assert "Of 11 experts that are dead on this text 11 would get tokens again" in words
    assert "(weight)" in words
    assert "1 of 12 layers has no rule that is understood, and would stay as it is." in words
    assert "sinkroute.patch(model)" in recipe(audit(*ROWS))


def test_a_run_on_images_is_told_of_images_and_how_to_train_it() -> None:
    found = audit(*ROWS)
    found = replace(found, setting=replace(found.setting, text="mnist-5k, the validation images"))
    words = " ".join([*advice(found), *summary(found), *facts(found)])
    assert "On these images it would serve" in words and "dead on these images" in words
    assert "windows" not in words and "this text" not in words
    assert recipe(found) == "sinkroute train CONFIG --router.name ssr-dual"


def test_nothing_is_advised_where_nothing_is_to_be_gained() -> None:
    even = Alternative(0.1, 0.1, 0.01, torch.tensor([10, 10, 10, 10]), 1.45)
    found = audit(layer("gate", [10, 10, 10, 10], alternatives={"ssr-dual": even}))
    (words,) = advice(found)
    assert words.startswith(
        "Leave the routing as it is: its batches have MaxVio 1.50, and with ssr-dual they would have"
    )
    assert recipe(found) == ""


def test_a_model_without_a_place_for_potentials_is_told_so() -> None:
    (words,) = advice(audit(SKEWED))
    assert "1 of 1 layers has no correction bias and no linear gate" in words
    (words,) = advice(audit(UNREAD))
    assert words == "No layer has a rule that is understood, so that sinkroute.patch would refuse this model."
    assert SKEWED.max_vio == 2.0


def test_the_page_is_well_formed_and_fetches_nothing(tmp_path: Path) -> None:
    reader = _Reader()
    reader.feed(page(audit(SKEWED, EVEN, UNREAD), tmp_path))
    assert reader.open == []
    assert reader.fetched == []


def test_hostile_names_are_text(tmp_path: Path) -> None:
    found = audit(
        layer(f"model.{HOSTILE}.gate", [30, 9, 1, 0], router=HOSTILE, rule=HOSTILE),
        Layer(f"model.{HOSTILE}2.gate", HOSTILE, None, HOSTILE),
        name=HOSTILE,
    )
    text = page(found, tmp_path)
    reader = _Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.open == []
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(audit_table(found))
    assert f"Expert load of {HOSTILE}" in console.export_text()


def test_a_cell_of_the_heat_map_is_a_load_over_a_fair_share(tmp_path: Path) -> None:
    text = page(audit(SKEWED, EVEN, UNREAD), tmp_path)
    cells = re.findall(
        r'<g class="cell( dead)?"><title>([^<]*)</title><rect [^>]*fill="([^"]*)" fill-opacity="([^"]*)"/>', text
    )
    assert [title for _, title, _, _ in cells[:4]] == [
        "layer 0, expert 0: 3.00 of a fair share",
        "layer 0, expert 1: 0.90 of a fair share",
        "layer 0, expert 2: 0.10 of a fair share",
        "layer 0, expert 3: 0.00 of a fair share, dead",
    ]
    assert [(colour, opacity) for _, _, colour, opacity in cells[:4]] == [
        ("#d9580a", "1.00"),
        ("#2f80c8", "0.10"),
        ("#2f80c8", "0.90"),
        ("#2f80c8", "1.00"),
    ]
    assert [bool(dead) for dead, *_ in cells] == [False, False, False, True, *[False] * 4]
    assert {opacity for *_, opacity in cells[4:]} == {"0.00"}
    assert len(cells) == 8  # the layer that was not read is not drawn


ALL = {"ssr-dual": Alternative(0.4, 0.2, 0.0625, torch.tensor([11, 10, 10, 9]), 0.1)}
ALL |= {"ssr-l": MOVE, "ssr-s": MOVE, "balanced": MOVE}
ROWS = [layer(f"model.layers.{i}.mlp.gate", [30, 9, 1, 0], alternatives=ALL, kept_in="weight") for i in range(11)]


@pytest.mark.parametrize(("width", "shown"), [(60, 0), (80, 1), (120, 2), (200, 4)])
def test_the_table_cuts_no_number_and_names_what_is_left_out(width: int, shown: int) -> None:
    lines = printed(audit_table(audit(*ROWS, UNREAD)), width)
    assert max(map(len, lines)) <= width
    (row,) = [line.split() for line in lines if line.startswith("10 ")]
    assert row[:4] == ["10", "2/4", "2.00", "1"]
    moved = [["40.0%", "6.2%", "0.10"], *[["50.0%", "12.5%", "0.00"]] * 3]
    numbers = [cell for three in moved for cell in three]
    tail = row[row.index("█▄▁×") + 1 :]
    rest = iter(numbers)
    assert all(cell in rest for cell in tail) and len(tail) >= 3 * shown  # in this order
    assert (left_out(lines) == "") == (width == 200)
    assert len(tail) + left_out(lines).count("ssr-") + left_out(lines).count("balanced") == 12
    assert any(re.match("2 +unread", line) for line in lines)


def test_the_summary_says_the_worst_the_dead_and_why_a_layer_is_not_understood() -> None:
    words = " ".join(summary(audit(SKEWED, EVEN, UNREAD)))
    assert "MaxVio is 1.00 on average over 2 layers and 2.00 at most (model.layers.0.mlp.gate)" in words
    assert "Dead experts (less than 1% of a fair share): 1 of 8, of which 1 were chosen by no token" in words
    assert "balanced top-k would move 50.0% of the tokens and cost 12.5% of the score (MaxVio 0.00)" in words
    assert "model.layers.2.mlp.gate (Odd): not understood, it returns a list." in words


def test_the_means_of_the_json_are_over_layers_that_have_the_alternative() -> None:
    other = Alternative(1.0, 1.0, 0.375, torch.tensor([20, 20, 0, 0]), 1.0)
    summed = audit(SKEWED, layer("x", [1, 1, 1, 1], alternatives={"balanced": other}), UNREAD).json()["summary"]
    assert (summed["layers"], summed["read"], summed["understood"], summed["experts"]) == (3, 2, 2, 8)
    assert summed["alternatives"]["balanced"]["score_lost"] == 0.25
    assert summed["alternatives"]["balanced"]["max_vio"] == pytest.approx(0.5)
