"""Potentials that are folded into a linear gate: what the gate takes up, the router has less."""

import pytest
import torch

import sinkroute
from sinkroute.routing.fold import GateFold
from sinkroute.routing.metrics import max_violation
from sinkroute.routing.router import Router
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState

E, D = 4, 16


class Told(Router):
    """Serves with an offset of the logits that the test sets."""

    def __init__(self, num_experts=E, top_k=1, **options):
        super().__init__(num_experts, top_k, **options)
        self.state = RouterState(num_experts, offset_E=torch.zeros(num_experts))

    def choice_bias(self):
        return Serving(self.state.offset_E)


def folding(gate, name, router=None):
    router = Told() if router is None else router
    router.links.append(GateFold(router, gate, name))
    return router


def gate_of(values, bias=True, dtype=torch.float32):
    gate = torch.nn.Linear(2, E, bias=bias).to(dtype)
    with torch.no_grad():
        (gate.bias if bias else gate.weight).copy_(torch.tensor(values))
    return gate


def end(router, x_TD, gate, step=0, mask_T=None):
    """A step in which the router is given what the gate makes of these tokens."""
    sinkroute.set_step(router, step)
    router.links[0].see(x_TD)
    router(gate(x_TD).float(), mask_T)
    sinkroute.end_step(router)


def skewed(tokens=2000, common=2.0, seed=0):
    """A gate without a bias that prefers the first experts, and tokens with a part in common."""
    draw = torch.Generator().manual_seed(seed)
    common_D = common * torch.randn(D, generator=draw)
    gate = torch.nn.Linear(D, E, bias=False)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(E, D, generator=draw) / D**0.5)
        gate.weight += torch.outer(torch.linspace(3, 0, E), common_D / common_D.square().sum())
    return gate, torch.randn(tokens, D, generator=draw) + common_D


# -- what is moved ---------------------------------------------------------------------------------------------------


def test_a_gate_with_a_bias_takes_up_all_and_the_router_keeps_nothing():
    gate = gate_of([1.0, 0, 0, 0])
    router = folding(gate, "bias")
    router.state.offset_E.copy_(torch.tensor([-1.5, 0.5, 0.5, 0.5]))
    end(router, torch.zeros(3, 2), gate)
    assert gate.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert not router.state.offset_E.any()
    assert router.state.sums == {}  # nothing more goes over the ranks


def test_of_a_weight_the_router_keeps_what_the_mean_token_does_not_feel():
    # Tokens (1, 0) and (3, 0): m = (2, 0), E[(m̂·x)²] = 5, d = (0.4, 0). The mean token feels 0.4 · 2 = 0.8 of a move.
    gate = gate_of([[0.0, 0], [0, 0], [0, 0], [0, 0]], bias=False)
    router = folding(gate, "weight")
    router.state.offset_E.copy_(torch.tensor([-1.0, 1, 0, 0]))
    end(router, torch.tensor([[1.0, 0], [3, 0]]), gate)
    torch.testing.assert_close(gate.weight.detach()[:, 0], torch.tensor([-0.4, 0.4, 0, 0]))
    torch.testing.assert_close(router.state.offset_E, torch.tensor([-0.2, 0.2, 0, 0]))
    assert {name: len(value) for name, value in router.state.sums.items()} == {"token": 2, "spread": 1, "seen": 1}


def test_padding_is_in_no_mean():
    gates = [gate_of([[0.0, 0]] * 4, bias=False) for _ in range(2)]
    kept = []
    for gate, x_TD, mask_T in (
        (gates[0], torch.tensor([[1.0, 0], [3, 0]]), None),
        (gates[1], torch.tensor([[1.0, 0], [3, 0], [7, 9]]), torch.tensor([True, True, False])),
    ):
        router = folding(gate, "weight")
        router.state.offset_E.copy_(torch.tensor([-1.0, 1, 0, 0]))
        end(router, x_TD, gate, mask_T=mask_T)
        kept.append(router.state.offset_E.clone())
    assert torch.equal(gates[0].weight, gates[1].weight) and torch.equal(*kept)


def test_a_step_without_a_token_moves_no_weight():
    gate = gate_of([[1.0, 0]] * 4, bias=False)
    router = folding(gate, "weight")
    router.state.offset_E.copy_(torch.tensor([-1.0, 1, 0, 0]))
    end(router, torch.zeros(0, 2), gate)
    assert gate.weight[:, 0].tolist() == [1.0] * 4 and router.state.offset_E.tolist() == [-1, 1, 0, 0]


def test_what_is_not_finite_is_not_folded():
    gate = gate_of([1.0, 0, 0, 0])
    router = folding(gate, "bias")
    router.state.offset_E[0] = torch.nan
    end(router, torch.zeros(3, 2), gate)
    assert gate.bias.tolist() == [1.0, 0, 0, 0]


# -- low precision ---------------------------------------------------------------------------------------------------


