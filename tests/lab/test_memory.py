"""Peak memory of a stretch of work, and memory that is kept for the next step."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
import torch

from sinkroute.lab.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory


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


STEPS = """
import resource
import torch
from sinkroute.lab.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory

def step():  # tensors that are born and die as in a training step; 64 MB each is above glibc's highest own threshold
    parts = [torch.ones(2**24) for _ in range(3)]
    return sum(part[-1].item() for part in parts)

kept = {keep} and keep_freed_memory()
for _ in range(12):  # until the freed blocks have found their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
reset_peak_memory()
print(kept, faults, peak_memory_mb())
"""


def of_steps(keep: bool, **environment: str) -> tuple[bool, int, float]:
    """Whether memory is kept, the pages that four steps had to fetch, and the MiB that are held after them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep)],
        env=clean | environment, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.split()  # fmt: skip
    return words[0] == "True", int(words[1]), float(words[2])


def test_a_step_finds_the_pages_of_the_one_before_and_a_new_stretch_forgets_them() -> None:
    kept, faults, held = of_steps(True)
    if not kept:
        pytest.skip("another allocator than glibc's")
    _, other_faults, other_held = of_steps(False)
    assert faults < 0.1 * other_faults, (faults, other_faults)
    assert abs(held - other_held) < 60, (held, other_held)  # 192 MiB were freed


def test_what_the_environment_asks_of_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
