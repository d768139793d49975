"""Low precision: under autocast and in cast models, experts compute in it, and routes are those of float32."""

import copy

import pytest
import torch
import torch.nn.functional as F

import sinkroute
from sinkroute.routing.registry import router_options

NEEDED = {"stable-moe": {"freeze_step": 100}, "smoe-dropout": {"training_k": 3}}
# Every router, and of the SSR family both branches.
CASES = [
    pytest.param(name, NEEDED.get(name, {}) | options, id=f"{name} {options or ''}")
    for name in sinkroute.list_routers()
    for options in ([{"probability": 0.0}, {"probability": 1.0}] if "probability" in router_options(name) else [{}])
]
every_router = pytest.mark.parametrize(("name", "options"), CASES)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make(name, options, **sizes):
    torch.manual_seed(0)
    layer = sinkroute.MoE(16, 24, 6, 2, name, shared_hidden=8, router_options=options, **sizes)
    if name == "noisy":
        torch.nn.init.normal_(layer.gate.weight)  # at first it is 0, and all logits are equal
    sinkroute.set_step(layer, 1)
    return layer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(100) % 37


def assert_same_routes(routes, expected):
    assert torch.equal(routes.experts, expected.experts) and torch.equal(routes.load, expected.load)
    assert routes.weights.dtype == torch.float32 and torch.equal(routes.weights, expected.weights)
    assert (routes.aux_loss is None) == (expected.aux_loss is None)
    if routes.aux_loss is not None:
        assert routes.aux_loss.dtype == torch.float32 and torch.equal(routes.aux_loss, expected.aux_loss)


@low_precision
@every_router
def test_autocast_leaves_the_routes_as_they_are(name, options, dtype):
    for training in (True, False):
        layer, x = make(name, options).train(training), random(100, 16)
        expected_y = layer(x, token_ids=IDS)
        expected = layer.routes
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x, token_ids=IDS)
        assert_same_routes(layer.routes, expected)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected_y, rtol=0.05, atol=0.05)


@low_precision
@every_router
def test_the_gate_of_a_model_in_low_precision_is_lifted(name, options, dtype):
    layer, x = make(name, options).to(dtype), random(100, 16).to(dtype)
    lifted = copy.deepcopy(layer).float()  # the same values
    for training in (True, False):
        y = layer.train(training)(x, token_ids=IDS)
        lifted.train(training)(x.float(), token_ids=IDS)
        assert_same_routes(layer.routes, lifted.routes)
        assert y.dtype == dtype


@low_precision
def test_a_gate_in_float32_under_autocast_sees_tokens_in_low_precision_as_they_are(dtype):
    layer, x = make("softmax", {}), random(100, 16).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        layer(x)
        routes = layer.routes
        # The test has teeth only if scores in low precision would have given other routes.
        assert not torch.equal(layer.router(F.linear(x, layer.gate.weight)).weights, routes.weights)
    assert_same_routes(routes, layer.router(F.linear(x.float(), layer.gate.weight)))


@low_precision
@pytest.mark.parametrize("gate_bias", [False, True])
def test_experts_with_biases_compute_in_the_dtype_of_autocast(dtype, gate_bias):
    layer, x = make("softmax", {}, bias=True, gate_bias=gate_bias), random(100, 16)
    for parameter in (layer.experts.b_in, layer.experts.b_out, layer.shared.b_out):
        torch.nn.init.normal_(parameter)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@low_precision
def test_sub_tokens_are_routed_in_float32(dtype):
    torch.manual_seed(0)
    layer, x = sinkroute.MultiHeadMoE(32, 2, 24, 6, 2, "softmax"), random(100, 32)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        parts = layer.split(x).view(200, 16)
    assert parts.dtype == y.dtype == dtype
    assert_same_routes(layer.routes, layer.moe.router(F.linear(parts.float(), layer.moe.gate.weight)))
