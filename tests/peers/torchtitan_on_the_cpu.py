"""Stand-ins for what torchtitan 0.3.0's Trainer takes for granted of a GPU. Import it before torchtitan.

All that a CPU needs is here, and nothing of it in the package:

- torchtitan's device is "cuda" where no accelerator is found, and it asks it for a name, memory and statistics;
- `barrier` is called with device ids, which gloo refuses;
- FlexAttention has no backward pass on a CPU: dense causal attention is in its place (`dense_attention`);
- FSDP scales gradients in the collective, by an operation that gloo lacks;
- gloo has no `all_to_all` of lists: a single one of concatenated parts;
- a pipeline tries its stages on memory that holds anything, which routers refuse on a CPU if it is not finite.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def _be_the_device() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"
    stand_ins = {
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=1 << 34),
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, stand_in)
    torch.cpu.device_count = lambda: 1  # each rank's device is its only one


def _without_device_ids() -> None:
    barrier = dist.barrier

    def plain(group: Any = None, async_op: bool = False, device_ids: Any = None, **more: Any) -> Any:
        return barrier(group, async_op, **more)

    dist.barrier = torch.distributed.distributed_c10d.barrier = plain


def _sum_in_collectives() -> None:
    from torch.distributed.fsdp import FSDPModule

    set_factor = FSDPModule.set_gradient_divide_factor

    def plain(self: Any, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = plain


def _exchange_lists() -> None:
    def all_to_all(outputs: list, inputs: list, group: Any = None, async_op: bool = False) -> Any:
        flat = outputs[0].new_empty(sum(part.numel() for part in outputs))
        sent = torch.cat([part.reshape(-1) for part in inputs])
        sizes = [[part.numel() for part in parts] for parts in (outputs, inputs)]
        dist.all_to_all_single(flat, sent, *sizes, group=group)
        for part, found in zip(outputs, flat.split(sizes[0]), strict=True):
            part.copy_(found.view_as(part))
        return SimpleNamespace(wait=lambda: None) if async_op else None

    dist.all_to_all = torch.distributed.distributed_c10d.all_to_all = all_to_all


def _try_stages_on_zeros() -> None:
    from torch.distributed.pipelining import _utils

    make = _utils._make_tensor_from_meta
    _utils._make_tensor_from_meta = lambda *args: make(*args).zero_()


def dense_attention(model_config: Any) -> None:
    """Put dense causal attention into a torchtitan model configuration."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    for layer in model_config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()


_be_the_device()
_without_device_ids()
_sum_in_collectives()
_exchange_lists()
_try_stages_on_zeros()
