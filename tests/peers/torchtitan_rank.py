"""One process of torchtitan's Trainer on CPUs, for torchtitan_matrix.py, which forks it: imports take most of the time.

A cell says what to train: a name for what is written, layout, method, first and last step. What each router was given
and gave, the loads that were counted and the losses go to FOLDER/NAME-RANK.pt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan_on_the_cpu as on_the_cpu
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CommConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import OverrideConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.deepseek_v3 import model_registry

from sinkroute.adapters._patched import holder
from sinkroute.adapters.torchtitan_trainer import SinkrouteTrainer
from sinkroute.routing.attached import named_routers
from sinkroute.routing.state import recomputing

ROWS, LENGTH = 4, 32  # of the global batch of a step, on however many ranks
LAYERS = 4  # the first is dense; of two stages, the first has one layer with experts, the second two


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, tokenizer_path: str = "") -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    decode = get_vocab_size = encode


class Rows(BaseDataLoader):
    """Rows of random tokens, some much more frequent. Which they are depends on step and row alone, not on the rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        first_step: int = 1

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **more: Any) -> None:
        self.step, self.size = config.first_step, local_batch_size
        own = ROWS // dp_world_size
        self.rows = range(dp_rank * own, (dp_rank + 1) * own)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.stack([_row(self.step, row) for row in self.rows])
            self.step += 1
            for part in tokens.split(self.size):
                positions = torch.arange(LENGTH).expand(len(part), -1)
                yield {"input": part[:, :-1].contiguous(), "positions": positions}, part[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


def _row(step: int, row: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + row)
    return (torch.rand(LENGTH + 1, generator=generator).pow(3) * 500).long() + 100 * row


class Recording(SinkrouteTrainer):
    """A Trainer that starts from the same weights on any number of ranks, and writes down what routers do."""

    @dataclass(kw_only=True, slots=True)
    class Config(SinkrouteTrainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.calls: list[dict[str, Any]] = []
        self.loads: dict[int, list[torch.Tensor]] = {}
        self.losses: list[float] = []
        self.biases: list[dict[int, torch.Tensor]] = []
        self.layers: dict[str, int] = {}
        for part in self.model_parts:
            _set_weights(part)
            for path, router in named_routers(part).items():
                self.layers[path] = router.layer
                router.register_forward_hook(self._note)
                router.finish_step = self._counting(router, router.finish_step)
        log = self.metrics_processor.log

        def noting(step: int, loss: float, *args: Any, **kwargs: Any) -> None:
            self.losses.append(loss)
            log(step, loss, *args, **kwargs)

        self.metrics_processor.log = noting

    def _note(self, router: Any, inputs: Any, routes: Any) -> None:
        if not router.training or not router.balances or recomputing():
            return
        bias = router.choice_bias()
        self.calls.append(
            {
                "layer": router.layer,
                "step": router.step,
                "micro_batch": router.micro_batch,
                "logits": inputs[0].detach().clone(),
                "experts": routes.experts.clone(),
                "branch": routes.branch,
                "bias": None if bias is None or bias.bias_E is None else bias.bias_E.clone(),
                "correction": None if router.correction_E is None else router.correction_E.clone(),
            }
        )

    def _counting(self, router: Any, finish: Any) -> Any:
        def counting(load_E: torch.Tensor, sums: Any) -> None:
            self.loads.setdefault(router.layer, []).append(load_E.clone())
            finish(load_E, sums)

        return counting

    def train_step(self, data_iterator: Any) -> None:
        if not self.biases:
            self.biases.append(self.learned())  # of a checkpoint
        super().train_step(data_iterator)
        self.biases.append(self.learned())

    def learned(self) -> dict[int, torch.Tensor]:
        """Layer → the bias that the model serves with."""
        found = {}
        for part in self.model_parts:
            for block in part.layers.values():
                if block.moe_enabled and block.moe.expert_bias_E is not None:
                    bias = block.moe.expert_bias_E
                    found[holder(block.moe.router).layer] = (
                        bias.full_tensor() if hasattr(bias, "full_tensor") else bias
                    ).clone()
        return found


def _set_weights(part: torch.nn.Module) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole = {}
    for name, value in part.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-7:], "big") % 2**31 + len(name))
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            drawn = 1 + 0.1 * drawn
        elif "embeddings" not in name:
            drawn = drawn * value.shape[-1] ** -0.5 * (3 if "gate" in name else 1)
        whole[name] = drawn
    set_model_state_dict(part, whole, options=StateDictOptions(full_state_dict=True, strict=False))


METHODS: dict[str, dict[str, Any]] = {
    "ssr-l": {"router": "ssr-l", "probability": 0.5, "noise": 0.5, "noise_scale": "absolute", "process_group": "world"},
    "ssr-dual": {"router": "ssr-dual", "process_group": "world"},
    "loss-free": {"router": "loss-free", "update_rate": 0.02},
}


def config_of(cell: dict[str, Any], folder: Path) -> Recording.Config:
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:LAYERS]
    on_the_cpu.dense_attention(spec.model)
    layout = dict(cell["layout"])
    data = ROWS // layout.pop("dp_degree")
    return Recording.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))),
        dump_folder=str(folder / cell["run"]),
        model_spec=spec,
        metrics=MetricsProcessor.Config(log_freq=1),
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(first_step=cell.get("first_step", 1)),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            local_batch_size=data,
            seq_len=LENGTH,
            steps=cell["steps"],
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(**layout),
        comm=CommConfig(train_timeout_seconds=600),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=2,
            last_save_model_only=False,
            load_step=cell.get("load_step", -1),
            exclude_from_loading=["dataloader"],
        ),
        activation_checkpoint={"full": FullAC, "selective": SelectiveAC}[cell.get("recompute", "selective")].Config(),
        override=OverrideConfig(imports=[("sinkroute.adapters.torchtitan.route", METHODS[cell["method"]])]),
    )


def train(cell: dict[str, Any], folder: Path) -> None:
    """As RANK of WORLD_SIZE processes."""
    torch.set_num_threads(1)
    since = time.monotonic()
    trainer = config_of(cell, folder).build()
    trainer.train()
    routers = [router for part in trainer.model_parts for router in named_routers(part).values()]
    told = {
        name: None if (group := ranks.group) is None else dist.get_process_group_ranks(group)
        for name, ranks in routers[0].ranks._asdict().items()
    }
    dims = trainer.parallel_dims
    places = {
        name: 0 if (mesh := dims.get_optional_mesh(name)) is None else mesh.get_local_rank()
        for name in ("pp", "batch", "cp", "tp")
    }
    found = {
        "calls": trainer.calls,
        "loads": trainer.loads,
        "losses": trainer.losses,
        "biases": trainer.biases,
        "layers": trainer.layers,
        "ranks": told,
        "noise_rank": routers[0].ranks.noise.rank,
        "places": places,
        "options": routers[0].options,
        "seconds": time.monotonic() - since,
    }
    torch.save(found, folder / f"{cell['name']}-{os.environ['RANK']}.pt")
    trainer.close()
