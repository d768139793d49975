"""Tokens shared by two processes: the gradient of the sum of their losses is that of one process with all tokens."""

import pytest
import torch
import torch.distributed as dist

from sinkroute.transport import solve

WORLD, TOKENS, EXPERTS = 2, 40, 5
MASK_T = torch.arange(TOKENS) < 30
# name: (rows of rank 0, options, what of a plan the loss looks at)
CASES = {
    "uneven, top-k": (13, {}, "topk"),
    "expert without mass": (20, {"expert_mass": [1.0, 0.0, 2.0, 1.0, 1.0]}, "matrix"),
    "token mass": (25, {"token_mass": torch.linspace(0.5, 2.0, TOKENS)}, "topk"),
    "rank without rows": (40, {}, "topk"),
    "masked rank": (30, {"token_mask": MASK_T}, "matrix"),
    "rank whose loss ignores the plan": (20, {}, "first rank only"),
}


def all_logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=generator)


def local_gradient(rows, options, output, group=None):
    """The gradient, in the logits of these rows, of the sum over the ranks of such losses of their rows."""
    logits_TE = all_logits()[rows].requires_grad_()
    options = {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    plan = solve(logits_TE, 0.3, tol=1e-11, differentiable=True, process_group=group, **options)
    weights_TE = torch.arange(float(TOKENS * EXPERTS)).sin().view(TOKENS, EXPERTS)[rows]
    if output == "matrix":
        loss = (plan.matrix() * weights_TE).sum()
    else:
        counted_TK = weights_TE[:, :2] * (output == "topk" or torch.arange(TOKENS)[rows, None] < 20)
        # With weights of 0 throughout, the loss still has to lead backward through the plan.
        loss = (plan.topk(2)[0] * counted_TK).sum()
    loss.backward()
    return logits_TE.grad


def gradients_on_rank():
    """{case: gradient of this rank's rows}."""
    first = dist.get_rank() == 0
    return {
        case: local_gradient(slice(0, split) if first else slice(split, None), options, what, dist.group.WORLD)
        for case, (split, options, what) in CASES.items()
    }


@pytest.fixture(scope="module")
def gradients(run_ranks):
    return run_ranks(gradients_on_rank, WORLD)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_the_sum_of_the_losses_is_that_of_one_process(gradients, case):
    split, options, output = CASES[case]
    expected_TE = local_gradient(slice(None), options, output)
    shards = [rank[case] for rank in gradients]
    assert [len(x) for x in shards] == [split, TOKENS - split]
    torch.testing.assert_close(torch.cat(shards), expected_TE, rtol=1e-8, atol=1e-10)
