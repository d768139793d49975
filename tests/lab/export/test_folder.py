"""An export appears whole, replaces nothing but an earlier export, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sinkroute.lab.export import ExportError, export_run, folder


def names(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}


def test_an_earlier_export_is_replaced_and_nothing_of_it_stays(make_run: Any, tmp_path: Path) -> None:
    export_run(make_run("loss-free", {"score": "sigmoid"}), tmp_path / "hf")
    (tmp_path / "hf" / "old.txt").write_text("of the earlier one")
    mark = tmp_path / "hf" / "sinkroute-export.json"
    written = json.loads(mark.read_text())
    assert set(written["files"]) == names(tmp_path / "hf") - {"old.txt"}
    mark.write_text(json.dumps({**written, "files": [*written["files"], "old.txt"]}))
    export_run(make_run(), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"
    assert "old.txt" not in names(tmp_path / "hf")
    assert names(tmp_path) == {"run", "hf"}


def test_an_empty_folder_is_taken(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    export_run(make_run(), tmp_path / "hf")
    assert "model.safetensors" in names(tmp_path / "hf")


def test_a_folder_with_something_else_is_refused_and_left_alone(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"mine holds something else than an earlier export \(thesis.tex\)"):
        export_run(make_run(), tmp_path / "mine")
    assert names(tmp_path / "mine") == {"thesis.tex"}


def test_files_that_were_put_into_an_export_are_named_and_left_alone(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    export_run(run, tmp_path / "hf")
    (tmp_path / "hf" / ".git").mkdir()
    (tmp_path / "hf" / "model.gguf").write_text("hours of work")
    before = names(tmp_path / "hf")
    with pytest.raises(
        ExportError, match=r"something else than an earlier export \(\.git, model\.gguf\); move it away"
    ):
        export_run(run, tmp_path / "hf")
    assert names(tmp_path / "hf") == before
    assert names(tmp_path) == {"run", "hf"}


@pytest.mark.parametrize("content", ["notes", "[]", "{}", '{"files": null}'])
def test_a_file_that_only_has_the_name_of_the_list_makes_no_export(make_run: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sinkroute-export.json").write_text(content)
    with pytest.raises(ExportError, match=r"\(sinkroute-export.json\)"):
        export_run(make_run(), tmp_path / "mine")
    assert (tmp_path / "mine" / "sinkroute-export.json").read_text() == content


def test_a_file_is_refused(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(ExportError, match="is a file; choose a folder"):
        export_run(make_run(), tmp_path / "mine")


def test_an_export_that_fails_midway_leaves_the_earlier_one_and_no_rest(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    export_run(run, tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    run.model.head.weight.data.mul_(2)

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(folder, "write_card", full)
    with pytest.raises(OSError, match="the disk is full"):
        export_run(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == {"run", "hf"}


def interrupt_rename(
    monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, *, done: bool = False, again: bool = False
) -> None:
    """The so-manieth rename of a folder raises, before or when it is done; with `again`, all that follow raise, too."""
    rename, count = Path.rename, iter(range(1, 100))

    def stubborn(path: Path, target: Path) -> Path:
        now = next(count)
        stops = now == number or (again and now > number)
        if stops and not done:
            raise error
        renamed = rename(path, target)
        if stops:
            raise error
        return renamed

    monkeypatch.setattr(Path, "rename", stubborn)


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt("no")])
@pytest.mark.parametrize(("number", "done"), [(1, False), (1, True), (2, False)])
def test_an_export_that_cannot_take_its_place_puts_the_earlier_one_back(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, number: int, done: bool
) -> None:
    run = make_run()
    export_run(run, tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    run.model.head.weight.data.mul_(2)
    interrupt_rename(monkeypatch, number, error, done=done)
    with pytest.raises(type(error), match="no"):
        export_run(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == {"run", "hf"}


def test_an_earlier_export_that_cannot_be_put_back_is_kept_beside(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    export_run(run, tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    interrupt_rename(monkeypatch, 2, KeyboardInterrupt(), again=True)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "hf")
    (kept,) = tmp_path.glob(".hf-*/old/model.safetensors")
    assert kept.read_bytes() == before


@pytest.mark.parametrize("there", [True, False])
def test_folders_of_others_beside_an_export_are_left_alone(make_run: Any, tmp_path: Path, there: bool) -> None:
    run = make_run()
    if there:
        export_run(run, tmp_path / "hf")
    for name in (".hf.old", ".hf.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    export_run(run, tmp_path / "hf")
    assert names(tmp_path) == {"run", "hf", ".hf.old", ".hf.draft"}
    assert names(tmp_path / ".hf.old") == names(tmp_path / ".hf.draft") == {"thesis.tex"}


def test_an_export_through_a_link_replaces_what_the_link_names(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "disk")
    for _ in range(2):
        export_run(make_run(), tmp_path / "hf")
    assert (tmp_path / "hf").is_symlink()
    assert "model.safetensors" in names(tmp_path / "disk")
    assert names(tmp_path) == {"run", "hf", "disk"}


def test_what_does_not_say_the_same_is_not_written(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = folder.convert

    def wrong(*arguments: Any) -> Any:
        model = convert(*arguments)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(folder, "convert", wrong)
    with pytest.raises(ExportError, match="does not compute what the model"):
        export_run(make_run(), tmp_path / "hf")
    assert names(tmp_path) == {"run"}


def test_the_card_tells_what_was_measured_and_no_path(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    result = {
        "valid": {"bits_per_byte": 2.34567, "bytes": 1234},
        "attacked": {"word-swap": {"bits_per_byte": 2.5, "bytes": 1230}},
        "serving": {"max_vio": 1.25, "dead": 3, "experts": 16},
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    export_run(run, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| validation text | 2.3457 | 1,234 |" in body
    assert "MaxVio 1.25, dead experts 3 of 16" in body
    config = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert config["router"] == {"name": "ssr-s", "options": {}}
    for file in (tmp_path / "hf").iterdir():
        assert b"somebody" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_card_of_an_unfinished_run_has_no_figures_of_an_earlier_one(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    run.config.train.steps = 100
    (run.folder / "result.json").write_text("{}")
    export_run(run, tmp_path / "hf")
    assert "was not finished" in (tmp_path / "hf" / "README.md").read_text()


def test_the_callers_generator_and_mode_are_left_as_they_were(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    run.model.train()
    state = torch.get_rng_state()
    export_run(run, tmp_path / "hf")
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training
