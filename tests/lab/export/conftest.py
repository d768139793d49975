"""A run that was never trained: random weights in which everything that an export must carry over matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkroute.lab.config import Config, from_mapping, write_yaml
from sinkroute.lab.models import make_model
from sinkroute.lab.trained import TrainedRun

MakeRun = Callable[..., TrainedRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(router: str = "ssr-s", options: dict[str, Any] | None = None, **sizes: Any) -> TrainedRun:
        model_sizes = {"layers": 2, "d_model": 32, "heads": 2, "d_hidden": 16, "experts": 8, "top_k": 2, **sizes}
        config = from_mapping(
            Config,
            {
                "data": {"name": "text", "path": "/home/somebody/diary.txt", "length": 48},
                "model": model_sizes,
                "router": {"name": router, "options": options or {}},
                "train": {"steps": 8},
            },
        )
        model = make_model(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # 1 at first: a norm that was left out would not show
                    parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
                elif "embed" in name or "head" in name:
                    parameter.mul_(20)
                elif "gate.weight" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                elif "out" in name or "qkv" in name:
                    parameter.mul_(3)
            for layer in model.moe_layers:
                if hasattr(layer.router.state, "bias_E"):
                    layer.router.state.bias_E.copy_(0.2 * torch.randn(8, generator=generator))
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        write_yaml(config, folder / "config.yaml")
        about = {"name": "text", "source": "file /home/somebody/diary.txt", "sha256": "ab" * 32}
        (folder / "corpus.json").write_text(json.dumps(about))
        return TrainedRun(folder, config, folder / "checkpoints" / "step-000008", model)

    return make
