"""Peak memory of a stretch of work."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is measured without a GPU")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot forget a peak")
def test_a_peak_is_seen_and_forgotten_at_the_reset() -> None:
    reset_peak_memory()
    before = peak_memory_mb()
    block = mmap.mmap(-1, 80 * 2**20)  # not from the allocator, which may have as much at hand from tests before
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert before + 70 < peak_memory_mb() < before + 120
    block.close()
    reset_peak_memory()
    assert peak_memory_mb() < before + 40
