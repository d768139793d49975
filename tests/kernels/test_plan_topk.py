"""The top-k of a plan and of a choice: by every backend the same, in whatever layout."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sinkroute.kernels import native
from sinkroute.kernels import plan_topk as plan_topk_module
from sinkroute.kernels.choose import choose
from sinkroute.transport import solve
from sinkroute.transport.checks import make_problem

needs_compiler = pytest.mark.skipif(native.load() is None, reason=native.status())


def problem_of(logits_TE, cost="linear", mask_T=None, mass_T=None, reg=0.1):
    return make_problem(logits_TE, reg, cost, mask_T, mass_T, None, None)


def random_logits(tokens, experts, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, experts, generator=generator)).to(dtype)


@needs_compiler
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("cost", ["linear", "softmax"])
@pytest.mark.parametrize(("experts", "k"), [(3, 3), (16, 1), (50, 2), (64, 8)])
def test_compiled_topk_is_that_of_torch(monkeypatch, normalise, cost, experts, k):
    logits_TE = random_logits(2100, experts, seed=7)
    logits_TE[5, 1] = -math.inf
    mask_T = torch.arange(2100) % 6 != 0
    mass_T = torch.rand(2100, generator=torch.Generator().manual_seed(8))
    plan = solve(logits_TE, 0.1, cost, token_mask=mask_T, token_mass=mass_T)
    weights_TK, experts_TK = plan.topk(k, normalise)
    monkeypatch.setattr(plan_topk_module, "c_for", lambda logits: None)
    expected_TK, same_TK = plan.topk(k, normalise)
    # Float32 may swap experts that are as good as tied, and masked rows may hold any.
    assert (experts_TK == same_TK)[mask_T].float().mean() > 0.999
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-4, atol=1e-6)
    assert experts_TK.min() >= 0 and experts_TK.max() < experts
    assert (experts_TK.sort(1).values.diff(dim=1) > 0).all()


@needs_compiler
def test_compiled_topk_breaks_ties_by_the_lower_expert_and_takes_forbidden_ones_last():
    plan = solve(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, 0.0]]), expert_mass=[1, 1, 1, 1])
    _, experts_TK = solve(torch.zeros(3, 4)).topk(2)
    assert experts_TK.tolist() == [[0, 1]] * 3
    weights_TK, experts_TK = plan.topk(4)
    assert set(experts_TK[1, :2].tolist()) == {0, 3} and weights_TK[1, 2:].tolist() == [0, 0]


def layouts(logits_TE):
    """The same logits, as they may lie in memory."""
    experts = logits_TE.shape[1]
    yield logits_TE
    yield logits_TE.t().contiguous().t()
    yield torch.cat([logits_TE, logits_TE], dim=1)[:, :experts]
    yield logits_TE.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "rounded", "bfloat16"])
def test_of_equal_values_the_lower_expert_comes_first_on_every_path(monkeypatch, kind, dtype, compiled):
    logits_TE = {
        "zero": torch.zeros(300, 12),
        "rounded": random_logits(300, 12).round(),
        "bfloat16": random_logits(300, 12).bfloat16().float(),
    }[kind].to(dtype)
    mask_T = torch.arange(300) % 7 != 0
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    plan = solve(logits_TE, 0.5, token_mask=mask_T, max_passes=3)
    # The potentials rounded too, so that sums are equal often.
    potentials_E = (8 * plan.potentials).round() / 8
    best_TK = np.argsort(-(logits_TE.double() + potentials_E).numpy(), axis=1, kind="stable")[:, :4]
    best_TK[~mask_T.numpy()] = range(4)
    for same_TE in layouts(logits_TE):
        again = replace(plan, logits=same_TE, potentials=potentials_E)
        assert (again.topk(4)[1].numpy() == best_TK).all()
        problem = problem_of(same_TE, mask_T=mask_T)
        target_E = 4 * problem.target_E
        assert (choose(problem, 4, potentials_E, target_E).experts_TK.numpy() == best_TK).all()


@needs_compiler
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_where_logits_lie_in_memory_does_not_change_the_experts_of_a_plan(size):
    logits_TE = size + random_logits(2000, 24)
    plan = solve(logits_TE, 1e-3, max_passes=20)
    for same_TE in layouts(logits_TE):
        assert torch.equal(replace(plan, logits=same_TE).topk(24)[1], plan.topk(24)[1])
