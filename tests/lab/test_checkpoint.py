"""Checkpoints: exact, whole or absent, and clear about damage."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from sinkroute.lab import checkpoint
from sinkroute.lab.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_model,
)

from .checkpoints import load_carried, load_checkpoint, save_checkpoint


def trained(seed: int = 0, steps: int = 3, width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    step(model, optimizer, steps, width)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, width: int = 5) -> None:
    for i in range(steps):
        model(torch.full((2, width), float(i + 1))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"note": "x"}, keep=2)
    other, other_optimizer = trained(seed=1, steps=1)
    assert load_checkpoint(path, other, other_optimizer) == {"note": "x"}
    step(model, optimizer, 4)
    step(other, other_optimizer, 4)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [group["weight_decay"] for group in other_optimizer.param_groups] == [0.1, 0.0]


def test_no_file_needs_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    json.loads((path / "state.json").read_text())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 10, 9):
        save_checkpoint(tmp_path, number, *trained(), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000009", "step-000010"]


def test_steps_of_more_digits_sort_as_numbers(tmp_path: Path) -> None:
    for number in (999_999, 1_000_000):
        save_checkpoint(tmp_path, number, *trained(), {}, keep=5)
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained(), {}, keep=2)
    draft = tmp_path / ".step-000002.draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"torn")
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert save_checkpoint(tmp_path, 2, *trained(), {}, keep=2).name == "step-000002"
    assert not draft.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_named_and_answered_with_a_way_on(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, 1, *trained(), {}, keep=2)
    path = save_checkpoint(tmp_path, 2, *trained(), {}, keep=2)
    content = bytearray((path / name).read_bytes())
    if damage == "truncate":
        (path / name).write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-3] ^= 1
        (path / name).write_bytes(content)
    else:
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing).*Delete .*step-000002.*step-000001"):
        load_checkpoint(path, *trained(seed=1))


@pytest.mark.parametrize("name", ["carried.safetensors", "average.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_to_what_else_there_is_to_remember_is_found_too(tmp_path: Path, name: str, damage: str) -> None:
    average, _ = trained(seed=2)
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=2, carried={"memory-0": torch.ones(3)}, average=average)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content if damage == "flip" else content[:-4])
    carried, fresh = name == "carried.safetensors", trained()
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing).*Delete .*step-000001.*start anew"):
        load_carried(path, *fresh) if carried else load_model(path, fresh[0], averaged=True)


def test_what_is_carried_and_the_average_come_back(tmp_path: Path) -> None:
    average, _ = trained(seed=2)
    carried = {"memory-0": torch.randn(3, 4).transpose(0, 1), "memory-1": torch.randn(2)}
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1, carried=carried, average=average)
    found = load_carried(path, *trained())
    assert found.keys() == carried.keys()
    assert all(torch.equal(found[name], carried[name]) for name in carried)
    model, last = trained(seed=3)[0], trained()[0]
    for averaged, expected in ((True, average), (False, last)):
        load_model(path, model, averaged=averaged)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_checkpoint_without_more_to_remember_has_no_more_files_and_carries_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), {"step": 1}, keep=1)
    assert not (path / "carried.safetensors").exists() and not (path / "average.safetensors").exists()
    assert load_carried(path, *trained()) == {}
    assert load_checkpoint(path, *trained(seed=1)) == {"step": 1}
    with pytest.raises(CheckpointError, match=r"average\.safetensors is missing"):
        load_model(path, trained()[0], averaged=True)


def test_a_damaged_checkpoint_leaves_model_and_optimizer_as_they_were(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    (path / "optimizer.safetensors").write_bytes(b"")
    model, optimizer = trained(seed=1)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError):
        load_checkpoint(path, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}'])
def test_a_damaged_state_file_is_named(tmp_path: Path, content: str) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged.*start anew"):
        load_checkpoint(path, *trained())


def test_a_changed_number_in_the_state_file_is_found(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, *trained(), {"step": 4}, keep=1)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 4', '"step": 5'))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(path, *trained())


def test_a_folder_with_a_similar_name_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    (tmp_path / "step-000006.bak").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), {}, keep=1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_model(path, trained(width=6)[0])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors 0.8 really says on a full file system.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_loses_nothing_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save_checkpoint(tmp_path, 1, *trained(), {}, keep=2)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000002.*disk is full.*Nothing is lost up to step-000001"):
        save_checkpoint(tmp_path, 2, *trained(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
