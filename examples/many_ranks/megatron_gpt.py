"""Train a mixture in Megatron-Core 0.19, with sinkroute's recommended router, on as many ranks as torchrun starts.

    torchrun --nproc-per-node 8 --nnodes 8 ... examples/many_ranks/megatron_gpt.py 7b-a1b --ep 8 --data tokens.npy
    torchrun --nproc-per-node 8 --nnodes 64 ... examples/many_ranks/megatron_gpt.py 30b-a3b --tp 2 --pp 2 --ep 8 \
        --data tokens.npy --global-batch 1024 --checkpoint /shared/30b-a3b

What is sinkroute's is numbered: five lines. In Megatron-LM's pretrain_gpt.py the same lines go into the same places, as
docs/megatron.md says. `tokens.npy` is a vector of token ids; without one tokens are made up.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import get_submodules
from mixtures import LAYOUTS, MIXTURES, Layout, Mixture

import sinkroute
from sinkroute.adapters.megatron import make_router  # 1
from sinkroute.routing.attached import named_routers
from sinkroute.routing.ranks import Ranks

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32


# -- the model ---------------------------------------------------------------------------------------------------------


def transformer_config(mixture: Mixture, layout: Layout, **more: Any) -> TransformerConfig:
    """Megatron's configuration of these sizes on these ranks."""
    return TransformerConfig(
        num_layers=mixture.layers,
        hidden_size=mixture.dim,
        num_attention_heads=mixture.heads,
        num_query_groups=mixture.kv_heads,
        kv_channels=mixture.head_dim,
        ffn_hidden_size=mixture.expert_dim,
        moe_ffn_hidden_size=mixture.expert_dim,
        num_moe_experts=mixture.experts,
        moe_router_topk=mixture.top_k,
        moe_router_pre_softmax=not mixture.norm_topk,
        moe_router_load_balancing_type="none",  # 2: no balancing loss beside ours
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=GPU,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=DTYPE,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        params_dtype=DTYPE,
        bf16=GPU,
        **more,
    )


def build_model(mixture: Mixture, config: TransformerConfig, **more: Any) -> GPTModel:
    """This rank's stage."""
    if GPU:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=mixture.experts, moe_grouped_gemm=True, qk_layernorm=True
        )
    else:
        layer = get_gpt_layer_local_spec(num_experts=mixture.experts, qk_layernorm=True, normalization="RMSNorm")
    get_submodules(layer.submodules.mlp).router = make_router()  # 3: ssr-dual
    return GPTModel(
        config,
        layer,
        mixture.vocab,
        mixture.length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=int(mixture.rope_theta),
        **more,
    )


def build_optimizer(config: TransformerConfig, model: GPTModel) -> tuple[DistributedDataParallel, Any]:
    """The model that sums its gradients, and Adam, whose state is spread over ranks where Megatron can: on GPUs."""
    spread = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=GPU, overlap_grad_reduce=GPU, overlap_param_gather=GPU
    )
    chunk = DistributedDataParallel(config, spread, model)
    chunk.broadcast_params()
    settings = OptimizerConfig(
        optimizer="adam",
        lr=4e-4 if GPU else 3e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0 if GPU else 0.0,
        bf16=GPU,
        params_dtype=DTYPE,
        use_distributed_optimizer=GPU,
    )
    config.grad_scale_func = None
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = chunk.no_sync
    return chunk, get_megatron_optimizer(settings, [chunk])


# -- the data ----------------------------------------------------------------------------------------------------------


def micro_batches(mixture: Mixture, file: str | None, step: int, count: int) -> Iterator[torch.Tensor]:
    """This replica's micro-batches of a step, (1, length + 1) token ids: the same ones after a resume."""
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stored = np.load(file, mmap_mode="r") if file else None
    for index in range(count):
        draw = np.random.default_rng([step, index * replicas + replica])
        if stored is None:  # each sequence has a start and a stride, which a model can find out
            row = draw.integers(mixture.vocab) + draw.integers(1, 8) * np.arange(mixture.length + 1)
            row %= mixture.vocab
        else:
            start = draw.integers(len(stored) - mixture.length)
            row = stored[start : start + mixture.length + 1]
        yield torch.from_numpy(np.asarray(row, np.int64))[None].to("cuda" if GPU else "cpu")


def forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """What Megatron's schedules call for every micro-batch."""
    tokens = next(batches)
    length = tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device)[None]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
    losses = model(tokens[:, :-1], positions, hidden, labels=tokens[:, 1:])

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}  # what schedules do to the first, they do in place

    return losses, mean


