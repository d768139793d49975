"""The layer under `torch.func`: gradients, vectorised, of each example; forward mode is refused by name."""

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import sinkroute

D, E, K = 16, 4, 2
KINDS = {
    "gated": {"activation": "swiglu"},
    "biases": {"activation": "gelu", "bias": True, "shared_hidden": 8},
    "a loop over the experts": {"activation": "swiglu", "d_hidden": 15},
}


def make(router="softmax", *, d_hidden=16, **options):
    torch.manual_seed(0)
    return sinkroute.MoE(D, d_hidden, E, K, router, **options)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def loss_of(layer, mask=None):
    ids = torch.arange(5)
    return lambda p, x: functional_call(layer, p, (x, mask), {"token_ids": ids}).square().sum()


def all_close(found, wanted):
    return all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, True, False, True, True])])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_gives_what_backward_gives(kind, mask):
    layer, x = make(**KINDS[kind]), random(5, D)
    layer(x, mask).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters()}
    assert all_close(grad(loss_of(layer, mask))(dict(layer.named_parameters()), x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_gives_the_result_of_each_example(kind):
    layer, x = make(**KINDS[kind]), random(3, 5, D)
    assert torch.allclose(vmap(layer)(x), torch.stack([layer(part) for part in x]), atol=1e-5)


@pytest.mark.parametrize(
    ("router", "kind"), [*(("softmax", kind) for kind in KINDS), ("ssr-s", "gated"), ("hash", "gated")]
)
def test_vmap_of_grad_gives_the_gradient_of_each_example(router, kind):
    layer, x = make(router, **KINDS[kind]), random(3, 5, D)
    parameters, gradient = dict(layer.named_parameters()), grad(loss_of(layer))
    each = [gradient(parameters, part) for part in x]
    wanted = {name: torch.stack([one[name] for one in each]) for name in parameters}
    assert all_close(vmap(gradient, (None, 0))(parameters, x), wanted)


def test_grad_of_grad_of_each_example_is_that_of_each_by_itself():
    layer, x = make(), random(3, 5, D)
    twice = grad(lambda y: grad(lambda z: layer(z).square().sum())(y).square().sum())
    assert torch.allclose(vmap(twice)(x), torch.stack([twice(part) for part in x]), rtol=1e-3, atol=1e-3)


def test_jacrev_is_the_jacobian():
    layer, x = make(), random(5, D)
    wanted = torch.autograd.functional.jacobian(layer, x)
    assert torch.allclose(jacrev(layer)(x), wanted, atol=1e-5)


def test_noise_is_drawn_under_grad_by_a_layer_that_was_told_no_step():
    layer, x = make("ssr-s", router_options={"probability": 0.0, "noise": 0.5}), random(5, D)
    assert grad(lambda y: layer(y).square().sum())(x).isfinite().all()


@pytest.mark.parametrize("kind", ["MoE", "MultiHeadMoE"])
def test_forward_mode_is_refused_by_name(kind):
    layer = make() if kind == "MoE" else sinkroute.MultiHeadMoE(D, 2, 16, E, K, "softmax")
    x = random(5, D)
    with pytest.raises(NotImplementedError, match=r"x carries a tangent .*take torch\.func\.vjp or jacrev"):
        jvp(layer, (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"x carries a tangent"):
        jacfwd(layer)(x)


@pytest.mark.parametrize("name", ["w_in", "w_out", "b_in", "b_out"])
def test_forward_mode_of_the_experts_weights_is_refused_by_name(name):
    layer = make(bias=True)
    weight = getattr(layer.experts, name).detach()
    with pytest.raises(NotImplementedError, match=rf"{name} carries a tangent"):
        jvp(lambda w: functional_call(layer, {f"experts.{name}": w}, (random(5, D),)), (weight,), (weight,))
