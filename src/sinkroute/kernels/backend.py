"""Who computes: C on a CPU, Triton on a GPU, and torch wherever neither can. Every operation asks here.

Whether kernels may be handed addresses at all, rather than be shown to a tracer as one operation, is `readable` of
`storage`. That is asked before: the tensors that come here lie in memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import warnings

import torch
from torch import Tensor

from sinkroute.kernels import native

__all__ = ["c_for", "c_on", "leave_triton", "threads_for", "triton_for"]

C_EXPERTS = 4096  # at most: the rows of the C kernels lie on the stack
TRITON_EXPERTS = 1024
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Waking a second thread costs some ten microseconds: about the time of this many numbers.
NUMBERS_PER_THREAD = 100_000

_triton_failed = False


def c_for(values_TE: Tensor) -> ctypes.CDLL | None:
    """The C kernels, where they can read these rows; None where torch has to do the work."""
    if values_TE.dtype not in native.DTYPES or values_TE.shape[1] > C_EXPERTS:
        return None
    return c_on(values_TE.device) if values_TE.stride(1) == 1 or values_TE.shape[1] == 1 else None


def c_on(device: torch.device) -> ctypes.CDLL | None:
    """The C kernels, for what is on a CPU."""
    return native.load() if device.type == "cpu" else None


def threads_for(values: Tensor) -> int:
    """Threads that pay, at most as many as torch may use."""
    return max(1, min(torch.get_num_threads(), values.numel() // NUMBERS_PER_THREAD))


def triton_for(values_TE: Tensor) -> bool:
    """Whether the Triton kernels can read these rows. On a CPU, by Triton's interpreter, they run for tests only."""
    return (
        values_TE.is_cuda
        and not _triton_failed
        and values_TE.dtype in TRITON_DTYPES
        and values_TE.shape[1] <= TRITON_EXPERTS
        and importlib.util.find_spec("triton") is not None
    )


def leave_triton(error: Exception) -> None:
    """Leave everything to torch from now on in this process, and say why."""
    global _triton_failed
    _triton_failed = True
    warnings.warn(
        f"the GPU kernels of sinkroute cannot be used, torch does the work, more slowly: {error!r}. Triton needs a C "
        "compiler at run time and an NVIDIA GPU of compute capability 8.0 or newer",
        RuntimeWarning,
        stacklevel=3,
    )