# -- training ----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Trains; returns what was logged, on the first rank of each stage."""
    options = parse(arguments)
    mixture = MIXTURES[options.mixture]
    layout = start(options)
    torch.manual_seed(options.seed)
    if GPU:
        tensor_parallel.model_parallel_cuda_manual_seed(options.seed)
    config = transformer_config(mixture, layout, use_cpu_initialization=not GPU)
    model = build_model(mixture, config)
    chunk, optimizer = build_optimizer(config, model.cuda() if GPU else model)
    first = load(options.checkpoint, chunk, optimizer)
    count = options.global_batch // layout.dp
    if count * layout.dp != options.global_batch:
        raise ValueError(f"--global-batch {options.global_batch} must be a multiple of the {layout.dp} replicas")
    ranks = next(iter(named_routers(chunk).values())).ranks.load  # those that hold these layers
    monitor = sinkroute.LoadMonitor(chunk)
    logged = []
    for step in range(first, options.steps):
        sinkroute.set_step(chunk, step)  # 4
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        parts = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(mixture, options.data, step, count),
            model=[chunk],
            num_microbatches=count,
            seq_length=mixture.length,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        if (step + 1) % options.report_every == 0 or step + 1 == options.steps:
            logged.append(report(step, parts, monitor, ranks))
    sinkroute.end_step(chunk)  # 5: before a checkpoint or an evaluation
    save(options.checkpoint, chunk, optimizer, options.steps)
    return logged


def report(step: int, parts: list[dict[str, Any]], monitor: sinkroute.LoadMonitor, ranks: Ranks) -> dict[str, Any]:
    """The loss, and how even loads were since the last line, over all ranks of the stage."""
    layers = monitor.metrics(reset=True, process_group=ranks)
    found = {
        "step": step,
        "loss": float(sum(part["loss"] for part in parts) / len(parts)) if parts else None,
        "max_vio": [values["max_vio"] for values in layers.values()],
        "max_vio_global": [values["max_vio_global"] for values in layers.values()],
        "dead": sum(values["dead"] for values in layers.values()),
    }
    if ranks.rank == 0:
        mean = {name: np.mean(found[name]) for name in ("max_vio", "max_vio_global")}
        loss = "" if found["loss"] is None else f"  loss {found['loss']:.3f}"
        print(
            f"step {step}{loss}  MaxVio {mean['max_vio']:.3f} of a micro-batch, {mean['max_vio_global']:.3f} of all"
            f"  dead {found['dead']}  stage {parallel_state.get_pipeline_model_parallel_rank()}",
            flush=True,
        )
    return found


def start(options: argparse.Namespace) -> Layout:
    """Join the ranks; data parallelism takes those that are left."""
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        limit = datetime.timedelta(minutes=options.timeout_minutes)
        dist.init_process_group("nccl" if GPU else "gloo", timeout=limit)
    others = options.tp * options.pp
    layout = Layout(dp=dist.get_world_size() // others, tp=options.tp, pp=options.pp, ep=options.ep)
    if layout.ranks != dist.get_world_size():
        raise ValueError(f"--tp {layout.tp} · --pp {layout.pp} does not divide {dist.get_world_size()} ranks")
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=not GPU,
    )
    return layout


def _parts(chunk: torch.nn.Module, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    model = chunk.module.sharded_state_dict()
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading)}


def save(folder: str | None, chunk: torch.nn.Module, optimizer: Any, step: int) -> None:
    """Model and optimiser, from which another number of ranks goes on too."""
    if folder is None:
        return
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({**_parts(chunk, optimizer, is_loading=False), "step": step}, folder)


def load(folder: str | None, chunk: torch.nn.Module, optimizer: Any) -> int:
    """The step to go on with; 0 where there is no checkpoint."""
    if folder is None or not (Path(folder) / "metadata.json").exists():
        return 0
    found = dist_checkpointing.load({**_parts(chunk, optimizer, is_loading=True), "step": 0}, folder)
    chunk.module.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return int(found["step"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("mixture", choices=list(MIXTURES))
    for name in ("tp", "pp", "ep"):
        said = {mixture: getattr(layout, name) for mixture, layout in LAYOUTS["megatron"].items()}
        parser.add_argument(f"--{name}", type=int, default=1, help=f"the recipes take {said}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--data", help="a .npy file of token ids")
    parser.add_argument("--checkpoint", help="on a shared disk: gone on from if it is there, written at the end")
    parser.add_argument("--report-every", type=int, default=10, help="steps from one line to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-minutes", type=float, default=10, help="a rank that waits so long for another fails")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
