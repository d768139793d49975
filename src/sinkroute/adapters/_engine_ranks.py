"""The ranks of a DeepSpeed engine by what they hold: from its groups, and those of the `mpu` that it was given.

Nothing is imported: whoever has an engine has loaded DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from sinkroute.adapters._ranks import require_distinct

__all__ = ["EngineRanks", "engine_ranks"]


class EngineRanks:
    """See `Spread`.

    Args:
        groups: the module `deepspeed.utils.groups`.
    """

    def __init__(self, groups: Any) -> None:
        self._groups = groups
        # Sequences in parts have an mpu without tensor parallelism.
        self._mpu: Any = None if hasattr(groups.mpu, "initialize_sequence_parallel") else groups.mpu
        self._auto = groups._TENSOR_MODEL_PARALLEL_GROUP  # of AutoTP
        sizes = sys.modules["deepspeed.utils.bwc"]
        self._tensor: int = sizes.bwc_tensor_model_parallel_world_size(mpu=self._mpu)
        self._tensor = self._tensor if self._auto is None else dist.get_world_size(self._auto)
        self._stages: int = sizes.bwc_pipeline_parallel_world_size(mpu=self._mpu)

    @property
    def is_plain(self) -> bool:
        """Whether all ranks have other tokens: data, expert and sequence parallelism."""
        return self._tensor == 1 and self._stages == 1

    def others(self) -> Any:
        if self.is_plain:
            return dist.group.WORLD
        if self._auto is not None:
            return self._groups.get_data_parallel_group()
        if hasattr(self._mpu, "get_sequence_data_parallel_group"):
            return self._mpu.get_sequence_data_parallel_group()
        return self._mpu.get_data_parallel_group()

    def named(self, name: str) -> Any:
        groups = self._groups
        known: dict[str, Callable[[], Any]] = {"data_parallel": groups._get_data_parallel_group}
        if groups._get_sequence_parallel_world_size() > 1:
            known["sequence_parallel"] = groups._get_sequence_parallel_group
        for expert_group in groups._EXPERT_PARALLEL_GROUP:
            known[expert_group] = lambda: groups._get_expert_parallel_group(name)
        if name not in known:
            raise ValueError(
                f"process_group={name!r} is no group of DeepSpeed's; take one of {', '.join(map(repr, known))}, or "
                '"world" for all ranks with other tokens'
            )
        group = known[name]()
        self.require_others(group)
        return group

    def require_others(self, group: Any) -> None:
        if self._tensor == 1:
            return
        tensor_group = self._auto
        if tensor_group is None:
            tensor_group = sys.modules["deepspeed.utils.bwc"].bwc_tensor_model_parallel_group(mpu=self._mpu)
        what = f'{self._tensor} tensor-parallel ranks of DeepSpeed do; take "world", which counts each token once'
        require_distinct(group, dist.get_process_group_ranks(tensor_group), what)


def engine_ranks() -> EngineRanks | None:
    """None where DeepSpeed is not in use."""
    groups = sys.modules.get("deepspeed.utils.groups")
    return None if groups is None else EngineRanks(groups)