def test_what_bfloat16_rounds_away_stays_until_it_is_large_enough():
    # Between 256 and 512 bfloat16 has every second number.
    gate = gate_of([256.0, 0, 0, 0], dtype=torch.bfloat16)
    router = folding(gate, "bias")
    found = []
    for step in range(3):
        router.state.offset_E[0] += 0.75
        end(router, torch.zeros(3, 2, dtype=torch.bfloat16), gate, step)
        found.append((gate.bias[0].item(), float(router.state.offset_E[0])))
    assert found == [(256.0, 0.75), (258.0, -0.5), (258.0, 0.25)]


def test_of_a_weight_in_bfloat16_the_router_keeps_what_was_rounded_away():
    gate, x_TD = skewed()
    gate.bfloat16()
    router = folding(gate, "weight")
    moves_E = torch.tensor([-1e-3, 1e-3, 2e-3, -2e-3])
    before_ED, x_TD = gate.weight.detach().float(), x_TD.bfloat16()
    for step in range(50):
        router.state.offset_E += moves_E
        end(router, x_TD, gate, step)
    felt_E = (gate.weight.detach().float() - before_ED) @ x_TD.float().mean(0)
    torch.testing.assert_close(felt_E + router.state.offset_E, 50 * moves_E, atol=1e-4, rtol=1e-3)
    assert router.state.offset_E.abs().max() < 0.02 < felt_E.abs().max()


# -- the routers that are folded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("ssr-dual", {}), ("ssr-dual", {"exact": True}), ("ssr-bias", {}), ("quantile", {}), ("ssr-fold", {})],
)
def test_a_skewed_gate_serves_balanced_after_a_few_steps(name, options):
    gate, x_TD = skewed()
    router = folding(gate, "weight", sinkroute.create_router(name, num_experts=E, top_k=1, **options))
    before = max_violation(gate(x_TD).argmax(1).bincount(minlength=E))
    for step in range(10):
        end(router, x_TD[:1000], gate, step)
    after = max_violation(gate(x_TD[1000:]).argmax(1).bincount(minlength=E))
    assert after < 0.3 < 1 < before


def test_in_training_ssr_dual_chooses_by_the_gate_and_what_is_ahead_of_the_average():
    gate, x_TD = torch.nn.Linear(D, E), skewed()[1]
    plain = sinkroute.create_router("ssr-dual", num_experts=E, top_k=1)
    router = folding(gate, "bias", sinkroute.create_router("ssr-dual", num_experts=E, top_k=1))
    start_E = gate.bias.detach().clone()
    with torch.no_grad():
        for step in range(6):
            logits_TE = x_TD @ gate.weight.T + start_E
            for one in (plain, router):
                sinkroute.set_step(one, step)
            # A router that keeps all, and one that folds: the same choices, for the same sum.
            chosen = [plain(logits_TE).experts, router(gate(x_TD)).experts]
            assert (chosen[0] != chosen[1]).float().mean() < 2e-3  # ties to rounding
        for one in (plain, router):
            sinkroute.end_step(one)
    average_E, bias_E = plain.state.average_E, plain.state.bias_E
    assert router.state.average_E.abs().max() < 1e-6 < average_E.abs().max()
    torch.testing.assert_close(gate.bias.detach() - start_E, average_E, atol=0.02, rtol=0.02)
    torch.testing.assert_close(router.state.bias_E, bias_E - average_E, atol=0.02, rtol=0.02)
    assert router.eval().is_plain()


def test_groups_that_are_judged_by_scores_are_so_with_a_bias_on_logits():
    options = {"groups": 4, "top_groups": 2, "group_score": "top2-sum"}
    logits_TE = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    bias_E = torch.randn(16, generator=torch.Generator().manual_seed(1))
    router = sinkroute.create_router("ssr-dual", num_experts=16, top_k=2, **options).eval()
    router.state.average_E.copy_(bias_E)
    softmax = sinkroute.create_router("softmax", num_experts=16, top_k=2, **options).eval()
    assert torch.equal(router(logits_TE).experts, softmax(logits_TE + bias_E).experts)


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_a_bias_on_scores_cannot_be_folded():
    router = sinkroute.create_router("ssr-dual", num_experts=E, top_k=1, bias_on="scores")
    with pytest.raises(ValueError, match="SSRDualRouter has no potentials of logits, but a bias on scores"):
        GateFold(router, torch.nn.Linear(2, E), "bias")


def test_a_router_without_potentials_is_refused():
    with pytest.raises(ValueError, match="SoftmaxRouter has no potentials of logits, which a gate could take up"):
        GateFold(sinkroute.create_router("softmax", num_experts=E, top_k=1), torch.nn.Linear(2, E), "bias")


def test_tokens_that_nobody_showed_are_asked_for():
    gate = torch.nn.Linear(2, E, bias=False)
    router = folding(gate, "weight")
    sinkroute.set_step(router, 0)
    with pytest.raises(RuntimeError, match=r"call see\(tokens\) of router\.links"):
        router(gate(torch.zeros(3, 2)))
