"""The opaque operations against the loop, finite differences and torch's own checks of operations."""

import pytest
import torch
from torch import library

from sinkroute.moe.linear import loop_linear, opaque_linear


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(*counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [(4, 0, 5), (0, 0, 9), (9, 0, 0), (1, 7, 1), (0, 0, 0)])
@pytest.mark.parametrize("sizes", [(16, 24), (7, 5)])  # what the kernel takes, and what it does not
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)],
)
def test_output_and_gradients_are_those_of_the_loop(dtype, tolerance, sizes, counts):
    results = []
    for linear in (opaque_linear, loop_linear):
        x_RD = random(sum(counts), sizes[0], dtype=dtype).requires_grad_()
        weight = random(3, sizes[1], sizes[0], seed=1, dtype=dtype).requires_grad_()
        y_RF = linear(x_RD, weight, ends(*counts))
        y_RF.backward(random(sum(counts), sizes[1], seed=2, dtype=dtype))
        results.append((y_RF, x_RD.grad, weight.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        scale = theirs.abs().max().item() if theirs.numel() else 1
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


def test_gradients_of_both_orders_are_those_of_finite_differences():
    x_RD, weight = random(6, 3).requires_grad_(), random(3, 2, 3, seed=1).requires_grad_()

    def output(x_RD, weight):
        return opaque_linear(x_RD, weight, ends(2, 0, 4))

    assert torch.autograd.gradcheck(output, (x_RD, weight))
    assert torch.autograd.gradgradcheck(output, (x_RD, weight))


@pytest.mark.parametrize("form", ["expanded", "transposed"])
def test_any_strides_are_taken(form):
    strided = {
        "expanded": lambda *shape: random(1, 1, dtype=torch.float32).expand(*shape),
        "transposed": lambda rows, columns: random(columns, rows, dtype=torch.float32).t(),
    }[form]
    results = []
    for linear in (opaque_linear, loop_linear):
        x_RD, weight = strided(9, 16).requires_grad_(), random(3, 24, 16, dtype=torch.float32).requires_grad_()
        y_RF = linear(x_RD, weight, ends(4, 0, 5))
        y_RF.backward(strided(9, 24))
        results.append((y_RF, x_RD.grad, weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ["expert_linear", "expert_outer"])
def test_torch_finds_nothing_wrong_with_the_operations(operation):
    second = {"expert_linear": random(3, 5, 7), "expert_outer": random(9, 5, seed=1)}[operation].requires_grad_()
    overload = getattr(torch.ops.sinkroute, operation).default
    library.opcheck(overload, (random(9, 7).requires_grad_(), second, ends(4, 0, 5)))
