"""How the pages of `inspect` look in a browser: nothing is cut, pale, or too small, on a telephone and on a desk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sinkroute.lab.inspect import Layer, write_page, write_viewer

from ..browser import Browser
from .test_page import ALL, UNREAD, audit, layer
from .test_viewer import chosen, logits, made


def test_the_page_of_an_audit(chromium: Browser, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    loads = [(torch.rand(64, generator=random) ** 6 * 1000).long().tolist() for _ in range(12)]
    others = {name: replace(other, load=torch.full((64,), 10)) for name, other in ALL.items()}
    layers = [
        layer(f"model.layers.{place}.mlp.gate", load, alternatives=others, kept_in="weight")
        for place, load in enumerate(loads)
    ]
    name = "some-owner/A-Mixture-Of-Experts-With-A-Long-Name-1B-7B-Instruct"
    write_page(audit(*layers, UNREAD, name=name), tmp_path / "inspect.html", viewer="tokens.html")
    assert chromium.look(tmp_path / "inspect.html") == ""


def test_the_token_viewer(chromium: Browser, tmp_path: Path) -> None:
    words = [f" word{place}" for place in range(60)]
    layers = [chosen(logits(len(words), 12, seed=seed), 3) for seed in range(3)]
    first, second = made(layers, 12, words, name="a" * 90), made(layers[:1], 12, words, name="another/model")
    second.layers.append(Layer("model.layers.1.mlp.gate", "Odd", None, "it returns a list"))
    write_viewer([first, second], tmp_path / "tokens.html")
    assert chromium.look(tmp_path / "tokens.html") == ""
