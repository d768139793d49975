"""The whole solve on a GPU: on one if there is one, else by Triton's interpreter, against the solve by NumPy."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sinkroute.transport import solve as solve_anywhere
from sinkroute.transport.checks import make_problem
from sinkroute.transport.dual import dual
from sinkroute.transport.problem import Problem, Solution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton is imported already, without TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from sinkroute.kernels import backend  # noqa: E402, the interpreter first
from sinkroute.kernels import search as search_module  # noqa: E402
from sinkroute.kernels.gpu import launch as gpu  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def problem(logits_TE: Tensor, reg: float, cost: str = "linear", **arguments: object) -> Problem:
    options = {"token_mask": None, "token_mass": None, "expert_mass": None, "reduce": None, **arguments}
    return make_problem(logits_TE, reg, cost, **options)  # type: ignore[arg-type]


def solve(problem: Problem, tol: float = 1e-4, max_passes: int | None = None, init_E: Tensor | None = None) -> Solution:
    asked = problem.target_E, problem.positive_E, problem.reg
    return Solution(*gpu.search(problem, *asked, tol=tol, max_passes=max_passes, init_E=init_E, reduce=problem.reduce))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def on_host(problem: Problem, tol: float = 1e-4, max_passes: int | None = None) -> Solution:
    """The same problem by NumPy, on float64 logits."""
    moved = {
        name: None if value is None else value.cpu()
        for name in ("token_mask", "token_mass", "target_E", "positive_E")
        for value in [getattr(problem, name)]
    }
    wide = replace(problem, logits_TE=problem.logits_TE.double().cpu(), **moved)
    return dual(wide, tol=tol, max_passes=max_passes, init_E=None)


def error_of(problem: Problem, potentials_E: Tensor) -> float:
    """The column error at these potentials, in float64 from the start."""
    wide = replace(problem, logits_TE=problem.logits_TE.double())
    plan_TE = ((wide.cost_TE() + potentials_E) / problem.reg).softmax(dim=1)
    if problem.token_mass is not None:
        plan_TE *= problem.token_mass[:, None]
    elif problem.token_mask is not None:
        plan_TE *= problem.token_mask[:, None]
    off_E = plan_TE.sum(dim=0) / problem.target_E - 1
    return float(off_E[problem.positive_E].abs().max())


def check(problem: Problem, found: Solution, tol: float = 1e-4) -> None:
    """Converged, honest, centred, and where the host's solution is."""
    assert float(found.column_error) <= tol
    assert error_of(problem, found.potentials_E) == pytest.approx(float(found.column_error), abs=0.02 * tol + 1e-6)
    positive_E = problem.positive_E
    assert (found.potentials_E[~positive_E] == -torch.inf).all()
    scale = 1 + float(found.potentials_E[positive_E].abs().max())
    assert abs(float(found.potentials_E[positive_E].mean())) < 1e-9 * scale
    expected = on_host(problem, tol / 10)
    apart_E = (found.potentials_E.cpu() - expected.potentials_E)[positive_E.cpu()].abs()
    assert float(apart_E.max()) < 100 * tol * problem.reg


@pytest.mark.parametrize("bias", [0.0, 3.0])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
def test_the_same_solution_as_on_the_host_in_as_many_passes(reg: float, cost: str, bias: float) -> None:
    asked = problem(gaussian(700, 12) + bias * gaussian(12, seed=1), reg, cost)
    found = solve(asked)
    check(asked, found)
    assert abs(int(found.passes) - int(on_host(asked).passes)) <= 3


def clustered() -> Tensor:
    """Five kinds of tokens, far apart in units of a small ξ: the passes from the guesses lead nowhere."""
    return gaussian(5, 8).repeat_interleave(60, dim=0) + 1e-3 * gaussian(300, 8, seed=1)


@pytest.mark.parametrize("limit", [1, 3, 5, 8, 16, 22])
@pytest.mark.parametrize("kind", ["rows of all sizes", "far from balance"])
def test_the_same_points_as_on_the_host(kind: str, limit: int) -> None:
    # With so few tokens the sample is all of them, here and there, and there is no rounding to speak of.
    if kind == "far from balance":
        logits_TE = gaussian(400, 2, seed=1).double() @ gaussian(2, 24, seed=2).double()
    else:
        logits_TE = gaussian(400, 12).double() * gaussian(400, 1, seed=1).double().exp()
    asked = problem(logits_TE, 0.02)
    found, expected = solve(asked, 1e-13, limit), on_host(asked, 1e-13, limit)
    assert int(found.passes) == int(expected.passes)
    assert float(found.column_error) == pytest.approx(float(expected.column_error), rel=1e-3)
    torch.testing.assert_close(found.potentials_E.cpu(), expected.potentials_E, rtol=1e-4, atol=1e-6)


