"""MH-MoE against a slow loop over sub-tokens, the published count, and the plain layer."""

import copy
import math

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.moe.experts import ACTIVATIONS

parity_hidden = sinkroute.MultiHeadMoE.parity_hidden


def make(d_model=12, heads=3, d_hidden=5, experts=4, top_k=2, router="softmax", dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = sinkroute.MultiHeadMoE(d_model, heads, d_hidden, experts, top_k, router, **options).to(dtype)
    with torch.no_grad():  # biases that are 0 would hide that they are left out
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 1 or name.split(".")[-1] in ("b_in", "b_out"):
                parameter.uniform_(-1, 1)
    return layer


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# -- what it computes ------------------------------------------------------------------------------------------------

PLAIN_ACTIVATIONS = {
    "swiglu": lambda hidden: (lambda gate, up: gate / (1 + torch.exp(-gate)) * up)(*hidden.chunk(2)),
    "gelu": lambda hidden: hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)),
    "relu": lambda hidden: hidden.clamp(min=0),
}


def one_part(s, w, activation, top_k):
    """Σ_k weight_k · expert_k(s) for one sub-token, by the textbook."""
    scores = w["moe.gate.weight"] @ s + w.get("moe.gate.bias", 0)
    chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert].item())[:top_k]
    total = sum(torch.exp(scores[expert]) for expert in (chosen if top_k > 1 else range(len(scores))))
    y = torch.zeros_like(s)
    for expert in chosen:
        b_in = w["moe.experts.b_in"][expert] if "moe.experts.b_in" in w else 0
        b_out = w["moe.experts.b_out"][expert] if "moe.experts.b_out" in w else 0
        hidden = PLAIN_ACTIVATIONS[activation](w["moe.experts.w_in"][expert] @ s + b_in)
        y = y + torch.exp(scores[expert]) / total * (w["moe.experts.w_out"][expert] @ hidden + b_out)
    return y


