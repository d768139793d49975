"""The repair of `balanced_topk`: it ends, whatever it is given, and gives way to interrupts in between."""

import os
import shlex
import subprocess
import sys

import pytest

from sinkroute.kernels import native

# Kernels that return to Python after every round, as they do on problems of many millions of logits.
_CODE = """
import math, torch
from sinkroute.kernels import native
from sinkroute.transport import balanced, search
assert native.load() is not None, native.status()
search.PASSES = 1
"""


def _run(code, tmp_path):
    compiler = f"{shlex.join(native.build.compiler())} -DWORK=64"
    environment = os.environ | {
        "CC": compiler,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", _CODE + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_a_repair_that_takes_many_calls_ends_as_one_in_a_single_call_does(tmp_path):
    code = """
for seed in range(12):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(90, 16, generator=generator) + 2 * torch.randn(16, generator=generator)
    sums = []
    for load in (native.load, lambda: None):
        native.load, there = load, native.load
        experts_TK, _ = balanced.balanced_topk(logits_TE, 3, tol=0, init=torch.zeros(16))
        native.load = there
        assert set(experts_TK.flatten().bincount(minlength=16).tolist()) <= {16, 17}
        sums.append(float(logits_TE.double().gather(1, experts_TK).sum()))
    assert abs(sums[0] - sums[1]) < 1e-5, (seed, sums)

# No assignment has the loads: half of the experts are forbidden to all.
logits_TE = torch.randn(64, 16)
logits_TE[:, 8:] = -math.inf
try:
    balanced.balanced_topk(logits_TE, 2)
except ValueError as error:
    print(error)
"""
    assert "cannot be kept" in _run(code, tmp_path)