def test_the_same_annealing_as_on_the_host() -> None:
    asked = problem(clustered().double(), 0.003)
    for limit in (20, 50, 120):
        found, expected = solve(asked, 1e-4, limit), on_host(asked, 1e-4, limit)
        assert int(found.passes) == int(expected.passes)
        torch.testing.assert_close(found.potentials_E.cpu(), expected.potentials_E, rtol=1e-4, atol=1e-6)
    assert 50 < int(found.passes) < 120
    check(asked, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    asked = problem(gaussian(300, 6).to(dtype), 0.2)
    check(asked, solve(asked))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (3, 1), (1, 4), (5, 7), (9, 40), (50, 2), (90, 100)])
def test_few_tokens_and_few_experts(tokens: int, experts: int) -> None:
    asked = problem(gaussian(tokens, experts), 1.0)
    check(asked, solve(asked))


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_small_limit_is_kept_and_what_it_gives_is_honest(limit: int) -> None:
    asked = problem(gaussian(200, 16), 0.05)
    found = solve(asked, tol=1e-9, max_passes=limit)
    assert 1 <= int(found.passes) <= limit
    assert float(found.column_error) == pytest.approx(error_of(asked, found.potentials_E), rel=1e-4)


def test_masks_masses_and_experts_without_mass() -> None:
    logits_TE, mask = gaussian(300, 8), gaussian(300, seed=1) > -0.5
    logits_TE[~mask] = torch.nan
    expert_mass = torch.tensor([1.0, 2, 0, 4, 1, 0.5, 0, 3], device=DEVICE)
    for mass_T in (None, gaussian(300, seed=2).abs()):
        asked = problem(logits_TE, 0.3, token_mask=mask, token_mass=mass_T, expert_mass=expert_mass)
        check(asked, solve(asked))


def test_forbidden_experts() -> None:
    logits_TE = gaussian(400, 8)
    logits_TE[gaussian(400, 8, seed=1) > 1] = -torch.inf
    logits_TE[:, 0] = gaussian(400, seed=2)
    for cost in ("linear", "softmax"):
        asked = problem(logits_TE, 0.3, cost)
        check(asked, solve(asked))


def test_no_token_that_counts_gives_zeros() -> None:
    logits_TE = torch.full((20, 4), torch.nan, device=DEVICE)
    asked = problem(logits_TE, 0.3, token_mask=torch.zeros(20, dtype=torch.bool, device=DEVICE))
    found = solve(asked)
    assert found.potentials_E.tolist() == [0.0] * 4
    assert float(found.column_error) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_bad_logits_do_not_converge(bad: float | None) -> None:
    logits_TE = gaussian(100, 5)
    logits_TE[70] = -torch.inf if bad is None else bad
    found = solve(problem(logits_TE, 0.3))
    assert not bool(found.column_error <= 1e-4)
    assert found.potentials_E.isfinite().all()


def test_a_good_start_saves_passes_and_a_bad_one_costs_few() -> None:
    asked = problem(gaussian(700, 12), 0.1)
    cold = solve(asked)
    warm = solve(asked, init_E=cold.potentials_E + 5)
    check(asked, warm)
    # One, and two over a sample of half of the rows.
    assert int(warm.passes) == 2
    lost = solve(asked, init_E=100 * gaussian(12, seed=3).double())
    check(asked, lost)
    assert int(lost.passes) == int(cold.passes) + 1


def test_only_logits_on_a_gpu_are_served() -> None:
    assert not backend.triton_for(gaussian(4, 2).cpu())
    assert backend.triton_for(gaussian(4, 2)) == (DEVICE == "cuda")
    assert not backend.triton_for(gaussian(2, 1025))


def test_the_same_bits_at_every_run() -> None:
    asked = problem(gaussian(300, 12), 0.05)
    one, other = solve(asked), solve(asked)
    assert torch.equal(one.potentials_E, other.potentials_E) and torch.equal(one.column_error, other.column_error)


def test_sums_go_over_the_ranks() -> None:
    # Two ranks with the same tokens are one problem with all of them twice.
    logits_TE = gaussian(300, 8)
    asked = problem(logits_TE, 0.1, reduce=lambda x: 2 * x)
    found = solve(asked)
    check(problem(logits_TE.repeat(2, 1), 0.1), found)


