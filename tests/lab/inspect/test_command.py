from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkroute.cli import main

Save = Callable[..., Path]


def test_the_command_prints_a_table_and_writes_page_and_json(
    capsys: pytest.CaptureFixture[str], save: Save, text: Path, tmp_path: Path
) -> None:
    out, alone = tmp_path / "new" / "out", tmp_path / "alone.json"
    words = ["inspect", str(save("mixtral")), "--text", str(text), "--tokens", "60", "--length", "10"]
    assert main([*words, "--output", str(out), "--json", str(alone)]) == 0
    printed = capsys.readouterr().out
    assert "MaxVio" in printed
    assert "60 tokens of" in printed
    assert "Peak memory" in printed
    assert json.loads(alone.read_text()) == json.loads((out / "inspect.json").read_text())
    assert (out / "inspect.html").read_text().startswith("<!doctype html>")


def test_an_error_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str], save: Save, tmp_path: Path) -> None:
    assert main(["inspect", str(save("mixtral")), "--text", str(tmp_path / "none.txt"), "--length", "10"]) == 1
    assert "there is no file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "place"), [("--json", "none/x.json"), ("--json", "."), ("--output", "file"), ("--output", "file/below")]
)
def test_what_cannot_be_written_is_refused_before_the_audit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, place: str
) -> None:
    monkeypatch.setattr("sinkroute.lab.inspect.inspect_checkpoint", lambda *_, **__: pytest.fail("it was begun"))
    (tmp_path / "file").touch()
    assert main(["inspect", "MODEL", "--text", "FILE", option, str(tmp_path / place)]) == 2
    assert f"{option} {tmp_path / place} cannot be" in capsys.readouterr().err


def test_another_checkpoint_that_is_not_there_is_refused_before_the_audit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinkroute.lab.inspect.inspect_checkpoint", lambda *_, **__: pytest.fail("it was begun"))
    assert main(["inspect", "MODEL", "--text", "FILE", "--against", "./nowhere"]) == 1
    assert "there is no folder './nowhere'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_by_layer_stays_far_below_the_size_of_the_checkpoint(save: Save, text: Path) -> None:
    """1.0 GiB of float32 in 16 layers, in a new process; less the 0.5 GiB that an empty one has."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_experts": 20, "num_hidden_layers": 16}
    folder = save("olmoe", shards="300MB", num_experts_per_tok=2, **sizes)
    command = [sys.executable, "-m", "sinkroute.cli", "inspect", str(folder), "--text", str(text), "--tokens", "192"]
    peaks = []
    for more in ([], ["--by-layer"]):
        done = subprocess.run(
            [*command, "--length", "32", *more],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ, COLUMNS="300"),
        )
        found = re.search(r"Peak memory ([\d,]+) MiB, for a checkpoint of ([\d,]+) MiB", done.stdout)
        assert found is not None
        peak, checkpoint = (int(number.replace(",", "")) for number in found.groups())
        peaks.append(peak)
        assert checkpoint > 950
    assert peaks[0] > 1000
    assert peaks[1] < 750


def test_the_viewer_stands_beside_the_page_and_two_checkpoints_in_one_viewer(
    capsys: pytest.CaptureFixture[str], save: Save, text: Path, tmp_path: Path
) -> None:
    first, second, out = str(save("mixtral")), str(save("olmoe")), tmp_path / "out"
    words = ["inspect", first, "--text", str(text), "--tokens", "60", "--length", "10", "--output", str(out)]
    assert main([*words, "--against", second]) == 0
    printed = capsys.readouterr().out
    assert f"Pages: {out / 'inspect.html'}, {out / 'against.html'}, {out / 'tokens.html'}" in printed
    assert printed.count("Peak memory") == 2
    told = json.loads((out / "inspect.json").read_text())
    assert (told["model"], told["against"]["model"]) == (first, second)
    for name in ("inspect.html", "against.html"):
        assert '<a href="tokens.html">' in (out / name).read_text()
    viewer = (out / "tokens.html").read_text()
    assert all(model in viewer for model in (first, second))


def test_no_viewer_is_written_where_none_is_wanted(save: Save, text: Path, tmp_path: Path) -> None:
    words = ["inspect", str(save("mixtral")), "--text", str(text), "--tokens", "60", "--length", "10"]
    assert main([*words, "--output", str(tmp_path), "--viewer-tokens", "0"]) == 0
    assert "tokens.html" not in (tmp_path / "inspect.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inspect.html", "inspect.json"]
