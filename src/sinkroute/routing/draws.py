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

__all__ = ["normal_like", "uniform"]


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
