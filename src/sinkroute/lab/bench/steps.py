"""What a method costs in training: whole optimiser steps of several configurations, timed in turn.

Times of runs that were trained one after another say more of the machine than of the methods. Here the steps of all
methods alternate (`timing`), on batches of random bytes: what a step costs does not depend on what the bytes are.
A method that plans in a share p of its steps is timed with p = 0 and with p = 1; its step is their weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sinkroute.lab.bench.timing import Call, compare
from sinkroute.lab.config import Config, RouterConfig, VisionConfig
from sinkroute.lab.models import make_model
from sinkroute.routing import set_step

__all__ = ["StepTimes", "measure_steps", "stepper"]

_PLAIN, _PLANNED = "steps without a plan", "steps with a plan"


class StepTimes(NamedTuple):
    """What `measure_steps` found.

    Attributes:
        milliseconds: of a step of the baseline, the median.
        ratios: method → its step relative to the baseline's of the same turn, one a repeat.
    """

    milliseconds: float
    ratios: dict[str, list[float]]


def stepper(config: Config, device: torch.device) -> Callable[[], None]:
    """What makes one training step of this run's model on random symbols: forward, backward, clipping, AdamW.

    Raises:
        ValueError: a model of images.
    """
    if isinstance(config.model, VisionConfig):
        raise ValueError("config.model is of images, and steps are timed on text; give a decoder's or a stream's")
    model = make_model(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (config.train.batch, config.data.length + 1)
    symbols = torch.randint(0, config.model.vocab, size, generator=torch.Generator().manual_seed(0)).to(device)
    count = 0

    def step() -> None:
        nonlocal count
        set_step(model, count)
        count += 1
        loss = F.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())
        auxiliary = model.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(
    configs: Mapping[str, Config], baseline: str, *, repeats: int = 5, seconds: float = 30, pause: Call = lambda: None
) -> StepTimes:
    """Time a step of each of these runs, for models of bytes.

    Args:
        configs: method → its run.
        baseline: the method that the others are set against.
        repeats, seconds, pause: see `timing.compare`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls: dict[str, Call] = {}
    shares: dict[str, float] = {}
    for name, config in configs.items():
        share = _share_of_plans(config.router)
        if share is None:
            calls[name] = stepper(config, device)
            continue
        shares[name] = share
        for words, probability in ((_PLAIN, 0.0), (_PLANNED, 1.0)):
            options = {**config.router.options, "probability": probability}
            router = RouterConfig(config.router.name, options)
            calls[f"{name}, {words}"] = stepper(replace(config, router=router), device)
    found = compare(calls, baseline, device, repeats=repeats, seconds=seconds, seed=0, pause=pause)
    ratios = dict(found.ratios)
    for name, share in shares.items():
        pairs = zip(ratios.pop(f"{name}, {_PLAIN}"), ratios.pop(f"{name}, {_PLANNED}"), strict=True)
        ratios[name] = [(1 - share) * plain + share * planned for plain, planned in pairs]
    return StepTimes(found.milliseconds, {name: ratios[name] for name in configs})


def _share_of_plans(router: RouterConfig) -> float | None:
    """In which share of the steps a method plans, where that is an option and a number between 0 and 1."""
    share = router.options.get("probability")
    return float(share) if isinstance(share, (int, float)) and 0 < share < 1 else None
