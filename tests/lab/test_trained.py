"""A run read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sinkroute.lab.config import Config, from_mapping, to_mapping, write_yaml
from sinkroute.lab.models import make_model
from sinkroute.lab.trained import load_run

from .checkpoints import save_checkpoint

CONFIG = from_mapping(Config, {"model": {"layers": 1, "d_model": 16, "heads": 2, "d_hidden": 8, "experts": 4}})


def test_the_last_checkpoint_is_what_is_loaded(tmp_path: Path) -> None:
    write_yaml(CONFIG, tmp_path / "config.yaml")
    model = make_model(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (5, 10):
        model.head.weight.data.fill_(step)
        save_checkpoint(tmp_path / "checkpoints", step, model, optimizer, {}, keep=2)
    run = load_run(tmp_path)
    assert (run.config, run.step, run.checkpoint.name) == (CONFIG, 10, "step-000010")
    assert (run.model.head.weight == 10).all()
    assert torch.equal(run.model.embed.weight, model.embed.weight)


def test_of_an_averaged_run_the_average_is_loaded(tmp_path: Path) -> None:
    config = from_mapping(Config, {**to_mapping(CONFIG), "train": {"average": 0.9}})
    write_yaml(config, tmp_path / "config.yaml")
    model, average = make_model(config), make_model(replace(config, seed=1))
    save_checkpoint(tmp_path / "checkpoints", 5, model, torch.optim.AdamW(model.parameters()), {}, 1, average=average)
    assert torch.equal(load_run(tmp_path).model.head.weight, average.head.weight)


def test_a_run_from_before_models_had_names_is_loaded(tmp_path: Path) -> None:
    write_yaml(CONFIG, tmp_path / "config.yaml")
    mapping = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del mapping["model"]["name"], mapping["data"]["augment"], mapping["train"]["average"], mapping["eval"]["inference"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))
    model = make_model(CONFIG)
    save_checkpoint(tmp_path / "checkpoints", 5, model, torch.optim.AdamW(model.parameters()), {}, 1)
    run = load_run(tmp_path)
    assert run.config == CONFIG
    assert torch.equal(run.model.embed.weight, model.embed.weight)


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no config.yaml"):
        load_run(tmp_path)
    write_yaml(CONFIG, tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load_run(tmp_path)