def one_token(x, w, heads, activation, top_k):
    wide = w["split.weight"] @ x + w["split.bias"]
    width = len(x) // heads
    parts = [one_part(wide[head * width : (head + 1) * width], w, activation, top_k) for head in range(heads)]
    return w["merge.weight"] @ torch.cat(parts) + w["merge.bias"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_all_gradients_are_those_of_a_loop_over_sub_tokens(activation, top_k, bias):
    layer = make(activation=activation, top_k=top_k, bias=bias, gate_bias=bias, dtype=torch.float64)
    x, gradient = random(2, 4, 12, dtype=torch.float64), random(2, 4, 12, seed=1, dtype=torch.float64)
    x.requires_grad_()
    y = layer(x)
    y.backward(gradient)

    weights = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    assert len(weights) == (10 if bias else 7)
    slow_x = x.detach().clone().requires_grad_()
    slow_y = torch.stack([one_token(token, weights, 3, activation, top_k) for token in slow_x.view(8, 12)])
    slow_y.backward(gradient.view(8, 12))

    torch.testing.assert_close(y.view(8, 12), slow_y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, slow_x.grad, rtol=1e-9, atol=1e-12)
    for name, value in layer.named_parameters():
        torch.testing.assert_close(value.grad, weights[name].grad, rtol=1e-9, atol=1e-12)


def test_one_head_between_identities_is_the_plain_layer():
    layer = make(heads=1)
    with torch.no_grad():
        for linear in (layer.split, layer.merge):
            linear.weight.copy_(torch.eye(12))
            linear.bias.zero_()
    assert torch.equal(layer(random(2, 5, 12)), layer.moe(random(2, 5, 12)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_taken_token_by_token(shape):
    layer, x = make(), random(*shape, 12).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    torch.testing.assert_close(y.reshape(-1, 12), layer(x.reshape(-1, 12)))


def test_the_routes_are_those_of_sub_tokens_in_the_order_of_their_tokens():
    layer, x = make(), random(5, 12)
    assert layer.routes is None
    layer(x)
    parts = layer.split(x).reshape(15, 4)  # the parts of a token stand side by side
    assert torch.equal(layer.routes.experts, torch.topk(layer.moe.gate(parts), 2).indices)
    assert int(layer.routes.load.sum()) == 5 * 3 * 2


# -- padding and ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [0.5, float("nan")])
@pytest.mark.parametrize("router", ["softmax", "load-balance", "ssr-l"])
def test_padding_comes_out_as_0_and_changes_nothing_for_real_tokens(router, content):
    options = {"probability": 1.0, "noise": 0.0} if router == "ssr-l" else {}
    layer = make(router=router, bias=True, router_options=options)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.where(mask[..., None], random(2, 3, 12), content)

    expected_x = x[mask].clone().requires_grad_()
    expected = layer(expected_x)
    (expected.square().sum() + (layer.routes.aux_loss or 0)).backward()
    gradients, load = [parameter.grad.clone() for parameter in layer.parameters()], layer.routes.load

    layer.zero_grad()
    x.requires_grad_()
    y = layer(x, mask)
    (y.square().sum() + (layer.routes.aux_loss or 0)).backward()
    assert torch.equal(y[~mask], torch.zeros(3, 12)) and torch.equal(x.grad[~mask], torch.zeros(3, 12))
    torch.testing.assert_close(y[mask], expected)
    torch.testing.assert_close(x.grad[mask], expected_x.grad)
    assert torch.equal(layer.routes.load, load) and int(load.sum()) == 3 * 3 * 2
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


class _GateById(nn.Module):
    """Scores that are a table of ids, whatever the token is."""

    needs_token_ids = True

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(random(10, 4, seed=3))

    def forward(self, x_TD, ids_T):
        return self.table[ids_T]


def test_each_part_of_a_token_has_the_id_of_its_token():
    layer, ids = make(), torch.tensor([[7, 2], [7, 0]])
    layer.moe.gate = _GateById()
    layer(random(2, 2, 12), token_ids=ids)
    expected = torch.topk(layer.moe.gate.table[[7, 7, 7, 2, 2, 2, 7, 7, 7, 0, 0, 0]], 2).indices
    assert torch.equal(layer.routes.experts, expected)


# -- how large it is -------------------------------------------------------------------------------------------------


def test_the_published_block_has_the_published_number_of_parameters():
    # Two heads, width 352, 16 experts of Linear-ReLU-Linear with biases, a gate with a bias: 3,981,840 with a hidden
    # width of 660, exactly as the plain block with 352.
    options = {"activation": "relu", "bias": True, "gate_bias": True}
    assert parity_hidden(352, 2, 352, 16, "relu", bias=True) == 660
    assert count(sinkroute.MultiHeadMoE(352, 2, 660, 16, 2, "softmax", **options)) == 3_981_840
    assert count(sinkroute.MoE(352, 352, 16, 2, "softmax", **options)) == 3_981_840


@pytest.mark.parametrize("shared_hidden", [None, 24])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("d_model", "heads"), [(32, 1), (32, 4), (48, 6)])
def test_no_other_width_is_nearer_to_parity(d_model, heads, activation, bias, shared_hidden):
    options = {"activation": activation, "bias": bias, "shared_hidden": shared_hidden}
    plain = count(sinkroute.MoE(d_model, 40, 8, 2, "softmax", **options))
    hidden = parity_hidden(d_model, heads, 40, 8, **options)
    off = [
        abs(count(sinkroute.MultiHeadMoE(d_model, heads, width, 8, 2, "softmax", **options)) - plain)
        for width in (hidden - 1, hidden, hidden + 1)
    ]
    assert min(off) == off[1]


def test_no_parity_is_possible_with_a_plain_layer_that_is_smaller_than_split_and_merge():
    with pytest.raises(ValueError, match=r"d_hidden=1, num_experts=2: split and merge alone have 8320; enlarge"):
        parity_hidden(64, 2, 1, 2)


# -- life with the layer ---------------------------------------------------------------------------------------------


def test_split_and_merge_start_as_in_the_authors_code():
    torch.manual_seed(0)
    layer = sinkroute.MultiHeadMoE(200, 2, 4, 4, 1)
    # Xavier: uniform within √(6/(200 + 200)), for the split divided by √2.
    for weight, bound in ((layer.split.weight, math.sqrt(6 / 400) / math.sqrt(2)), (layer.merge.weight, 0.015**0.5)):
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.merge.bias.any() and layer.split.bias.any()


def test_the_step_reaches_the_router():
    layer = make(router="ssr-s", router_options={"noise": 4.0})
    outputs = []
    for step in (1, 2, 1):
        sinkroute.set_step(layer, step)
        outputs.append(layer(random(6, 12)))
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_layer_that_has_run_can_be_copied():
    layer, x = make(), random(6, 12)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert other.routes is None and torch.equal(other(x), y)


def test_the_description_tells_the_heads():
    assert repr(make()).startswith("MultiHeadMoE(\n  heads=3\n  (split): Linear(")


@pytest.mark.parametrize("heads", [0, 5, -3])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    message = rf"heads must divide d_model=12, got {heads}; a token is split into equal parts"
    with pytest.raises(ValueError, match=message):
        make(heads=heads)
    with pytest.raises(ValueError, match=message):
        parity_hidden(12, heads, 5, 4)


@pytest.mark.parametrize(
    ("x", "mask", "ids", "error", "message"),
    [
        (torch.zeros(3, 4), None, None, ValueError, r"last dimension of d_model=12, got shape \(3, 4\)"),
        (torch.zeros(3, 12), torch.ones(9).bool(), None, ValueError, r"token_mask must have shape \(3,\).*got \(9,\)"),
        (torch.zeros(3, 12), torch.ones(3), None, TypeError, r"token_mask must be bool.*float32; use mask\.bool"),
        (torch.zeros(3, 12), None, torch.ones(9).long(), ValueError, r"token_ids must have shape \(3,\).*got \(9,\)"),
    ],
)
def test_input_of_a_wrong_form_is_refused(x, mask, ids, error, message):
    with pytest.raises(error, match=message):
        make()(x, mask, token_ids=ids)
