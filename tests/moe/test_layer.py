"""The layer against a slow loop over tokens, against transformers, and under everything users do to layers."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import sinkroute
from sinkroute.moe import experts as experts_module
from sinkroute.routing.registry import RECOMMENDED, router_class

D, HIDDEN, EXPERTS = 20, 12, 5


def make(d_model=D, d_hidden=HIDDEN, experts=EXPERTS, top_k=2, router="softmax", dtype=torch.float32, **options):
    torch.manual_seed(0)
    return sinkroute.MoE(d_model, d_hidden, experts, top_k, router, **options).to(dtype)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(layer):
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.requires_grad}


# -- the reference ---------------------------------------------------------------------------------------------------

PLAIN_ACTIVATIONS = {
    "swiglu": lambda hidden: (lambda gate, up: gate / (1 + torch.exp(-gate)) * up)(*hidden.chunk(2)),
    "gelu": lambda hidden: hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)),
    "relu": lambda hidden: hidden.clamp(min=0),
}


def one_token(x_D, weights, activation, top_k, normalise):
    """Σ_k weight_k · expert_k(x) for one token, by the textbook."""
    scores_E = weights["gate.weight"] @ x_D
    chosen = sorted(range(len(scores_E)), key=lambda expert: -scores_E[expert].item())[:top_k]
    probability_E = torch.exp(scores_E) / torch.exp(scores_E).sum()
    total = sum(probability_E[expert] for expert in chosen) if normalise else 1
    function = PLAIN_ACTIVATIONS[activation]
    y_D = torch.zeros_like(x_D)
    for expert in chosen:
        hidden = function(weights["experts.w_in"][expert] @ x_D)
        y_D = y_D + probability_E[expert] / total * (weights["experts.w_out"][expert] @ hidden)
    if "shared.w_in" in weights:
        y_D = y_D + weights["shared.w_out"][0] @ function(weights["shared.w_in"][0] @ x_D)
    return y_D


def by_a_loop(layer, x_TD, gradient_TD, activation, top_k, normalise):
    """Output, gradient of x and gradients of all weights, in float64, token by token."""
    weights = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x_TD = x_TD.detach().double().requires_grad_()
    y_TD = torch.stack([one_token(x_D, weights, activation, top_k, normalise) for x_D in x_TD])
    y_TD.backward(gradient_TD.double())
    return y_TD.detach(), x_TD.grad, {name: value.grad for name, value in weights.items()}


def by_the_layer(layer, x, gradient):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, gradients(layer)


def assert_same(results, expected, **tolerance):
    (y, x_gradient, weight_gradients), (their_y, their_x_gradient, their_weight_gradients) = results, expected
    torch.testing.assert_close(y, their_y, **tolerance)
    torch.testing.assert_close(x_gradient, their_x_gradient, **tolerance)
    assert weight_gradients.keys() == their_weight_gradients.keys()
    for name, gradient in weight_gradients.items():
        torch.testing.assert_close(
            gradient, their_weight_gradients[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shared_hidden", [None, 3])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_output_and_all_gradients_are_those_of_a_loop_over_tokens(activation, top_k, shared_hidden):
    layer = make(7, 5, 4, top_k, activation=activation, shared_hidden=shared_hidden, dtype=torch.float64)
    x_TD, gradient_TD = random(13, 7, dtype=torch.float64), random(13, 7, seed=1, dtype=torch.float64)
    expected = by_a_loop(layer, x_TD, gradient_TD, activation, top_k, normalise=top_k > 1)
    assert_same(by_the_layer(layer, x_TD, gradient_TD), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_grouped_kernel_in_float32_is_near_the_loop_over_tokens(monkeypatch, activation):
    calls = []
    grouped = experts_module.grouped_linear
    monkeypatch.setattr(experts_module, "grouped_linear", lambda *args: (calls.append(1), grouped(*args))[1])
    layer = make(activation=activation, shared_hidden=8)
    x_TD, gradient_TD = random(33, D), random(33, D, seed=1)
    expected = by_a_loop(layer, x_TD, gradient_TD, activation, 2, normalise=True)
    results = by_the_layer(layer, x_TD, gradient_TD)
    assert len(calls) == 4  # two for the experts, two for the shared one
    assert_same(
        results,
        (expected[0].float(), expected[1].float(), {n: g.float() for n, g in expected[2].items()}),
        rtol=1e-4,
        atol=1e-5,
    )


def test_loop_and_grouped_kernel_agree(monkeypatch):
    layer, x, gradient = make(shared_hidden=8), random(3, 11, D), random(3, 11, D, seed=1)
    results = by_the_layer(layer, x, gradient)
    monkeypatch.setattr(experts_module, "can_group", lambda *_: False)
    assert_same(results, by_the_layer(layer, x, gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router_options", [{"plan_gradient": "full", "tol": 1e-12}, {"plan_gradient": "weights"}])
def test_the_layer_passes_gradcheck(router_options):
    # "weights" ignores how the potentials move with x: it must pass on the softmax branch only.
    options = {"probability": float("tol" in router_options), "noise": 1.0, "reg": 0.5} | router_options
    layer = make(3, 2, 3, 2, "ssr-s", dtype=torch.float64, router_options=options)
    sinkroute.set_step(layer, 1)
    x = random(4, 3, dtype=torch.float64).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shape", [(2, 7), (14,)])
def test_output_and_gradients_are_those_of_mixtral(shape, top_k):
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    theirs, layer = MixtralSparseMoeBlock(config), make(16, 24, 4, top_k, router_options={"norm_topk": True})
    pairs = {
        "gate.weight": theirs.gate.weight,
        "experts.w_in": theirs.experts.gate_up_proj,
        "experts.w_out": theirs.experts.down_proj,
    }
    for name, parameter in pairs.items():
        parameter.data = layer.get_parameter(name).data.clone()
    x, gradient = random(*shape, 16), random(*shape, 16, seed=1)
    their_x = x.clone().view(-1, shape[-1], 16).requires_grad_()  # transformers takes (batch, length, D) only
    their_y = theirs(their_x)
    their_y.backward(gradient.view_as(their_y))
    expected = (their_y.detach().view_as(x), their_x.grad.view_as(x), {name: p.grad for name, p in pairs.items()})
    assert_same(by_the_layer(layer, x, gradient), expected, rtol=1e-4, atol=1e-5)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_no_token_at_all_is_no_error(router, shape, dtype):
    layer = make(router=router, shared_hidden=4, dtype=dtype)
    x = torch.zeros(*shape, D, dtype=dtype, requires_grad=True)
    y = layer(x, token_ids=torch.zeros(shape, dtype=torch.int64))
    (y.sum() + (layer.routes.aux_loss or 0)).backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(layer).values())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 2, 3)])
def test_any_leading_shape_is_taken_token_by_token(shape):
    layer, x = make(), random(*shape, D)
    y = layer(x)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, D), layer(x.reshape(-1, D)))
    assert int(layer.routes.load.sum()) == 2 * (x.numel() // D)


@pytest.mark.parametrize("form", ["permuted", "transposed", "sliced", "expanded"])
def test_x_need_not_be_contiguous(form):
    x = {
        "permuted": lambda: random(D, 6, 4).permute(2, 1, 0),
        "transposed": lambda: random(D, 6).t(),
        "sliced": lambda: random(6, D + 2)[:, :D],  # rows of 88 bytes
        "expanded": lambda: random(1, D).expand(6, D),
    }[form]()
    layer, gradient = make(shared_hidden=4), random(*x.shape)
    assert not x.is_contiguous()
    expected = by_the_layer(layer, x.contiguous(), gradient)
    layer.zero_grad()
    x = x.detach().requires_grad_()  # a clone might lose the strides
    y = layer(x)
    y.backward(gradient)
    assert_same((y.detach(), x.grad, gradients(layer)), expected, rtol=1e-5, atol=1e-6)


def test_an_expert_that_nobody_visits_gets_gradients_of_zeros():
    layer = make()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = torch.tensor([5.0, 4.0, -5.0, -5.0, -5.0])  # with x_0 = 1, all want experts 0 and 1
    x = random(9, D)
    x[:, 0] = 1
    layer(x).sum().backward()
    assert layer.routes.load.tolist() == [9, 9, 0, 0, 0]
    for weight in (layer.experts.w_in, layer.experts.w_out):
        assert weight.grad[:2].any(dim=(1, 2)).all() and not weight.grad[2:].any()


# -- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"probability": 1.0, "plan_gradient": "weights"}])
def test_padding_changes_nothing_for_real_tokens(options):
    options = {"noise": 0.0, "probability": 0.0} | options
    layer = make(router="ssr-s", shared_hidden=4, router_options=options, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    x, gradient = random(2, 4, D, dtype=torch.float64), random(2, 4, D, seed=1, dtype=torch.float64)
    expected = by_the_layer(layer, x[mask], gradient[mask])
    load = layer.routes.load
    layer.zero_grad()
    padded = x.clone().requires_grad_()
    y = layer(padded, mask)
    y.backward(gradient)
    assert torch.equal(layer.routes.load, load)
    assert not y[~mask].any() and not padded.grad[~mask].any()
    assert_same((y[mask].detach(), padded.grad[mask], gradients(layer)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_nan_in_padding_reaches_neither_output_nor_gradients(router):
    layer, mask = make(router=router, shared_hidden=4), torch.tensor([True, False, True, True])
    results = []
    for content in (0.5, float("nan")):
        layer.zero_grad()
        x = torch.where(mask[:, None], random(4, D), content).requires_grad_()
        y = layer(x, mask, token_ids=torch.arange(4))
        (y.sum() + (layer.routes.aux_loss or 0)).backward()
        results.append((y.detach(), x.grad, gradients(layer)))
    assert_same(*results, rtol=0, atol=0)
    assert torch.equal(results[1][0][1], torch.zeros(D)) and torch.isfinite(results[1][1]).all()


def test_padding_comes_out_as_0_although_experts_have_biases():
    layer, mask = make(shared_hidden=4, bias=True), torch.tensor([True, False, True])
    for experts in (layer.experts, layer.shared):
        torch.nn.init.ones_(experts.b_out)
    y = layer(random(3, D), mask)
    assert torch.equal(y[1], torch.zeros(D)) and y[0].any()
    y.sum().backward()
    assert layer.shared.b_out.grad.tolist() == [[2.0] * D]  # of the two real tokens


def test_nothing_but_padding_is_no_error():
    layer = make(router="load-balance", shared_hidden=4)
    y = layer(random(2, 3, D), torch.zeros(2, 3, dtype=torch.bool))
    (y.sum() + layer.routes.aux_loss).backward()
    assert not y.any() and layer.routes.load.tolist() == [0] * EXPERTS
    assert not any(g.any() for g in gradients(layer).values())


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.fixture
def computed_rows(monkeypatch):
    """How many rows the experts were given, call by call."""
    rows, forward = [], experts_module.Experts.forward
    monkeypatch.setattr(
        experts_module.Experts,
        "forward",
        lambda self, x_RD, ends_E: (rows.append(len(x_RD)), forward(self, x_RD, ends_E))[1],
    )
    return rows


def test_padding_is_not_computed(computed_rows):
    mask = torch.arange(20) % 2 == 0
    make()(random(20, D), mask)
    make()(random(20, D))
    assert computed_rows == [20, 40]


def test_places_that_expert_choice_fills_up_are_not_computed(computed_rows):
    layer = make(router="expert-choice")
    layer(random(20, D))
    assert layer.routes.experts.shape[1] > 2  # some token has more than K experts, so others' places are empty
    assert computed_rows == [40] == [int(layer.routes.load.sum())]


def test_a_choice_whose_weight_is_0_is_computed_and_its_weight_gets_its_gradient(computed_rows):
    layer, x = make(router_options={"norm_topk": False}), random(1, D)
    with torch.no_grad():
        layer.gate.weight.copy_(x * torch.tensor([0.0, -300, -600, -900, -1200])[:, None] / x.square().sum())
    weights = []
    layer.router.register_forward_hook(lambda *args: weights.append(args[2].weights) or args[2].weights.retain_grad())
    layer(x).sum().backward()
    assert weights[0].tolist() == [[1.0, 0.0]] and computed_rows == [2]
    alone = layer.experts(x, torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32)).sum()  # of expert 1
    torch.testing.assert_close(weights[0].grad[0, 1], alone)


@pytest.mark.parametrize("router", ["softmax", "expert-choice"])
def test_leaving_out_what_is_no_choice_changes_nothing(monkeypatch, router):
    layer, mask = make(router=router, dtype=torch.float64), torch.arange(20) % 3 != 0
    x, gradient = random(20, D, dtype=torch.float64), random(20, D, seed=1, dtype=torch.float64)
    results = []
    for all_are_computed in (False, True):
        if all_are_computed:
            monkeypatch.setattr(sinkroute.MoE, "_computed", lambda *_: None)
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs, mask)
        y.backward(gradient)
        results.append((y.detach(), inputs.grad, gradients(layer)))
    assert_same(*results, rtol=1e-10, atol=1e-12)


def test_a_padded_layer_passes_gradcheck():
    layer, mask = make(3, 2, 3, 2, dtype=torch.float64), torch.tensor([True, False, True, True])
    x = random(4, 3, dtype=torch.float64).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_layer_computes_the_same_in_one_graph(masked):
    layer, x = make(16, 24, dtype=torch.bfloat16), random(20, 16, dtype=torch.bfloat16)
    mask = torch.arange(20) % 2 == 0 if masked else None
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_every_router_trains_and_serves_a_layer(router, masked):
    layer = make(router=router)
    sinkroute.set_step(layer, 0, total_steps=10)
    ids, mask = torch.arange(12).view(3, 4), torch.arange(12).view(3, 4) % 4 != 3 if masked else None
    x = random(3, 4, D).requires_grad_()
    y = layer(x, mask, token_ids=ids)
    (y.square().sum() + (layer.routes.aux_loss or 0)).backward()
    assert y.shape == x.shape and x.grad.isfinite().all() and layer.experts.w_in.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.requires_grad)
    sinkroute.end_step(layer)
    y = layer.eval()(x, mask, token_ids=ids)
    assert y.isfinite().all() and layer.routes.experts.shape == (12, 2)
    assert masked == (not y[:, 3].any())


# -- precision -------------------------------------------------------------------------------------------------------


def test_autocast_computes_experts_in_bfloat16_and_routes_as_without_it():
    layer, x = make(16, 24, shared_hidden=8), random(40, 16)
    expected = layer(x)
    routes = layer.routes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.routes.experts, routes.experts) and torch.equal(layer.routes.weights, routes.weights)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert all(g.dtype == torch.float32 and g.any() for g in gradients(layer).values())


def test_a_bfloat16_layer_scores_in_float32():
    layer = make(16, 24, shared_hidden=8, dtype=torch.bfloat16)
    x = random(200, 16, dtype=torch.bfloat16)
    y = layer(x)
    expected = layer.router(F.linear(x.float(), layer.gate.weight.float()))
    assert torch.equal(layer.routes.experts, expected.experts) and torch.equal(layer.routes.weights, expected.weights)
    # The test has teeth only if scores rounded to bfloat16 would have routed some token otherwise.
    assert not torch.equal(layer.router(F.linear(x, layer.gate.weight)).experts, expected.experts)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(layer).values())


def test_a_float16_layer_runs_on_the_cpu():
    layer, x = make(16, 24, dtype=torch.float16), random(5, 16, dtype=torch.float16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float16 and all(g.isfinite().all() for g in gradients(layer).values())


# -- life with the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_the_output_can_be_differentiated(dtype):
    # Its gradient is an expanded scalar with strides of 0, which a grouped kernel may refuse.
    layer, x = make(16, 24, shared_hidden=8, dtype=dtype), random(2, 9, 16, dtype=dtype).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any() and all(g.any() for g in gradients(layer).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_input_gives_the_same_bits_of_output_and_gradients(dtype):
    layer = make(router="ssr-s", router_options={"plan_gradient": "weights", "noise": 1.0}, dtype=dtype)
    sinkroute.set_step(layer, 4)
    x, gradient = random(50, D, dtype=dtype), random(50, D, seed=1, dtype=dtype)
    once = by_the_layer(layer, x, gradient)
    assert_same(by_the_layer(layer, x, gradient), once, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_recomputation_gives_the_same_gradients(probability, use_reentrant):
    layer = make(router="ssr-s", router_options={"probability": probability, "noise": 1.0})
    sinkroute.set_step(layer, 2)
    x, gradient = random(30, D), random(30, D, seed=1)
    expected = by_the_layer(layer, x, gradient)

    layer.zero_grad()
    recomputed = x.clone().requires_grad_()
    y = checkpoint(layer, recomputed, use_reentrant=use_reentrant, preserve_rng_state=False)
    y.backward(gradient)
    assert_same((y.detach(), recomputed.grad, gradients(layer)), expected, rtol=0, atol=0)


def test_every_parameter_has_a_gradient_whatever_the_branch():
    # A parameter without one makes DistributedDataParallel refuse the step.
    layer = make(router="ssr-s", shared_hidden=4, router_options={"probability": 0.5})
    taken = set()
    for step in range(8):
        sinkroute.set_step(layer, step)
        layer.zero_grad()
        layer(random(6, D)).sum().backward()
        taken.add(layer.routes.branch)
        assert all(parameter.grad is not None for parameter in layer.parameters())
    assert taken == {"softmax", "sinkhorn"}


def test_the_names_of_the_state_are_these():
    assert list(make().state_dict()) == ["gate.weight", "experts.w_in", "experts.w_out"]
    assert list(make(router="ssr-s", shared_hidden=4).state_dict()) == [
        "gate.weight",
        "experts.w_in",
        "experts.w_out",
        "shared.w_in",
        "shared.w_out",
    ]


def test_the_biases_of_gate_and_experts_are_options():
    assert list(make(gate_bias=True).state_dict()) == ["gate.weight", "gate.bias", "experts.w_in", "experts.w_out"]
    assert list(make(bias=True, shared_hidden=4).state_dict())[-4:] == [
        "shared.w_in",
        "shared.w_out",
        "shared.b_in",
        "shared.b_out",
    ]


def test_the_bias_of_the_gate_starts_at_0_and_takes_part_in_choice_and_weights():
    layer, x = make(gate_bias=True), random(6, D)
    assert torch.equal(layer(x), make()(x))
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0]))
    layer(x).sum().backward()
    scores_TE = x @ layer.gate.weight.T + layer.gate.bias
    assert layer.routes.experts[:, 0].tolist() == [2] * 6
    torch.testing.assert_close(layer.routes.weights, torch.softmax(scores_TE.topk(2).values, -1))
    assert layer.gate.bias.grad.shape == (EXPERTS,)


def test_a_gate_that_has_a_bias_already_keeps_it():
    assert make(router="ssr-fold", gate_bias=True).gate.bias is not None


def test_a_bias_of_a_gate_that_is_no_linear_map_is_refused():
    router = sinkroute.create_router("softmax", num_experts=EXPERTS, top_k=2)
    router.make_gate = lambda d_model: torch.nn.Identity()
    with pytest.raises(ValueError, match="gate_bias=True, but the gate of SoftmaxRouter is no linear map; leave"):
        make(router=router, gate_bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_a_layer_from_the_meta_device_gets_its_values_from_reset_parameters(router, dtype):
    options = {"layer": 3, "vocab_size": 40} if router in ("hash", "stable-moe") else {"layer": 3}
    with torch.device("meta"):
        layer = make(router=router, dtype=dtype, bias=True, router_options=options)
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), *layer.gate.buffers()):
        value.data.fill_(float("nan") if value.is_floating_point() else 2**40)
    for part in layer.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = make(router=router, dtype=dtype, bias=True, router_options=options)
    assert list(layer.state_dict()) == list(fresh.state_dict())
    for name, value in fresh.state_dict().items():
        loaded = layer.state_dict()[name]
        assert loaded.dtype == value.dtype and torch.isfinite(loaded).all()
        if (
            not value.is_floating_point()
            or value.unique().numel() == 1
            or (router == "smoe-dropout" and "gate" in name)
        ):
            assert torch.equal(loaded, value), name  # constants, tables, draws from a key
        elif value.ndim == 2:
            assert loaded.float().std().item() == pytest.approx(value.float().std().item(), rel=0.5)
    x, ids = random(6, D, dtype=dtype), torch.arange(6)
    sinkroute.set_step(layer, 0, total_steps=100)
    assert torch.isfinite(layer(x, token_ids=ids)).all() and torch.isfinite(layer.eval()(x, token_ids=ids)).all()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_layer_that_has_run_can_be_copied_and_saved(way):
    layer, x = make(router="ssr-s", shared_hidden=4), random(6, D)
    sinkroute.set_step(layer, 9)
    y = layer(x)
    file = io.BytesIO()
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        torch.save(layer.state_dict(), file)
        other = sinkroute.MoE(D, HIDDEN, EXPERTS, 2, "ssr-s", shared_hidden=4)
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        sinkroute.set_step(other, 9)
    assert other.routes is None and layer.routes is not None
    assert torch.equal(other(x), y)


def test_the_routes_of_the_last_forward_pass_are_kept():
    layer = make(router="z-loss")
    assert layer.routes is None
    layer(random(4, 3, D))
    assert layer.routes.experts.shape == (12, 2) and layer.routes.aux_loss.requires_grad
    layer.eval()(random(2, D))
    assert layer.routes.experts.shape == (2, 2) and layer.routes.aux_loss is None


def test_the_shared_expert_adds_what_it_computes_of_every_token():
    layer, x = make(shared_hidden=4, activation="relu"), random(6, D)
    y = layer(x)
    shared = F.linear(F.linear(x, layer.shared.w_in[0]).relu(), layer.shared.w_out[0])
    layer.shared = None
    torch.testing.assert_close(y - shared, layer(x), rtol=1e-4, atol=1e-6)


def test_a_router_that_is_made_does_what_its_name_does():
    router = sinkroute.create_router("ssr-l", num_experts=EXPERTS, top_k=2, reg=0.7, probability=1.0)
    layer, named = make(router=router), make(router="ssr-l", router_options={"reg": 0.7, "probability": 1.0})
    assert layer.router is router
    assert torch.equal(layer(random(9, D)), named(random(9, D)))


@pytest.mark.parametrize(
    "make_layer", [lambda: sinkroute.MoE(4, 4, 4, 2), lambda: sinkroute.MultiHeadMoE(4, 2, 4, 4, 2)]
)
def test_the_layer_takes_the_recommended_router_unless_told_and_says_which(make_layer):
    layer = make_layer()
    router = getattr(layer, "moe", layer).router
    assert type(router) is router_class(RECOMMENDED)
    assert f"router={RECOMMENDED}" in repr(layer)


def test_the_recommended_router_may_have_one_expert_a_token_or_one_in_all():
    for experts, top_k in ((4, 1), (1, 1), (4, 4)):
        layer = sinkroute.MoE(4, 4, experts, top_k)
        sinkroute.set_step(layer, 0)
        layer(random(9, 4)).sum().backward()
        sinkroute.end_step(layer)
        assert layer.eval()(random(9, 4)).isfinite().all()


# -- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "ssr"}, r"unknown router 'ssr'.*Known"),
        ({"router_options": {"nois": 1}, "router": "ssr-s"}, r"option of router 'ssr-s': 'nois'; did you mean 'noise'"),
        ({"activation": "silu"}, r"unknown activation 'silu'.*swiglu"),
        ({"top_k": 6}, r"top_k must be between 1 and num_experts=5, got 6"),
        ({"shared_hidden": 0}, r"d_hidden must be 1 or more, got 0"),
        (
            {"router": sinkroute.create_router("softmax", num_experts=4, top_k=2)},
            r"router is made for num_experts=4, top_k=2, but the layer for num_experts=5, top_k=2; make them equal",
        ),
        (
            {"router": sinkroute.create_router("softmax", num_experts=5, top_k=1)},
            r"router is made for num_experts=5, top_k=1, but the layer for num_experts=5, top_k=2",
        ),
        (
            {
                "router": sinkroute.create_router("softmax", num_experts=5, top_k=2),
                "router_options": {"norm_topk": True},
            },
            r"router_options=\{'norm_topk': True\} go with a router's name",
        ),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("router", [None, 3, torch.nn.Linear(D, EXPERTS), sinkroute.MoE])
def test_what_is_no_router_is_refused(router):
    with pytest.raises(TypeError, match=r"router must be a name or a Router, got .*sinkroute\.create_router"):
        make(router=router)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(6).long(), ValueError, r"token_ids must have shape \(2, 3\) like x, got \(6,\); pass one id per"),
        (torch.zeros(3, 2).long(), ValueError, r"token_ids must have shape \(2, 3\) like x, got \(3, 2\)"),
        (torch.zeros(2, 3), TypeError, r"token_ids must be an integer tensor, got a tensor of torch\.float32; pass"),
        (torch.zeros(2, 3).bool(), TypeError, r"token_ids must be an integer tensor, got a tensor of torch\.bool"),
        ([[1, 2, 3]] * 2, TypeError, r"token_ids must be an integer tensor, got \[\[1.*\(list\); pass the ids"),
    ],
)
@pytest.mark.parametrize("router", ["hash", "stable-moe", "softmax"])
def test_ids_of_a_wrong_form_are_refused(router, ids, error, message):
    with pytest.raises(error, match=message):
        make(router=router)(torch.zeros(2, 3, D), token_ids=ids)


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (
            torch.zeros(3, D).long(),
            None,
            TypeError,
            r"x must be a float tensor, got a tensor of torch\.int64; pass tok",
        ),
        ([1.0] * D, None, TypeError, r"x must be a float tensor, got \[1\.0.*\(list\); pass tokens \(\.\.\., 20\)"),
        (
            torch.zeros(2, D),
            [True, False],
            TypeError,
            r"token_mask must be a bool tensor.*\(list\); use torch\.as_tens",
        ),
        (torch.zeros(3, D + 1), None, ValueError, r"last dimension of d_model=20, got shape \(3, 21\)"),
        (torch.zeros(2, 3, D), torch.ones(6).bool(), ValueError, r"token_mask must have shape \(2, 3\).*got \(6,\)"),
        (
            torch.zeros(2, 3, D),
            torch.ones(3, 2).bool(),
            ValueError,
            r"token_mask must have shape \(2, 3\).*got \(3, 2\)",
        ),
        (torch.zeros(2, 3, D), torch.ones(2, 3).long(), TypeError, r"token_mask must be bool.*int64; use mask\.bool"),
        (torch.zeros(2, 3, D), torch.ones(2, 3), TypeError, r"token_mask must be bool.*float32; use mask\.bool"),
    ],
)
def test_input_of_a_wrong_form_is_refused(x, mask, error, message):
    with pytest.raises(error, match=message):
        make()(x, mask)


def test_a_token_that_is_not_finite_is_an_error_on_the_cpu():
    x = random(4, D)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"logits_TE\[2, 0\] is nan"):
        make()(x)


# -- tokens that do not go with the weights --------------------------------------------------------------------------

NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]


def any_layer(kind):
    return make(D) if kind == "MoE" else sinkroute.MultiHeadMoE(D, 2, HIDDEN, EXPERTS, 2, "softmax")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["MoE", "MultiHeadMoE"])
def test_tokens_of_8_bits_are_refused_by_name(kind, dtype):
    with pytest.raises(
        TypeError, match=rf"x must be a float tensor of 16, 32 or 64 bits, got a tensor of {dtype}.*x\.to"
    ):
        any_layer(kind)(random(3, D).to(dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
@pytest.mark.parametrize("kind", ["MoE", "MultiHeadMoE"])
def test_tokens_that_are_no_floats_are_refused_by_name(kind, dtype):
    with pytest.raises(TypeError, match=rf"x must be a float tensor, got a tensor of {dtype}; pass tokens"):
        any_layer(kind)(random(3, D).to(dtype))


@pytest.mark.parametrize("router", sinkroute.list_routers())
@pytest.mark.parametrize(("weights", "tokens"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_tokens_of_another_dtype_than_the_weights_are_refused_with_the_cure(router, weights, tokens):
    layer = make(router=router, dtype=weights)
    with pytest.raises(
        TypeError, match=rf"x must have the dtype of the experts' weights, {weights}, got {tokens}; .*x\.t"
    ):
        layer(random(3, D, dtype=tokens), token_ids=torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_values_refuses_tokens_with_values(dtype):
    with torch.device("meta"):
        layer = make(dtype=dtype)
    with pytest.raises(ValueError, match=r"weights are on the meta device and hold no values.*to_empty"):
        layer(random(3, D, dtype=dtype))
    assert layer(random(3, D, dtype=dtype).to("meta")).shape == (3, D)


def test_ids_for_heads_that_are_no_tensor_are_refused_by_name():
    with pytest.raises(TypeError, match=r"token_ids must be an integer tensor, got \[1, 2, 3\]"):
        any_layer("MultiHeadMoE")(random(3, D), token_ids=[1, 2, 3])


def test_an_option_of_the_router_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"unexpected arguments; .*router_options=\{'probability': 0.1\}"):
        sinkroute.MoE(8, 16, 4, 2, "ssr-s", probability=0.1)
    with pytest.raises(TypeError, match=r"router_options=\{'probability': 0.1\}"):
        sinkroute.MultiHeadMoE(8, 2, 16, 4, 2, "ssr-s", probability=0.1)
