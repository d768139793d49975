"""Three mixtures for torchtitan 0.3.0, with sinkroute's recommended router: configurations, and a trainer for them.

    export PYTHONPATH=examples/many_ranks
    torchrun --nproc-per-node 4 -m torchtitan.train --module torchtitan_qwen3 --config small
    torchrun --nproc-per-node 8 --nnodes 8 ... -m torchtitan.train --module torchtitan_qwen3 --config olmoe_7b_a1b
    torchrun --nproc-per-node 8 --nnodes 64 ... -m torchtitan.train --module torchtitan_qwen3 --config qwen3_30b_a3b

What is sinkroute's is numbered: five places. All else is torchtitan's and is changed on its command line: the mesh
(`--parallelism.tensor_parallel_degree 2`), the data, the router (`--override.imports
'sinkroute.adapters.torchtitan.route={"router": "ssr-l", "probability": 0.001}'`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from mixtures import LAYOUTS, MIXTURES, Mixture
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.override import OverrideConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.qwen3 import _build_qwen3_moe_layers, model_registry  # the first is private: pinned to 0.3.0
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

import sinkroute
from sinkroute.adapters.torchtitan_trainer import SinkrouteTrainer  # 1
from sinkroute.routing.attached import named_routers


class Watched(SinkrouteTrainer):
    """The trainer that tells routers their step and their ranks (2), and logs how even loads are."""

    @dataclass(kw_only=True, slots=True)
    class Config(SinkrouteTrainer.Config):
        pass

    def __init__(self, config: Watched.Config) -> None:
        super().__init__(config)
        self.monitors = [sinkroute.LoadMonitor(part) for part in self.model_parts]
        self.balance: list[dict[str, Any]] = []

    def train_step(self, data_iterator: Any) -> None:
        super().train_step(data_iterator)
        if self.metrics_processor.should_log(self.step):
            self.log_balance()

    def log_balance(self) -> None:
        """MaxVio since the last line, over all ranks of a stage: a collective call of these."""
        layers: dict[str, dict[str, Any]] = {}
        for part, monitor in zip(self.model_parts, self.monitors, strict=True):
            ranks = next(iter(named_routers(part).values())).ranks.load
            layers |= monitor.metrics(reset=True, process_group=ranks)
        found = {
            name: sum(values[name] for values in layers.values()) / len(layers)
            for name in ("max_vio", "max_vio_global", "dead")
        }
        self.balance.append({"step": self.step, **found, "layers": layers})
        logger.info(
            f"step: {self.step:2}  MaxVio {found['max_vio']:.3f} of a micro-batch, {found['max_vio_global']:.3f} of "
            f"all  dead experts a layer {found['dead']:.2f}"
        )


# -- the models --------------------------------------------------------------------------------------------------------


def model_of(name: str) -> ModelSpec:
    """torchtitan's Qwen3 with the sizes of a mixture. (OLMoE norms queries over all heads: 61,440 parameters more.)"""
    mixture, base = MIXTURES[name], model_registry("30B-A3B")
    if name == "30b-a3b":
        spec = base
    else:
        spec = replace(base, flavor=name, model=_sized(base.model, mixture), state_dict_adapter=None)
    for layer in spec.model.layers:
        layer.moe.router.route_norm = mixture.norm_topk
        # 3: what is learned goes into the gate. These models have no place for a bias, and an export would lose it.
        layer.moe.load_balance_coeff = None
    return spec


def _sized(model: Any, mixture: Mixture) -> Any:
    layers = _build_qwen3_moe_layers(
        n_layers=mixture.layers,
        dim=mixture.dim,
        n_heads=mixture.heads,
        n_kv_heads=mixture.kv_heads,
        head_dim=mixture.head_dim,
        moe_hidden_dim=mixture.expert_dim,
        num_experts=mixture.experts,
        top_k=mixture.top_k,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=mixture.head_dim, max_seq_len=mixture.length, theta=mixture.rope_theta),
    )
    return replace(
        model,
        vocab_size=mixture.vocab,
        dim=mixture.dim,
        norm=replace(model.norm, normalized_shape=mixture.dim),
        tok_embeddings=replace(model.tok_embeddings, num_embeddings=mixture.vocab, embedding_dim=mixture.dim),
        lm_head=replace(model.lm_head, in_features=mixture.dim, out_features=mixture.vocab),
        layers=layers,
    )


