"""The memory that a call needs on top of what there is: its tensors' peak.

On a CPU every tensor's birth and death is counted as torch's allocator reports it to its profiler, which is exact at
any size; resident memory is in pages, and hides what the allocator had kept. What is not torch's (the solver's few
vectors of E numbers) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import ProfilerConfig, ProfilerState

__all__ = ["extra_memory_mb"]


def extra_memory_mb(call: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak within `call`, above what is held before it.

    >>> extra_memory_mb(lambda: torch.ones(2**20).exp().exp(), torch.device("cpu"))
    8.0
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    held = peak = 0
    for change in _changes(call):
        held += change
        peak = max(peak, held)
    return peak / 2**20


def _changes(call: Callable[[], object]) -> list[int]:
    """Bytes of each allocation in `call`, negative where memory is freed, in order."""
    # torch.profiler's own events are sums over operations, without what is born and dies within one; and it talks.
    options = torch._C._profiler._ExperimentalConfig()
    torch._C._autograd._enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, options)
    )
    try:
        call()
    finally:
        threads = torch._C._autograd._disable_profiler_legacy()
    return [event.cpu_memory_usage() for events in threads for event in events if event.kind() == "memory_alloc"]
