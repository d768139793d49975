"""The token viewer without a browser: what is kept, how it is packed, and that its numbers are the audit's."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkroute.lab.inspect import Audit, Choices, Layer, inspect_checkpoint, write_viewer
from sinkroute.lab.inspect.choices import Keeper
from sinkroute.lab.inspect.result import Alternative, Setting
from sinkroute.lab.inspect.viewer_colours import INK, colours
from sinkroute.lab.inspect.viewer_pack import pack, spell
from sinkroute.lab.page.palette import contrast
from sinkroute.transport import balanced_topk

from .conftest import build, ids_of
from .oracle import best, logits_of, softmax

Save = Callable[..., Path]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--",
    "<script>",
    "&amp;",
    "&lt;",
    "]]>",
    "\u2028",
    "\n",
    '"',
    "\\u003c",
)


# -- a decoder that shares no code with the package ------------------------------------------------------------------


class Decoded:
    """Lists by token: `experts`, `scores` (None without), `weights`, and by token a dict of `balanced` experts."""

    def __init__(self, letters: str, how: dict[str, Any]) -> None:
        self.data = zlib.decompress(base64.b85decode(letters.replace(",", "<")))
        self.at = 0
        tokens, top_k, peak = how["tokens"], how["top_k"], how["peak"]
        columns = self.numbers(tokens * top_k, how["wide"])
        self.experts = [columns[t::tokens] for t in range(tokens)]
        levels = [[*self.take(tokens)]]
        for _ in range(top_k - 1):
            levels.append([(above - below) % 256 for above, below in zip(levels[-1], self.take(tokens), strict=True)])
        values = [[value(levels[k][t], peak) for k in range(top_k)] for t in range(tokens)]
        self.scores: list[list[float]] | None = None
        self.weights = values
        self.balanced: list[dict[int, float]] = []
        if how["factor"] is not None:
            factors = [
                value(level, how["factor_peak"])
                for level in self.take(tokens * (top_k if how["factor"] == "choice" else 1))
            ]
            each = [
                [factors[t + tokens * k] if how["factor"] == "choice" else factors[t] for k in range(top_k)]
                for t in range(tokens)
            ]
            self.scores = values
            self.weights = [[a * b for a, b in zip(*both, strict=True)] for both in zip(values, each, strict=True)]
            masks = self.take(tokens * -(-top_k // 8))
            dropped = [[masks[k // 8 * tokens + t] >> k % 8 & 1 for k in range(top_k)] for t in range(tokens)]
            count = sum(map(sum, dropped))
            new = list(zip(self.numbers(count, how["wide"]), self.take(count), strict=True))
            for experts, scores, gone in zip(self.experts, values, dropped, strict=True):
                row = {e: s for e, s, out in zip(experts, scores, gone, strict=True) if not out}
                level = None
                for expert, below in (new.pop(0) for _ in range(sum(gone))):
                    level = below if level is None else (level - below) % 256
                    row[expert] = value(level, peak)
                self.balanced.append(row)
        assert self.at == len(self.data)

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, count: int, wide: bool) -> list[int]:
        lower, upper = self.take(count), self.take(count) if wide else bytes(count)
        return [low + 256 * up for low, up in zip(lower, upper, strict=True)]


def value(level: int, peak: float) -> float:
    return peak * 2 ** ((level - 255) / 16) if level else 0.0


class Page(HTMLParser):
    """The script elements by id, all tags, and what is fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: dict[str | None, str] = {}
        self.tags: list[str] = []
        self.fetched: list[str | None] = []
        self._inside: str | None = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.told = json.loads(self.scripts["told"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = dict(attrs).get("id") if tag == "script" else ""
        self.fetched += [v for key, v in attrs if key in ("src", "href", "srcset") and not (v or "").startswith("#")]

    def handle_data(self, data: str) -> None:
        if self._inside != "":
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def layer(self, checkpoint: int, layer: int) -> Decoded:
        how = self.told["checkpoints"][checkpoint]["layers"][layer]
        return Decoded(self.scripts[how["blob"]], how)


# -- results made by hand --------------------------------------------------------------------------------------------


def chosen(logits_TE: Tensor, top_k: int, *, renormalise: bool = True) -> Choices:
    scores_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = scores_TE.topk(top_k)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    keeper = Keeper(len(logits_TE))
    keeper.add(experts_TK, weights_TK, scores_TE, balanced_topk(scores_TE, top_k, tol=0).experts)
    found = keeper.choices()
    assert found is not None
    return found


def made(layers: list[Choices], experts: int, words: tuple[str, ...], name: str = "made") -> Audit:
    def layer(number: int, choices: Choices) -> Layer:
        assert choices.balanced_TK is not None
        own, other = (
            torch.bincount(one.long().flatten(), minlength=experts) for one in (choices.experts_TK, choices.balanced_TK)
        )
        return Layer(
            f"model.layers.{number}.mlp.gate",
            "Gate",
            "softmax",
            None,
            tokens=len(words),
            top_k=choices.experts_TK.shape[-1],
            load=own,
            gate_entropy=0.5,
            max_vio_batch=0.0,
            alternatives={"balanced": Alternative(0.0, 0.0, 0.0, other, 0.0)},
            choices=choices,
        )

    setting = Setting(name, "Model", "float32", "cpu", f"{name}.txt", len(words), 1, len(words), 1, False, False, 0.0)
    return Audit(setting, [layer(*one) for one in enumerate(layers)], 1.0, 1.0, None, words)


def logits(tokens: int, experts: int, *, skew: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + skew * torch.randn(experts, generator=generator)


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 8), (128, 8), (256, 3), (300, 11)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_what_is_packed_comes_out_again(experts: int, top_k: int, renormalise: bool) -> None:
    choices = chosen(logits(57, experts), top_k, renormalise=renormalise)
    packed, how = pack(choices, experts)
    found = Decoded(spell(packed), json.loads(json.dumps(how)))
    assert how["factor"] == "token"
    assert found.experts == choices.experts_TK.tolist()
    assert choices.scores_TK is not None and choices.balanced_TK is not None
    assert found.scores is not None
    torch.testing.assert_close(torch.tensor(found.scores), choices.scores_TK, rtol=0.022, atol=2e-5)
    torch.testing.assert_close(torch.tensor(found.weights), choices.weights_TK, rtol=0.044, atol=2e-5)
    assert [set(row) for row in found.balanced] == [set(row) for row in choices.balanced_TK.tolist()]
    assert choices.balanced_scores_TK is not None
    for row, numbers, scores in zip(
        found.balanced, choices.balanced_TK.tolist(), choices.balanced_scores_TK.tolist(), strict=True
    ):
        assert [row[expert] for expert in numbers] == pytest.approx(scores, rel=0.022, abs=2e-5)


def test_weights_that_are_no_multiple_of_the_scores_are_kept_one_by_one() -> None:
    plain = chosen(logits(20, 6), 2)
    scaled = plain.weights_TK * (1 + plain.experts_TK)  # a factor per expert
    packed, how = pack(Choices(plain.experts_TK, scaled, *list(vars(plain).values())[2:]), 6)
    assert how["factor"] == "choice"
    torch.testing.assert_close(torch.tensor(Decoded(spell(packed), how).weights), scaled, rtol=0.044, atol=1e-4)


def test_a_rule_that_is_not_understood_may_give_any_weights() -> None:
    weights = torch.tensor([[3.0, -1.0], [math.nan, 0.0], [math.inf, 0.75]])
    packed, how = pack(Choices(torch.tensor([[1, 0], [2, 1], [0, 2]], dtype=torch.int16), weights), 3)
    found = Decoded(spell(packed), how)
    assert found.experts == [[1, 0], [2, 1], [0, 2]]
    assert (found.scores, found.balanced) == (None, [])
    assert [*chain(*found.weights)] == pytest.approx([3, 0, 0, 0, 0, 0.75], rel=0.022)


def test_a_keeper_takes_the_first_tokens_and_puts_the_heaviest_first() -> None:
    keeper = Keeper(3)
    keeper.add(torch.tensor([[0, 1], [3, 2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    keeper.add(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    found = keeper.choices()
    assert found is not None
    assert found.experts_TK.tolist() == [[1, 0], [2, 3], [2, 0]]
    assert found.weights_TK.tolist() == [[0.75, 0.25], [0.5, 0.5], [0.75, 0.25]]
    assert found.scores_TK is None
    assert Keeper(0).choices() is None


# -- colours ---------------------------------------------------------------------------------------------------------


def test_text_on_every_colour_has_the_contrast_of_wcag_aa() -> None:
    assert min(contrast(one.light, INK[0]) for one in colours(256)) >= 4.5
    assert min(contrast(one.dark, INK[1]) for one in colours(256)) >= 4.5


@pytest.mark.parametrize(("experts", "apart"), [(8, 0.1), (64, 0.045), (128, 0.035)])
def test_colours_are_apart(experts: int, apart: float) -> None:
    """In OKLab, where 0.02 is a difference that one just sees."""

    def lab(colour: str) -> tuple[float, ...]:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        cones = (
            0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
            0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
            0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
        )
        long, middle, short = (cone ** (1 / 3) for cone in cones)
        return (
            0.2104542553 * long + 0.793617785 * middle - 0.0040720468 * short,
            1.9779984951 * long - 2.428592205 * middle + 0.4505937099 * short,
            0.0259040371 * long + 0.7827717662 * middle - 0.808675766 * short,
        )

    for theme in ("light", "dark"):
        labs = [lab(getattr(colour, theme)) for colour in colours(experts)]
        assert min(math.dist(*pair) for pair in combinations(labs, 2)) > apart


def test_more_experts_than_colours_share_them() -> None:
    assert colours(300)[256:] == colours(44)


# -- the page --------------------------------------------------------------------------------------------------------


def test_a_document_cannot_leave_its_place_in_the_page(tmp_path: Path) -> None:
    audit = made([chosen(logits(len(HOSTILE), 4), 2)], 4, HOSTILE, name="<script>x</script>&amp;\"'")
    write_viewer([audit], tmp_path / "tokens.html")
    page = Page(tmp_path / "tokens.html")
    assert page.told["checkpoints"][0]["words"] == list(HOSTILE)
    assert page.told["checkpoints"][0]["name"] == audit.setting.model
    assert page.tags.count("script") == 3  # a layer, what is told, the program
    assert page.tags.count("img") == 0
    source = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in source
    assert "<!--" not in source


def test_the_page_fetches_nothing_and_forbids_it(tmp_path: Path) -> None:
    write_viewer([made([chosen(logits(3, 4), 2)], 4, ("a", "b", "c"))], tmp_path / "tokens.html")
    page = Page(tmp_path / "tokens.html")
    assert page.fetched == []
    source = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    source = source.replace('url("${checkpoint.pictures[number]}")', "")  # those are data URLs
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML", source)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_4096_tokens_of_48_layers_of_128_experts_take_less_than_5_mb(skew: float, tmp_path: Path) -> None:
    words = tuple(f" word{place % 997}" for place in range(4096))
    layers = [chosen(logits(4096, 128, skew=skew, seed=seed), 8) for seed in range(2)]
    write_viewer([made(layers, 128, words)], tmp_path / "tokens.html")
    size = (tmp_path / "tokens.html").stat().st_size
    page = Page(tmp_path / "tokens.html")
    one = len(json.dumps(page.told["checkpoints"][0]["layers"][0])) + len(page.scripts["c0l0"])
    assert size + 46 * one < 5e6


def test_an_audit_that_kept_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'made' kept no tokens to show; give inspect_checkpoint viewer_tokens=4096"):
        write_viewer([made([], 4, ())], tmp_path / "tokens.html")


def test_a_layer_that_does_not_see_every_token_once_is_not_shown(tmp_path: Path) -> None:
    audit = made([chosen(logits(3, 4), 2)], 4, ("a", "b", "c"))
    audit.layers[0] = replace(audit.layers[0], tokens=6)
    write_viewer([audit], tmp_path / "tokens.html")
    told = Page(tmp_path / "tokens.html").told["checkpoints"][0]["layers"][0]
    assert "blob" not in told
    assert "not called once for every token" in told["reason"]


# -- from checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_numbers_of_the_viewer_are_those_of_the_table(
    family: str, bos: bool, save: Save, text: Path, characters: str, tmp_path: Path
) -> None:
    audit = inspect_checkpoint(
        str(save(family, bos=bos)), text, tokens=100, length=10 + bos, batch=4, viewer_tokens=1000
    )
    assert "".join(audit.words) == characters[:100]
    write_viewer([audit], tmp_path / "tokens.html")
    page = Page(tmp_path / "tokens.html")
    for number, layer in enumerate(audit.layers):
        assert layer.load is not None
        found, told = page.layer(0, number), page.told["checkpoints"][0]["layers"][number]
        other = layer.alternatives["balanced"]
        experts = range(len(layer.load))
        assert [sum(row.count(expert) for row in found.experts) for expert in experts] == layer.load.tolist()
        assert [sum(expert in row for row in found.balanced) for expert in experts] == other.load.tolist()
        assert (told["load"], told["balanced_load"]) == (layer.load.tolist(), other.load.tolist())
        moved = sum(set(own) != set(row) for own, row in zip(found.experts, found.balanced, strict=True))
        assert moved / 100 == pytest.approx(other.tokens_moved)
        assert found.scores is not None
        lost = 1 - sum(map(sum, (row.values() for row in found.balanced))) / sum(map(sum, found.scores))
        assert lost == pytest.approx(other.score_lost, abs=0.02)
        assert all(row == sorted(row, reverse=True) for row in found.weights)


def test_choices_scores_and_weights_are_those_of_a_slow_loop(save: Save, text: Path, characters: str) -> None:
    audit = inspect_checkpoint(str(save("mixtral")), text, tokens=40, length=10, batch=3, viewer_tokens=25)
    ids = ids_of(characters)
    recorded = logits_of(build("mixtral"), [ids[place : place + 10] for place in range(0, 40, 10)])
    assert "".join(audit.words) == characters[:25]
    for layer, by_token in zip(audit.layers, recorded, strict=True):
        choices = layer.choices
        assert choices is not None and choices.scores_TK is not None
        assert len(choices.experts_TK) == 25
        for token, experts, scores, weights in zip(
            by_token[:25],
            choices.experts_TK.tolist(),
            choices.scores_TK.tolist(),
            choices.weights_TK.tolist(),
            strict=True,
        ):
            shares = softmax(token)
            assert set(experts) == best(token, 2)
            assert scores == pytest.approx([shares[expert] for expert in experts], rel=1e-4)
            assert weights == pytest.approx([score / sum(scores) for score in scores], rel=1e-4)


def test_by_layer_keeps_the_same_choices(save: Save, text: Path) -> None:
    folder = str(save("olmoe", bos=True))
    whole, layered = (
        inspect_checkpoint(folder, text, tokens=60, length=10, batch=2, by_layer=by, viewer_tokens=50)
        for by in (False, True)
    )
    assert whole.words == layered.words
    for one, other in zip(whole.layers, layered.layers, strict=True):
        for name, tensor in vars(one.choices).items():
            assert torch.equal(tensor, getattr(other.choices, name)), name


def test_nothing_is_kept_without_a_viewer(save: Save, text: Path) -> None:
    audit = inspect_checkpoint(str(save("mixtral")), text, tokens=40, length=10)
    assert audit.words == ()
    assert [layer.choices for layer in audit.layers] == [None, None]


def test_two_checkpoints_stand_side_by_side_and_their_layers_need_not_be_as_many(
    save: Save, text: Path, tmp_path: Path
) -> None:
    audits = [
        inspect_checkpoint(str(save(family)), text, tokens=40, length=10, viewer_tokens=40)
        for family in ("mixtral", "olmoe")
    ]
    unread = Layer("model.layers.2.mlp.gate", "Odd", None, "it returns a list")
    audits[1].layers.append(unread)
    write_viewer(audits, tmp_path / "tokens.html")
    page = Page(tmp_path / "tokens.html")
    for place, audit in enumerate(audits):
        for number, layer in enumerate(audit.layers[:2]):
            assert layer.choices is not None
            assert page.layer(place, number).experts == layer.choices.experts_TK.tolist()
    assert page.told["checkpoints"][1]["layers"][2] == {
        "label": "2",
        "path": unread.path,
        "rule": None,
        "reason": unread.reason,
    }
