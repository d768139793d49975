"""XMoE: a gate of cosines, in float64 by hand."""

import numpy as np
import pytest
import torch

import sinkroute


def make(experts=6, top_k=2, **options):
    return sinkroute.create_router("xmoe", num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_hand(gate, x_TD):
    project, embeddings = (value.detach().double().numpy() for value in (gate.project.weight, gate.embeddings))
    tokens = x_TD.double().numpy() @ project.T
    logits = np.empty((len(tokens), len(embeddings)))
    for i, token in enumerate(tokens):
        for j, expert in enumerate(embeddings):
            logits[i, j] = token @ expert / np.linalg.norm(token) / np.linalg.norm(expert)
    return logits / gate.temperature.item()


def test_logits_are_cosines_over_the_temperature():
    gate, x_TD = make(temperature=0.25).make_gate(10), random(20, 10)
    np.testing.assert_allclose(gate(x_TD).detach().numpy(), by_hand(gate, x_TD), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_gate_are_those_of_finite_differences():
    gate, x_TD = make().make_gate(5).double(), random(4, 5, dtype=torch.float64).requires_grad_()
    names, values = zip(*gate.named_parameters(), strict=True)
    assert set(names) == {"project.weight", "embeddings", "temperature"}

    def logits(x_TD, *values):
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (x_TD,))

    assert torch.autograd.gradcheck(logits, (x_TD, *values))


@pytest.mark.parametrize(("experts", "dim"), [(1, 2), (2, 2), (5, 3), (6, 3), (16, 8)])
def test_the_projection_has_half_as_many_dimensions_as_there_are_experts(experts, dim):
    gate = make(experts, 1).make_gate(10)
    assert gate.project.weight.shape == (dim, 10) and gate.embeddings.shape == (experts, dim)
    assert gate.project.bias is None and gate.temperature.item() == pytest.approx(0.3)
    assert make(experts, 1, dim=7).make_gate(10).embeddings.shape == (experts, 7)


def test_how_long_a_token_is_does_not_matter():
    gate, x_TD = make().make_gate(10), random(20, 10)
    torch.testing.assert_close(gate(x_TD), gate(100 * x_TD), rtol=1e-5, atol=1e-5)


def test_a_token_of_zeros_gets_equal_logits_and_a_finite_gradient():
    gate, x_TD = make().make_gate(10), torch.zeros(2, 10, requires_grad=True)
    logits_TE = gate(x_TD)
    logits_TE[:, 0].sum().backward()
    assert not logits_TE.any() and torch.isfinite(x_TD.grad).all()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9])
def test_a_temperature_that_is_learned_away_leaves_finite_logits(value):
    gate = make().make_gate(10)
    gate.temperature.data.fill_(value)
    assert gate(random(20, 10)).abs().max() <= 1.001e4


@pytest.mark.parametrize("value", [1e-9, -1000.0])
def test_a_temperature_below_its_bound_has_the_gradient_of_the_bound_and_comes_back(value):
    gate, x_TD = make().make_gate(10), random(20, 10)
    grads = []
    for temperature in (1e-4, value):
        gate.temperature.data.fill_(temperature)
        logits_TE = gate(x_TD)
        gate.temperature.grad = None
        torch.nn.functional.cross_entropy(logits_TE, logits_TE.argmin(1)).backward()  # all of it is wrong: cool down
        grads.append(gate.temperature.grad.item())
    assert grads[0] == grads[1] < 0


def test_resetting_gives_the_values_that_a_new_gate_has():
    torch.manual_seed(5)
    gate = make(temperature=0.25).make_gate(10)
    torch.testing.assert_close(gate.embeddings.t() @ gate.embeddings, 0.32**2 * torch.eye(3))
    with torch.no_grad():
        gate.embeddings.fill_(float("nan"))
        gate.temperature.fill_(9.0)
    gate.reset_parameters()
    torch.testing.assert_close(gate.embeddings.t() @ gate.embeddings, 0.32**2 * torch.eye(3))
    assert gate.temperature == 0.25


def test_a_gate_in_bfloat16_computes_in_the_dtype_of_the_tokens():
    gate, x_TD = make().make_gate(10).bfloat16(), random(20, 10)
    logits_TE = gate(x_TD)
    assert logits_TE.dtype == torch.float32
    np.testing.assert_allclose(logits_TE.detach().numpy(), by_hand(gate, x_TD), rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_load_balance():
    logits_TE = random(30, 6)
    routes = make()(logits_TE)
    expected = sinkroute.create_router("load-balance", num_experts=6, top_k=2, coefficient=0.01)(logits_TE)
    assert torch.equal(routes.aux_loss, expected.aux_loss) and torch.equal(routes.weights, expected.weights)
    assert make(coefficient=0.5)(logits_TE).aux_loss == pytest.approx(50 * routes.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, r"dim must be an integer of 1 or more, got 0"),
        ({"temperature": 0}, r"temperature must be a finite number of 0\.0001 or more, got 0; 0\.3 is the published"),
        ({"coefficient": -1}, r"coefficient must be a finite number of 0 or more, got -1; 0\.01 is the published"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
