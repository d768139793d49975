"""E feed-forward networks over sorted rows: the loop against plain algebra, the kernel against the loop."""

import math

import pytest
import torch
from torch import nn

from sinkroute.moe import experts as experts_module
from sinkroute.moe.experts import ACTIVATIONS, Experts
from sinkroute.moe.linear import can_group, grouped_linear, loop_linear


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(*counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def make(d_model=7, d_hidden=5, num_experts=3, activation="swiglu", dtype=torch.float64):
    torch.manual_seed(0)
    return Experts(d_model, d_hidden, num_experts, activation).to(dtype)


@pytest.mark.parametrize(
    ("activation", "names"), [("swiglu", ("gate", "up", "down")), ("gelu", ("up", "down")), ("relu", ("up", "down"))]
)
def test_each_expert_is_a_feed_forward_network_of_linear_layers(activation, names):
    layer = make(activation=activation)
    x_RD, counts = random(9, 7, dtype=torch.float64), (4, 0, 5)
    y_RD = layer(x_RD, ends(*counts))
    assert layer.w_in.shape == (3, 5 * (len(names) - 1), 7) and layer.w_out.shape == (3, 7, 5)
    function = {"swiglu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU()}[activation]
    for expert, (part, expected) in enumerate(zip(x_RD.split(counts), y_RD.split(counts), strict=True)):
        if activation == "swiglu":
            gate, up = layer.w_in[expert, :5], layer.w_in[expert, 5:]  # the gate's rows first
            hidden = function(nn.functional.linear(part, gate)) * nn.functional.linear(part, up)
        else:
            hidden = function(nn.functional.linear(part, layer.w_in[expert]))
        torch.testing.assert_close(nn.functional.linear(hidden, layer.w_out[expert]), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation):
    layer = make(d_model=3, d_hidden=2, activation=activation)
    x_RD = random(5, 3, dtype=torch.float64).requires_grad_()

    def output(x, w_in, w_out):
        return torch.func.functional_call(layer, {"w_in": w_in, "w_out": w_out}, (x, ends(2, 0, 3)))

    assert torch.autograd.gradcheck(output, (x_RD, layer.w_in, layer.w_out))


# -- biases ----------------------------------------------------------------------------------------------------------


def with_biases(d_model=7, d_hidden=5, activation="swiglu", dtype=torch.float64):
    torch.manual_seed(0)
    layer = Experts(d_model, d_hidden, 3, activation, bias=True).to(dtype)
    for bias in (layer.b_in, layer.b_out):
        nn.init.normal_(bias)
    return layer


def as_linear_layers(layer, expert):
    """The input map and the output map of one expert."""
    maps = []
    for weight, bias in ((layer.w_in, layer.b_in), (layer.w_out, layer.b_out)):
        linear = nn.Linear(weight.shape[2], weight.shape[1]).to(weight.dtype)
        linear.load_state_dict({"weight": weight[expert].detach(), "bias": bias[expert].detach()})
        maps.append(linear)
    return maps


@pytest.mark.parametrize("sizes", [(16, 24), (7, 5)])  # in float32, the kernel and the loop
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_biases_output_and_gradients_are_those_of_linear_layers(activation, dtype, tolerance, sizes):
    layer, counts = with_biases(*sizes, activation, dtype), (4, 0, 5)
    x_RD, gradient_RD = random(9, sizes[0], dtype=dtype).requires_grad_(), random(9, sizes[0], seed=1, dtype=dtype)
    y_RD = layer(x_RD, ends(*counts))
    y_RD.backward(gradient_RD)
    function = {"swiglu": None, "gelu": nn.GELU(), "relu": nn.ReLU()}[activation]
    for expert, rows in enumerate((slice(0, 4), slice(4, 4), slice(4, 9))):
        first, second = as_linear_layers(layer, expert)
        part = x_RD[rows].detach().clone().requires_grad_()
        if activation == "swiglu":
            gate, up = first(part).chunk(2, -1)
            result = second(nn.functional.silu(gate) * up)
        else:
            result = second(function(first(part)))
        result.backward(gradient_RD[rows])
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(y_RD[rows], result, **close)
        torch.testing.assert_close(x_RD.grad[rows], part.grad, **close)
        for parameter, linear in ((layer.w_in, first), (layer.w_out, second)):
            torch.testing.assert_close(parameter.grad[expert], linear.weight.grad, **close)
        for parameter, linear in ((layer.b_in, first), (layer.b_out, second)):
            torch.testing.assert_close(parameter.grad[expert], linear.bias.grad, **close)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_biases_are_those_of_finite_differences(activation):
    layer = with_biases(3, 2, activation)
    names, values = zip(*layer.named_parameters(), strict=True)
    x_RD = random(5, 3, dtype=torch.float64).requires_grad_()

    def output(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, ends(2, 0, 3)))

    assert names == ("w_in", "w_out", "b_in", "b_out")
    assert torch.autograd.gradcheck(output, (x_RD, *values))


def test_a_gradient_of_a_bias_in_bfloat16_is_not_lost_to_rounding():
    # 4000 ones: added up one by one in bfloat16 they would stop at 256.
    layer = Experts(16, 16, 2, "relu", bias=True).to(torch.bfloat16)
    layer(torch.zeros(4000, 16, dtype=torch.bfloat16), ends(4000, 0)).sum().backward()
    assert layer.b_out.grad[0].tolist() == [4000] * 16 and not layer.b_out.grad[1].any()


def test_biases_without_rows_get_gradients_of_zeros():
    layer = with_biases()
    layer(torch.zeros(0, 7, dtype=torch.float64), ends(0, 0, 0)).sum().backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in layer.parameters())


