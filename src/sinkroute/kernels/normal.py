"""Normal numbers that are a function of a seed and of nothing else: no generator is left behind in another state."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.kernels.backend import c_on, threads_for
from sinkroute.kernels.operations import define
from sinkroute.kernels.storage import address

__all__ = ["normal_like"]


def normal_like(reference: Tensor, seed: Tensor) -> Tensor:
    """Standard normal numbers with the shape, dtype and device of `reference`, a function of `seed` alone.

    Args:
        reference: any float tensor; its values do not matter.
        seed: 0-d int64 on the CPU, 0 or more. A tensor, because a number would be part of a compiled graph, and every
            step would be compiled anew.

    On a CPU with the compiled kernels each number is a function of the seed and its place in the flattened tensor
    alone, the same on every such machine: 32 bits of Threefry through the normal quantile, in float32 and widened or
    narrowed from there (native/noise.c says how close to normal that is). Elsewhere it is torch's generator that is
    seeded, so that the numbers differ between device types, and between CPUs with the kernels and without; never
    between calls.

    >>> seed = torch.tensor(7)
    >>> bool((normal_like(torch.zeros(3), seed) == normal_like(torch.ones(3), seed)).all())
    True
    """
    noise: Tensor = torch.ops.sinkroute.normal_like(reference, seed)
    return noise


def _normal_like(reference: Tensor, seed: Tensor) -> Tensor:
    if (c := c_on(reference.device)) is not None:
        noise = torch.empty(reference.shape, dtype=torch.float32, device="cpu")
        c.normal(int(seed), noise.numel(), address(noise), threads_for(noise))
        return noise.to(reference.dtype)
    generator = torch.Generator(device=reference.device)
    generator.manual_seed(int(seed))
    return torch.randn(reference.shape, dtype=reference.dtype, device=reference.device, generator=generator)


# One opaque operation: the compiler cannot trace a generator, and tensors without values have none.
define(
    "normal_like(Tensor reference, Tensor seed) -> Tensor",
    _normal_like,
    lambda reference, seed: reference.new_empty(reference.shape),
)
