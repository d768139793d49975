"""torchtitan's `Trainer`, which tells the routers of a model their step and their ranks: torchtitan has no hook for it.

    from sinkroute.adapters.torchtitan_trainer import SinkrouteTrainer
    from torchtitan.models.deepseek_v3 import config_registry

    def deepseek_v3_16b():
        return SinkrouteTrainer.Config.of(config_registry.deepseek_v3_16b())

in a module of yours, whose name the command line says: `--module my_configs --config deepseek_v3_16b`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.trainer import Trainer

from sinkroute.adapters.torchtitan import tell_ranks
from sinkroute.routing.attached import named_routers
from sinkroute.routing.idle import no_balancing
from sinkroute.routing.step import end_step, set_step

__all__ = ["SinkrouteTrainer"]


class SinkrouteTrainer(Trainer):
    """Calls `sinkroute.set_step` before each forward and backward pass, `sinkroute.end_step` after the optimiser.

    Each part of the model is told by itself: stages of a pipeline say nothing to each other. The micro-batches of a
    pipeline's schedule have the same noise; those of gradient accumulation have not.

    Config: that of torchtitan's `Trainer`, or made `of` one.

    Raises:
        ValueError: `process_group` names no dimension of the mesh, or has ranks of another pipeline stage.
        RuntimeError: a mesh that is laid out otherwise, or a pipeline that runs otherwise, than in torchtitan 0.3.0 and
            torch 2.14.1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        @classmethod
        def of(cls, config: Trainer.Config) -> SinkrouteTrainer.Config:
            """The same configuration, for this trainer."""
            return cls(**{each.name: getattr(config, each.name) for each in fields(config)})

    def __init__(self, config: SinkrouteTrainer.Config) -> None:
        super().__init__(config)
        self._micro_batch = 0
        for part in self._routed_parts():
            tell_ranks(part, self.parallel_dims)
        if self.parallel_dims.pp_enabled:
            self._leave_trials_alone()

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self._micro_batch = 0
        super().train_step(data_iterator)
        # Here, as a checkpoint comes next, and each rank's counts are in none.
        for part in self._routed_parts():
            end_step(part)

    def forward_backward_step(self, **batch: Any) -> Tensor:
        for part in self._routed_parts():
            set_step(part, self.step, self._micro_batch, total_steps=self.config.training.steps)
        self._micro_batch += 1
        loss: Tensor = super().forward_backward_step(**batch)
        return loss

    def _leave_trials_alone(self) -> None:
        """A pipeline learns the shapes of its stages from a pass on memory that holds anything: no pass of training."""
        schedule = self.pp_schedule
        initialize = getattr(schedule, "_initialize_pp_stages", None)
        if initialize is None:
            raise RuntimeError(
                f"torch {torch.__version__} is not supported with pipeline stages: {type(schedule).__name__} has no "
                "_initialize_pp_stages, whose trial passes would be counted; install torch==2.14.1"
            )

        def initialized(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for part in self._routed_parts():
                    stack.enter_context(no_balancing(part))
                return initialize(*args, **kwargs)

        schedule._initialize_pp_stages = initialized

    def _routed_parts(self) -> list[nn.Module]:
        """Not all stages of a pipeline have a router."""
        return [part for part in self.model_parts if named_routers(part)]
