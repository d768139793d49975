"""Tokens shared by two processes: the plan is that of one process which holds them all."""

import pytest
import torch
import torch.distributed as dist

from sinkroute.transport import list_solvers, solve

WORLD = 2
TOL = 1e-6
# (rows of rank 0, options): uneven shards, a rank with no rows at all, and a rank whose rows are all masked.
CASES = {
    "uneven": (13, {}),
    "mass": (20, {"expert_mass": [1.0, 0.0, 2.0, 1.0, 1.0]}),
    "token mass": (20, {"token_mass": torch.arange(40) % 3}),
    "empty rank": (40, {}),
    "masked rank": (30, {"token_mask": torch.arange(40) < 30}),
    "no tokens": (20, {"token_mask": torch.zeros(40, dtype=torch.bool)}),
}


# What one rank refuses by itself: how it differs from arguments that are right.
REFUSED = {
    "no logits": lambda logits_TE: {"logits_TE": None},
    "integers": lambda logits_TE: {"logits_TE": logits_TE.long()},
    "a batch": lambda logits_TE: {"logits_TE": logits_TE[None]},
    "no experts": lambda logits_TE: {"logits_TE": logits_TE[:, :0]},
    "a masked tensor": lambda logits_TE: {"logits_TE": torch.masked.masked_tensor(logits_TE, logits_TE > 0)},
    "no numbers": lambda logits_TE: {"logits_TE": logits_TE.to("meta")},
    "a mask of another size": lambda logits_TE: {"token_mask": torch.ones(1, dtype=torch.bool)},
    "a mask of numbers": lambda logits_TE: {"token_mask": torch.ones(len(logits_TE))},
    "a negative mass": lambda logits_TE: {"token_mass": torch.full((len(logits_TE),), -1.0)},
    "a NaN mass": lambda logits_TE: {"token_mass": torch.full((len(logits_TE),), torch.nan)},
    "capacities of another size": lambda logits_TE: {"expert_mass": [1.0]},
    "a start of another size": lambda logits_TE: {"init": torch.zeros(1)},
    "another method": lambda logits_TE: {"method": "guess"},
    "another cost": lambda logits_TE: {"cost": "squared"},
    "no xi": lambda logits_TE: {"reg": 0.0},
    "no tolerance": lambda logits_TE: {"tol": "small"},
    "no passes": lambda logits_TE: {"max_passes": 0},
}


def all_logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=generator) + torch.randn(5, generator=generator)


def shard(rank, split, options):
    rows = slice(0, split) if rank == 0 else slice(split, None)
    per_token = {name: x[rows] for name, x in options.items() if name.startswith("token_")}
    return all_logits()[rows], options | per_token


def solve_on_rank():
    """{(case, method): (potentials, column error, passes, local rows)}."""
    rank, results = dist.get_rank(), {}
    for case, (split, options) in CASES.items():
        for method in list_solvers():
            logits_TE, local_options = shard(rank, split, options)
            plan = solve(logits_TE, 0.5, method=method, tol=TOL, process_group=dist.group.WORLD, **local_options)
            results[case, method] = (plan.potentials, plan.column_error, plan.passes, plan.matrix())
    bad_TE = torch.full((3, 5), float("nan") if rank else 0.0)
    for method in list_solvers():
        try:
            solve(bad_TE, 0.5, method=method, process_group=dist.group.WORLD)
        except ValueError as error:
            results["bad", method] = str(error)
    for case, change in REFUSED.items():
        logits_TE = all_logits()[:5]
        changed = change(logits_TE) if rank else {}
        try:
            solve(**{"logits_TE": logits_TE, "process_group": dist.group.WORLD} | changed)
        except (TypeError, ValueError) as error:
            results[case] = str(error)
    after = solve(all_logits()[:5], process_group=dist.group.WORLD)
    results["after"] = bool(after.converged)
    return results


@pytest.fixture(scope="module")
def results(run_ranks):
    return run_ranks(solve_on_rank, WORLD)


@pytest.mark.parametrize("method", list_solvers())
@pytest.mark.parametrize("case", CASES)
def test_sharded_tokens_give_the_plan_of_one_process(results, case, method):
    alone = solve(all_logits(), 0.5, method=method, tol=TOL, **CASES[case][1])
    (potentials_E, error, passes, rows), (other_E, other_error, other_passes, other_rows) = (
        result[case, method] for result in results
    )
    assert torch.equal(potentials_E, other_E) and error == other_error and passes == other_passes
    torch.testing.assert_close(potentials_E, alone.potentials, rtol=1e-4, atol=1e-5)
    assert error <= TOL and alone.column_error <= TOL
    torch.testing.assert_close(torch.cat([rows, other_rows]), alone.matrix(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", list_solvers())
def test_bad_logits_on_one_rank_are_an_error_on_all(results, method):
    assert "another rank" in results[0]["bad", method] and "logits_TE[0, 0] is nan" in results[1]["bad", method]


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_is_an_error_on_all_at_once(results, case):
    assert "another rank refused its arguments" in results[0][case]
    assert "another rank" not in results[1][case]


def test_ranks_go_on_together_after_refusals(results):
    assert results[0]["after"] and results[1]["after"]