# -- data that need no download, for `small` ---------------------------------------------------------------------------


class NoTokenizer(BaseTokenizer):
    """For data that are token ids."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: NoTokenizer.Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError("these data are token ids; take a HuggingFaceTokenizer.Config for text")

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError("these data are token ids; take a HuggingFaceTokenizer.Config for text")

    def get_vocab_size(self) -> int:
        return MIXTURES["small"].vocab


class Strides(BaseDataLoader):
    """Sequences with a start and a stride, which a model can find out; other ones on each data-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Strides.Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self.ranks, self.rank, self.shape, self.drawn = dp_world_size, dp_rank, (local_batch_size, seq_len + 1), 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        rows, length = self.shape
        while True:
            generator = torch.Generator().manual_seed(self.drawn * self.ranks + self.rank)
            self.drawn += 1
            start = torch.randint(MIXTURES["small"].vocab, (rows, 1), generator=generator)
            stride = torch.randint(1, 8, (rows, 1), generator=generator)
            tokens = (start + stride * torch.arange(length)) % MIXTURES["small"].vocab
            positions = torch.arange(length - 1).repeat(rows, 1)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn = state_dict.get("drawn", 0)


# -- the configurations ------------------------------------------------------------------------------------------------


def _recipe(name: str, **more: Any) -> Trainer.Config:
    mixture, layout = MIXTURES[name], LAYOUTS["torchtitan"][name]
    return Watched.Config(
        model_spec=model_of(name),
        override=OverrideConfig(imports=[("sinkroute.adapters.torchtitan.route", {})]),  # 4: ssr-dual
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=mixture.vocab)),
        parallelism=ParallelismConfig(
            data_parallel_shard_degree=-1,  # all ranks that are left
            tensor_parallel_degree=layout.tp,
            pipeline_parallel_degree=layout.pp,
            context_parallel_degree=layout.cp,
            expert_parallel_degree=layout.ep,
        ),
        **more,
    )


def small() -> Trainer.Config:
    """873,152 parameters, 16 experts top-4; 2 or 4 ranks."""
    return _recipe(
        "small",
        tokenizer=NoTokenizer.Config(),
        dataloader=Strides.Config(),
        metrics=MetricsProcessor.Config(log_freq=1),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=4, seq_len=MIXTURES["small"].length, steps=10, disable_cuda_graphs=True
        ),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
    )


def olmoe_7b_a1b() -> Trainer.Config:
    """The sizes of OLMoE-1B-7B, 64 experts top-8: 64 ranks, experts over 8 of them. 4 million tokens a step."""
    return _recipe(
        "7b-a1b",
        hf_assets_path="./assets/hf/OLMoE-1B-7B-0924",
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        optimizer=default_adamw(lr=4e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2000),
        training=_large(local_batch_size=4, global_batch_size=1024),
        checkpoint=CheckpointManager.Config(enable=True, interval=1000, last_save_model_only=False),
    )


def qwen3_30b_a3b() -> Trainer.Config:
    """torchtitan's Qwen3-30B-A3B, 128 experts top-8: 512 ranks, experts over 8 of them. 4 million tokens a step."""
    return _recipe(
        "30b-a3b",
        hf_assets_path="./assets/hf/Qwen3-30B-A3B",
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        optimizer=default_adamw(lr=3e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2000),
        training=_large(local_batch_size=2, global_batch_size=1024),
        checkpoint=CheckpointManager.Config(enable=True, interval=1000, last_save_model_only=False),
    )


def _large(**batches: int) -> TrainingConfig:
    # 5: a CUDA graph would repeat one step's branch and noise.
    return TrainingConfig(seq_len=4096, steps=100_000, disable_cuda_graphs=True, **batches)
