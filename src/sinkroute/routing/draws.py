"""Random draws that depend on a key and on nothing else.

A stochastic router must give the same answer when a layer is recomputed in the backward pass, after a resume, and (for
the choice of the branch) on all ranks of a group. A global generator gives none of these: its answer depends on who
drew before. Here every draw is a hash of (seed, layer, step, micro-batch), so that it can be made again at will and no
state is kept.
"""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor, nn

__all__ = ["normal_like", "set_step", "uniform"]


def _hash64(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """A float in [0, 1) that is a function of `key` alone.

    >>> uniform("branch", 0, 7) == uniform("branch", 0, 7), uniform("branch", 0, 7) == uniform("branch", 0, 8)
    (True, False)
    """
    return (_hash64(*key) >> 11) / 2**53  # 53 bits: exactly what a float64 holds


def normal_like(reference: Tensor, *key: int | str) -> Tensor:
    """Standard normal numbers with the shape, dtype and device of `reference`, a function of `key` alone.

    The numbers differ between device types (CPU and CUDA have different generators), never between calls.
    """
    generator = torch.Generator(device=reference.device)
    generator.manual_seed(_hash64(*key) >> 1)  # manual_seed takes a signed 64-bit number
    return torch.randn(reference.shape, dtype=reference.dtype, device=reference.device, generator=generator)


def _count(name: str, value: int) -> int:
    try:
        # Any integer type, numpy's too: the key must hash alike. (A bool is one by accident only.)
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, got {value!r}; pass the optimiser's step count")
    return number


def set_step(module: nn.Module, step: int, micro_batch: int = 0) -> None:
    """Tell all routers in `module` which step this is, so that their random draws are keyed to it.

    Call it once per training step, before the forward pass (with gradient accumulation: before each micro-batch, with
    its index). It also numbers the routers that have no `layer` yet in the order in which `module` holds them.

    Args:
        module: a model, a layer or a router.
        step: the optimiser step, 0 or more.
        micro_batch: the micro-batch within the step, 0 or more.

    Raises:
        ValueError: `step` or `micro_batch` is not an integer of 0 or more.

    >>> import sinkroute
    >>> router = sinkroute.create_router("ssr-s", num_experts=8, top_k=2)
    >>> sinkroute.set_step(router, 100)
    >>> router.step, router.layer
    (100, 0)
    """
    from sinkroute.routing.router import Router  # the router keys its draws with this module

    step, micro_batch = _count("step", step), _count("micro_batch", micro_batch)
    routers = [part for part in module.modules() if isinstance(part, Router)]
    for position, router in enumerate(routers):
        if router.layer is None:
            router.layer = position
        router.step, router.micro_batch, router.step_was_set = step, micro_batch, True
