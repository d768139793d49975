"""Random draws that depend on a key and on nothing else.

A stochastic router must give the same answer when a layer is recomputed in the backward pass, after a resume, and (for
the choice of the branch) on all ranks of a group. A global generator gives none of these: its answer depends on who
drew before. Here every draw is a hash of (seed, layer, step, micro-batch), so that it can be made again at will and no
state is kept.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sinkroute._operations import define
from sinkroute._values import address
from sinkroute.transport import native
from sinkroute.transport.passes.compiled import threads_for

__all__ = ["hash63", "normal_like", "uniform"]


def hash63(*key: int | str) -> int:
    """A hash of `key` in [0, 2^63), the same in every process: what seeds a generator and fits an int64."""
    return _hash64(*key) >> 1


def _hash64(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """A float in [0, 1) that is a function of `key` alone.

    >>> uniform("branch", 0, 7) == uniform("branch", 0, 7), uniform("branch", 0, 7) == uniform("branch", 0, 8)
    (True, False)
    """
    return (_hash64(*key) >> 11) / 2**53  # 53 bits: exactly what a float64 holds


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
    """
    return torch.ops.sinkroute.normal_like(reference, seed)


def _normal_like(reference: Tensor, seed: Tensor) -> Tensor:
    if reference.device.type == "cpu" and (kernels := native.load()) is not None:
        noise = torch.empty(reference.shape, dtype=torch.float32, device="cpu")
        kernels.normal(int(seed), noise.numel(), address(noise), threads_for(noise))
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