@pytest.mark.parametrize("limit", [3, 20, 120])
def test_over_ranks_the_calls_end_soon_after_the_search_with_the_same_solution(limit: int) -> None:
    calls: list[int] = []
    asked = problem(gaussian(300, 6), 0.1, reduce=lambda x: calls.append(x.numel()) or x)
    calls.clear()  # that of the total
    found, alone = solve(asked, max_passes=limit), solve(problem(gaussian(300, 6), 0.1), max_passes=limit)
    assert torch.equal(found.potentials_E, alone.potentials_E) and int(found.passes) == int(alone.passes)
    # One for the start, two passes over the sample, and then up to a multiple of 4.
    assert len(calls) == 1 + 2 + min(limit - 2, 4 * math.ceil((int(found.passes) - 2) / 4))


def test_ranks_with_different_numbers_of_tokens_reduce_equally_often() -> None:
    calls = []
    for tokens in (0, 5, 2000):
        counted: list[tuple[int, ...]] = []
        asked = problem(gaussian(tokens, 4), 0.1, reduce=lambda x, seen=counted: seen.append(tuple(x.shape)) or x)
        solve(asked)
        calls.append(counted[: 1 + 2 + 4])  # each is alone here, and when the host looks it may be done
    assert calls[0] == calls[1] == calls[2]


def test_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the host read a number from the device")

    asked = problem(gaussian(300, 8), 0.1, token_mask=gaussian(300, seed=1) > 0)
    init_E = gaussian(8).double()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        found = solve(asked, init_E=init_E)
    assert found.passes.shape == found.column_error.shape == ()
    check(asked, found)


# Runs what launches the kernels, and instead of a launch compiles the kernel as that launch would.
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from sinkroute.kernels.gpu.launch import search
from sinkroute.kernels.gpu.fused import fused_topk
from sinkroute.kernels.rows import Rows
from sinkroute.transport.checks import make_problem

compiled = set()

def compile(self, *args, grid, warmup, num_warps, **kwargs):
    values = dict(zip(self.arg_names, args)) | kwargs
    signature, constants = {}, {}
    for number, param in enumerate(self.params):
        value = values[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name], constants[(number,)] = "constexpr", value
        else:
            signature[param.name] = param.annotation_type or mangle_type(value)
    key = self.fn.__name__, str(signature), str(constants)
    if key not in compiled:
        compiled.add(key)
        triton.compile(ASTSource(self, signature, constants), GPUTarget("cuda", 90, 32), {"num_warps": num_warps})

JITFunction.run = compile
logits_TE, mask = torch.randn(3000, 128, dtype=torch.bfloat16), torch.ones(3000, dtype=torch.bool)
def solve(problem, **options):
    search(problem, problem.target_E, problem.positive_E, problem.reg, tol=1e-4, reduce=problem.reduce, **options)

solve(make_problem(logits_TE, 0.1, "linear", mask), max_passes=2, init_E=None)
# Every size 1, and all that may be given given.
ones_T, zeros_E = torch.ones(1), torch.zeros(1, dtype=torch.float64)
single = make_problem(torch.randn(1, 1), 0.1, "softmax", None, ones_T, None, lambda x: x)
solve(single, max_passes=3, init_E=zeros_E)
fused_topk(Rows(logits_TE, "softmax", mask, None), torch.zeros(128).double(), 0.1, 4, True)
print(*sorted({name for name, *_ in compiled}))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="all tests here compile for this GPU")
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["_column_sums", "_topk", "begin", "guess", "step"]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_holds_the_solve(dtype: torch.dtype) -> None:
    logits_TE = gaussian(8192, 128).to(dtype)
    solve(problem(logits_TE, 0.1))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(problem(logits_TE, 0.1))
    for seed in (1, 2):
        logits_TE.copy_(gaussian(8192, 128, seed=seed) + gaussian(128, seed=seed + 1))
        graph.replay()
        check(problem(logits_TE, 0.1), found)


@needs_gpu
def test_the_driver_sees_no_wait() -> None:
    asked = problem(gaussian(8192, 64), 0.1)
    solve(asked)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = solve(asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(asked, found)


@needs_gpu
@pytest.mark.parametrize(("tokens", "experts"), [(65536, 128), (65536, 8), (4096, 1024), (100_001, 100)])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
def test_full_sizes(tokens: int, experts: int, cost: str) -> None:
    asked = problem(gaussian(tokens, experts), 0.1, cost)
    check(asked, solve(asked))


def test_without_a_working_triton_torch_does_the_work_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = gaussian(60, 4)
    expected = solve_anywhere(logits_TE, tol=1e-6)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(backend, "_triton_failed", False)
    monkeypatch.setattr(search_module, "triton_for", lambda logits_TE: True)
    monkeypatch.setattr(gpu, "search", fail)
    with pytest.warns(RuntimeWarning, match="torch does the work.*no C compiler"):
        plan = solve_anywhere(logits_TE, tol=1e-6)
    assert plan.converged and backend._triton_failed
    torch.testing.assert_close(plan.matrix(), expected.matrix())
