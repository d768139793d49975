"""Many problems of every kind: no NaN, and no plan that says it is balanced and is not.

`pytest -m slow tests/transport/test_fuzz.py` runs the whole grid, more than 10,000 problems; otherwise a sample of it.
"""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkroute.transport import solve

KINDS = ["gaussian", "biased", "clusters", "one-hot", "identical", "heavy tails", "ties", "forbidden"]
SHAPES = [(1, 2), (2, 1), (3, 7), (8, 64), (33, 5), (64, 16), (200, 8), (600, 24)]
REGS = [1e-3, 1e-2, 0.1, 1.0, 10.0]
SCALES = [1e-3, 1.0, 30.0, 1e4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COSTS = ["linear", "softmax"]
GRID = list(itertools.product(KINDS, SHAPES, REGS, SCALES, DTYPES, COSTS))


def make_logits(kind, tokens, experts, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if kind == "biased":
        x_TE += 3 * torch.randn(experts, generator=generator, dtype=torch.float64)
    elif kind == "clusters":
        centres = 2 * torch.randn(5, experts, generator=generator, dtype=torch.float64)
        x_TE = centres[torch.randint(5, (tokens,), generator=generator)] + 0.05 * x_TE
    elif kind == "one-hot":
        x_TE = torch.nn.functional.one_hot(torch.randint(experts, (tokens,), generator=generator), experts).double()
    elif kind == "identical":
        x_TE = x_TE[:1].expand(tokens, experts)
    elif kind == "heavy tails":
        x_TE = x_TE / torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    elif kind == "ties":
        x_TE = x_TE.round()
    x_TE = (scale * x_TE).clamp(-6e4, 6e4)  # what float16 can hold
    if kind == "forbidden":
        allowed = torch.rand(tokens, experts, generator=generator) > 0.2
        allowed[torch.arange(tokens), torch.randint(experts, (tokens,), generator=generator)] = True
        x_TE = x_TE.masked_fill(~allowed, -math.inf)
    return x_TE.to(dtype)


def check(plan, mass_T=None, share_E=None):
    """The plan's own word against NumPy in float64."""
    tokens, experts = plan.logits.shape
    assert not plan.potentials.isnan().any() and plan.column_error.isfinite()
    matrix_TE = plan.matrix()
    assert matrix_TE.isfinite().all()
    torch.testing.assert_close(matrix_TE.sum(1), torch.ones(tokens).to(matrix_TE) if mass_T is None else mass_T)
    weights_TK, experts_TK = plan.topk(min(2, experts))
    assert weights_TK.isfinite().all() and experts_TK.min() >= 0 and experts_TK.max() < experts
    shifted_TE = (plan.cost.double().numpy() + plan.potentials.numpy()) / plan.reg
    p_TE = np.exp(shifted_TE - shifted_TE.max(1, keepdims=True))
    p_TE /= p_TE.sum(1, keepdims=True)
    mass = np.ones(tokens) if mass_T is None else mass_T.double().numpy()
    share = (
        np.full(experts, 1 / experts) if share_E is None else share_E.double().numpy() / share_E.double().sum().item()
    )
    used = share > 0
    true = np.abs((mass[:, None] * p_TE).sum(0)[used] / (mass.sum() * share[used]) - 1).max()
    told = plan.column_error.item()
    # Within a tenth, or a fiftieth of the tolerance. Float32 makes a softmax cost that is off by 6e-8 / reg besides.
    slack = 2e-5 + (3e-7 / plan.reg if plan.cost_name == "softmax" and plan.logits.dtype != torch.float64 else 0)
    assert abs(told - true) <= 0.1 * true + slack, (told, true)
    assert bool(plan.converged) == (told <= 1e-3)


@pytest.mark.parametrize("part", range(8))
def test_a_sample_of_the_grid(part):
    run(GRID[part::96])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_the_whole_grid(part):
    assert len(GRID) >= 10_000
    run(GRID[part::16])


def run(problems):
    for case in problems:
        kind, (tokens, experts), reg, scale, dtype, cost = case
        logits_TE = make_logits(kind, tokens, experts, scale, dtype, zlib.crc32(repr(case).encode()))
        plan = solve(logits_TE, reg, cost, tol=1e-3)
        try:
            check(plan)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 80),
    experts=st.integers(1, 20),
    reg=st.floats(1e-3, 10.0),
    scale=st.floats(1e-3, 1e4),
    dtype=st.sampled_from(DTYPES),
    cost=st.sampled_from(COSTS),
    seed=st.integers(0, 2**31),
    passes=st.sampled_from([None, 1, 4]),
    warm=st.booleans(),
)
def test_masses_masks_and_budgets_of_all_kinds(kind, tokens, experts, reg, scale, dtype, cost, seed, passes, warm):
    logits_TE = make_logits(kind, tokens, experts, scale, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    working = torch.promote_types(dtype, torch.float32)
    mask_T = torch.rand(tokens, generator=generator) > 0.2
    mass_T = torch.rand(tokens, generator=generator).to(working) + 0.1
    share_E = torch.rand(experts, generator=generator)
    share_E[torch.rand(experts, generator=generator) < 0.2] = 0
    share_E[0] = 1.0
    # A token whose only allowed experts have no mass cannot be placed: leave it out.
    placed_T = ((logits_TE > -math.inf) & (share_E > 0)).any(1)
    mask_T &= placed_T
    init = 10 * torch.randn(experts, generator=generator) if warm else None
    plan = solve(
        logits_TE,
        reg,
        cost,
        token_mask=mask_T,
        token_mass=mass_T,
        expert_mass=share_E,
        tol=1e-3,
        max_passes=passes,
        init=init,
    )
    if mask_T.any():
        check(plan, torch.where(mask_T, mass_T, 0), share_E)
        assert passes is None or plan.passes <= passes