def test_biases_start_at_0_and_are_told_in_the_description():
    layer = Experts(7, 5, 3, bias=True)
    assert layer.b_in.shape == (3, 10) and layer.b_out.shape == (3, 7)
    assert not layer.b_in.any() and not layer.b_out.any()
    assert repr(layer) == "Experts(num_experts=3, d_model=7, d_hidden=5, activation=swiglu, bias=True)"
    assert list(make().state_dict()) == ["w_in", "w_out"]


# -- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(4, 0, 5), (0, 0, 9), (9, 0, 0), (1, 7, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_grouped_kernel_gives_output_and_gradients_of_the_loop(dtype, tolerance, counts):
    results = []
    for linear in (grouped_linear, loop_linear):
        x_RD, weight = (
            random(9, 16, dtype=dtype).requires_grad_(),
            random(3, 24, 16, seed=1, dtype=dtype).requires_grad_(),
        )
        assert can_group(x_RD, weight)
        y_RF = linear(x_RD, weight, ends(*counts))
        y_RF.backward(random(9, 24, seed=2, dtype=dtype))
        results.append((y_RF, x_RD.grad, weight.grad))
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())


@pytest.mark.parametrize("form", ["expanded", "transposed", "sliced"])
def test_the_grouped_kernel_takes_input_and_gradient_of_any_strides(form):
    strided = {
        "expanded": lambda *shape: random(1, 1).expand(*shape),
        "transposed": lambda rows, columns: random(columns, rows).t(),
        "sliced": lambda rows, columns: random(rows, columns + 1)[:, 1:],
    }[form]
    results = []
    for linear in (grouped_linear, loop_linear):
        x_RD, weight = strided(9, 16).requires_grad_(), random(3, 24, 16, seed=1).requires_grad_()
        y_RF = linear(x_RD, weight, ends(4, 0, 5))
        y_RF.backward(strided(9, 24))
        results.append((y_RF, x_RD.grad, weight.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear", [grouped_linear, loop_linear])
def test_an_expert_without_rows_gets_a_gradient_of_zeros(linear):
    weight = random(3, 24, 16).requires_grad_()
    linear(random(9, 16), weight, ends(4, 0, 5)).sum().backward()
    assert not weight.grad[1].any() and weight.grad[0].any() and weight.grad[2].any()


def test_no_rows_at_all_are_no_error():
    layer, x_RD = make(), torch.zeros(0, 7, dtype=torch.float64, requires_grad=True)
    y_RD = layer(x_RD, ends(0, 0, 0))
    y_RD.sum().backward()
    assert y_RD.shape == (0, 7)
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in layer.parameters())


@pytest.mark.parametrize(
    ("d_model", "d_hidden", "dtype", "grouped"),
    [
        (16, 24, torch.float32, True),
        (20, 12, torch.float32, True),  # 80 and 48 bytes
        (16, 6, torch.float32, False),  # 24 bytes are no multiple of 16
        (18, 8, torch.float32, False),
        (16, 24, torch.bfloat16, True),
        (20, 24, torch.bfloat16, False),  # 40 bytes
        (16, 24, torch.float16, False),  # no backward pass on the CPU
        (16, 24, torch.float64, False),
    ],
)
def test_the_grouped_kernel_is_taken_where_it_can_be(monkeypatch, d_model, d_hidden, dtype, grouped):
    taken = []
    for name in ("grouped_linear", "loop_linear"):
        linear = getattr(experts_module, name)
        monkeypatch.setattr(
            experts_module, name, lambda *args, name=name, linear=linear: (taken.append(name), linear(*args))[1]
        )
    layer = make(d_model, d_hidden, activation="relu", dtype=dtype)
    layer(random(9, d_model, dtype=dtype), ends(4, 0, 5)).sum().backward()
    assert taken == ["grouped_linear" if grouped else "loop_linear"] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_initial_weights_are_uniform_within_the_bound_of_a_linear_layer(activation):
    layer = make(50, 200, 8, activation, torch.float32)
    for weight, fan_in in ((layer.w_in, 50), (layer.w_out, 200)):
        bound = 1 / math.sqrt(fan_in)
        assert weight.abs().max() <= bound and weight.abs().max() > 0.999 * bound
        # 80000 numbers or more: the deviation of a uniform, bound/√3, is met within five times 0.16 %.
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.008)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 2), "d_model must be 1 or more, got 0"),
        ((4, -1, 2), "d_hidden must be 1 or more, got -1"),
        ((4, 4, 0), "num_experts must be 1 or more, got 0"),
        ((4, 4, 2, "swigul"), "unknown activation 'swigul'; did you mean 'swiglu'"),
    ],
)
def test_sizes_and_names_that_are_wrong_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Experts(*arguments)


def test_the_description_tells_the_sizes():
    assert repr(make(7, 5, 3)) == "Experts(num_experts=3, d_model=7, d_hidden=5, activation=swiglu)"
