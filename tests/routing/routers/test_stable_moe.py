"""StableMoE: two losses, and routes that never change once they are frozen."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sinkroute

E, D = 5, 7


def make(top_k=1, experts=E, **options):
    return sinkroute.create_router("stable-moe", num_experts=experts, top_k=top_k, **options)


def make_layer(top_k=1, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return sinkroute.MoE(D, 4, E, top_k, "stable-moe", router_options={"vocab_size": 30, **options}).to(dtype)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def losses_by_hand(main, light, top_k, real):
    """Balance and distillation in float64, token by token."""
    chosen = {i: np.argsort(-main[i], kind="stable")[:top_k] for i in real}
    count = np.bincount(np.concatenate(list(chosen.values())), minlength=main.shape[1])
    mean = count.sum() / main.shape[1]
    balance = distillation = 0.0
    for i, experts in chosen.items():
        log_p = light[i] - np.log(np.exp(light[i]).sum())
        for j in experts:
            balance += (count[j] - mean) / mean / (1 + np.exp(-main[i, j])) / len(real)
            distillation -= log_p[j] / top_k / len(real)
    return balance, distillation


# -- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_losses_are_those_of_a_loop_over_tokens(top_k, masked):
    logits_TX = random(20, 2 * E, dtype=torch.float64)
    mask = torch.arange(20) % 4 != 1 if masked else None
    real = range(20) if mask is None else mask.nonzero().flatten().tolist()
    main, light = logits_TX.numpy()[:, :E], logits_TX.numpy()[:, E:]
    balance, distillation = losses_by_hand(main, light, top_k, real)
    for b, d in ((1.0, 0.0), (0.0, 1.0)):
        loss = make(top_k, balance_coefficient=b, distill_coefficient=d)(logits_TX, mask).aux_loss
        assert loss.item() == pytest.approx(b * balance + d * distillation, abs=1e-12)
    assert make(top_k)(logits_TX, mask).aux_loss.item() == pytest.approx(0.3 * balance + 0.3 * distillation, abs=1e-12)


def test_the_balance_loss_and_its_gradient_worked_by_hand():
    # Two tokens take expert 0 with logit ln 3 (σ = 3/4), one takes expert 1 with logit 0 (σ = 1/2); n = (2, 1), mean
    # 3/2, excess (1/3, −1/3). Loss (1/3)(1/3 · 3/4 + 1/3 · 3/4 − 1/3 · 1/2) = 1/9. Gradient: excess · σ(1 − σ) / 3.
    logits_TE = torch.tensor([[3.0, 0.5], [3.0, 0.5], [0.5, 1.0]]).log().requires_grad_()
    loss = make(1, 2, balance_coefficient=1.0)(logits_TE).aux_loss
    loss.backward()
    assert loss.item() == pytest.approx(1 / 9)
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[1 / 48, 0], [1 / 48, 0], [0, -1 / 36]]))


def test_distillation_teaches_the_light_router_alone_and_balance_the_main_one_alone():
    for options, taught, untouched in (
        ({"balance_coefficient": 0.0}, slice(E, None), slice(0, E)),
        ({"distill_coefficient": 0.0}, slice(0, E), slice(E, None)),
    ):
        logits_TX = random(20, 2 * E).requires_grad_()
        make(**options)(logits_TX).aux_loss.backward()
        assert logits_TX.grad[:, taught].any() and not logits_TX.grad[:, untouched].any()


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_and_weights_of_stage_1_are_those_of_the_main_logits(top_k):
    logits_TX = random(20, 2 * E)
    for router in (make(top_k), make(top_k).eval()):
        routes = router(logits_TX)
        values, experts_TK = logits_TX[:, :E].topk(top_k)
        assert torch.equal(routes.experts, experts_TK)
        torch.testing.assert_close(routes.weights, torch.sigmoid(values))
    assert routes.aux_loss is None  # serving


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_real_token_costs_nothing(tokens):
    logits_TX = random(tokens, 2 * E).requires_grad_()
    routes = make()(logits_TX, torch.zeros(tokens, dtype=torch.bool))
    (routes.aux_loss + routes.weights.sum()).backward()
    assert routes.aux_loss == 0 and not logits_TX.grad.any()


# -- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_of_stage_2_are_those_of_the_light_logits_weighed_by_the_main_ones(top_k):
    router, logits_TX = make(top_k, freeze_step=4), random(20, 2 * E).requires_grad_()
    sinkroute.set_step(router, 4)
    for routes in (router(logits_TX), copy.deepcopy(router).eval()(logits_TX)):
        experts_TK = logits_TX[:, E:].topk(top_k).indices
        assert torch.equal(routes.experts, experts_TK)
        torch.testing.assert_close(routes.weights, torch.sigmoid(logits_TX[:, :E].gather(1, experts_TK)))
    routes = router(logits_TX)
    assert routes.aux_loss == 0
    (routes.weights.sum() + routes.aux_loss).backward()
    assert logits_TX.grad[:, :E].any() and not logits_TX.grad[:, E:].any()


def test_main_logits_alone_are_routed_as_in_stage_1_for_ever():
    router, logits_TE = make(freeze_step=0), random(20, E)
    sinkroute.set_step(router, 5)
    assert torch.equal(router(logits_TE).experts, logits_TE.topk(1).indices)
    assert router(logits_TE).aux_loss != 0


@pytest.mark.parametrize(
    ("options", "total_steps", "first"),
    [({}, 30, 3), ({}, 4, 1), ({"freeze_step": 2}, 30, 2), ({"freeze_step": 0}, None, 0)],
)
def test_stage_2_begins_after_a_tenth_of_the_training_or_when_told(options, total_steps, first):
    router = make(**options)
    for step in range(6):
        sinkroute.set_step(router, step, total_steps=total_steps)
        assert bool(router.state.frozen) == (step >= first)


def test_a_training_whose_length_nobody_told_stays_in_stage_1_with_one_warning():
    layer = make_layer()
    with pytest.warns(UserWarning, match=r"total_steps=\.\.\.\), or give the router freeze_step") as caught:
        sinkroute.set_step(layer, 0)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 100):
            sinkroute.set_step(layer, step)
    assert not layer.router.state.frozen and (layer.gate.experts_VK == -1).all()
    sinkroute.set_step(layer, 100, total_steps=1000)  # told at last
    assert layer.router.state.frozen and (layer.gate.experts_VK >= 0).all()


def test_a_router_whose_routes_are_frozen_need_not_know_how_long_training_is():
    router, frozen = make(), make(freeze_step=0)
    sinkroute.set_step(frozen, 0)
    router.load_state_dict(frozen.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.set_step(router, 1)


def test_steps_do_not_ask_the_device_whether_the_routes_are_frozen(monkeypatch):
    layer = make_layer(freeze_step=2)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("a device would be waited for"))
    for step in range(4):
        sinkroute.set_step(layer, step)
    assert layer.router.state.frozen.item() == 1


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_frozen_layer_stays_frozen_as_it_was_when_it_is_copied_or_loaded(way):
    layer = make_layer(2, freeze_step=1)
    sinkroute.set_step(layer, 1)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = make_layer(2, freeze_step=1)
        other.load_state_dict(layer.state_dict())
    other.gate.embeddings.data.neg_()
    for step in (2, 3):
        sinkroute.set_step(other, step)
    assert torch.equal(other.gate.experts_VK, layer.gate.experts_VK)


def test_a_frozen_layer_into_which_an_earlier_state_is_loaded_freezes_anew():
    layer, earlier = make_layer(freeze_step=1), make_layer(freeze_step=1)
    sinkroute.set_step(layer, 1)
    layer.load_state_dict(earlier.state_dict())
    layer(random(3, D))  # without ids, as nothing is frozen
    layer.gate.embeddings.data.neg_()
    light_VE = layer.gate.embeddings @ layer.gate.light_centroids.t()
    sinkroute.set_step(layer, 1)
    assert torch.equal(layer.gate.experts_VK, light_VE.topk(1).indices)


def test_rows_that_came_frozen_by_a_broadcast_of_buffers_are_not_frozen_again():
    gate = make_layer(freeze_step=1).gate
    gate.frozen_VK[:7] = 3
    gate.freeze()
    light_VE = gate.embeddings @ gate.light_centroids.t()
    assert (gate.experts_VK[:7] == 3).all() and torch.equal(gate.experts_VK[7:], light_VE.topk(1).indices[7:])


def test_setting_a_step_between_forward_and_backward_pass_changes_no_gradient():
    # As pipelined schedules do: what the graph holds must not be written to.
    layer, x_TD, ids = make_layer(freeze_step=1), random(9, D), torch.arange(9)
    sinkroute.set_step(layer, 1)
    loss = layer(x_TD, token_ids=ids).square().sum() + layer.routes.aux_loss
    sinkroute.set_step(layer, 1, micro_batch=1)
    loss.backward()


def train(layer, step, optimiser):
    ids = torch.arange(60) % 30
    sinkroute.set_step(layer, step)
    y = layer(random(60, D, seed=step).to(layer.gate.centroids.dtype), token_ids=ids)
    (y.float().square().mean() + layer.routes.aux_loss).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=False)
    return layer.routes.experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_word_never_changes_its_experts_after_the_freeze_whatever_the_optimiser_does(top_k, dtype):
    layer = make_layer(top_k, dtype, freeze_step=3)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.5)
    experts = [train(layer, step, optimiser) for step in range(8)]
    assert not all(torch.equal(experts[step], experts[0]) for step in (1, 2))
    assert all(torch.equal(experts[step], experts[3]) for step in range(4, 8))
    assert torch.equal(experts[3][:30], experts[3][30:])
    # Served alike, with tokens that say otherwise.
    layer.eval()(random(30, D, seed=99, dtype=dtype), token_ids=torch.arange(30))
    assert torch.equal(layer.routes.experts, experts[3][:30])
    # The momentum has moved the light router on: it is the choices that are frozen.
    light_VE = layer.gate.embeddings.float() @ layer.gate.light_centroids.float().t()
    assert not torch.equal(light_VE.topk(top_k).indices, layer.gate.experts_VK)


def test_what_is_frozen_is_what_the_light_router_has_learned():
    layer = make_layer(2, freeze_step=1, distill_coefficient=1.0)
    light_VE = layer.gate.embeddings @ layer.gate.light_centroids.t()
    sinkroute.set_step(layer, 1)
    layer(random(30, D), token_ids=torch.arange(30))
    assert torch.equal(layer.routes.experts, light_VE.topk(2).indices)


def test_the_light_router_learns_the_main_ones_choices():
    # Tokens that are functions of their id: the light router can learn all of it.
    layer, ids = make_layer(freeze_step=1000, balance_coefficient=0.0, distill_coefficient=1.0), torch.arange(30)
    x_TD = random(30, D)
    optimiser = torch.optim.Adam([layer.gate.embeddings, layer.gate.light_centroids], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        layer(x_TD, token_ids=ids)
        layer.routes.aux_loss.backward()
        optimiser.step()
    learned = layer.routes.experts
    sinkroute.set_step(layer, 1000)
    layer(x_TD, token_ids=ids)
    assert torch.equal(layer.routes.experts, learned)


def test_a_frozen_layer_that_is_loaded_is_frozen_and_serves_alike():
    layer, other = make_layer(2, freeze_step=1), make_layer(2)
    sinkroute.set_step(layer, 1)
    other.load_state_dict(layer.state_dict())
    x_TD, ids = random(30, D), torch.arange(30)
    assert torch.equal(other.eval()(x_TD, token_ids=ids), layer.eval()(x_TD, token_ids=ids))
    assert torch.equal(other.routes.experts, layer.gate.experts_VK)
    sinkroute.set_step(other.train(), 2)  # needs no length of training
    other.gate.embeddings.data.zero_()
    sinkroute.set_step(other, 3)
    assert torch.equal(other(x_TD, token_ids=ids), layer.train()(x_TD, token_ids=ids))


def test_a_copy_freezes_its_own_gate():
    layer = make_layer(freeze_step=1)
    other = copy.deepcopy(layer)
    sinkroute.set_step(other, 1)
    assert (other.gate.experts_VK >= 0).all() and (layer.gate.experts_VK == -1).all()


@pytest.mark.parametrize("step", [0, 1])
def test_every_parameter_has_a_gradient_in_both_stages(step):
    layer = make_layer(2, freeze_step=1)
    sinkroute.set_step(layer, step)
    (layer(random(9, D), token_ids=torch.arange(9)).sum() + layer.routes.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.gate.embeddings.grad.any() == (step == 0)


# -- the gate --------------------------------------------------------------------------------------------------------


def test_the_gate_gives_products_with_centroids_of_tokens_and_of_ids():
    gate, x_TD, ids = make_layer().gate, random(6, D), torch.tensor([0, 29, 30, -1, 7, 7])
    logits_TX = gate(x_TD, ids)
    torch.testing.assert_close(logits_TX[:, :E], x_TD @ gate.centroids.t())
    torch.testing.assert_close(logits_TX[:, E:], gate.embeddings[ids % 30] @ gate.light_centroids.t())
    assert torch.equal(logits_TX[0, E:], logits_TX[2, E:]) and torch.equal(logits_TX[1, E:], logits_TX[3, E:])
    assert gate.embeddings.shape == (30, 50)


def test_tokens_without_ids_are_routed_by_the_main_logits_until_the_routes_are_frozen():
    layer, x_TD = make_layer(2, freeze_step=1), random(6, D)
    for training in (True, False):
        layer.train(training)(x_TD)
        values, experts_TK = (x_TD @ layer.gate.centroids.t()).topk(2)
        assert torch.equal(layer.routes.experts, experts_TK)
        torch.testing.assert_close(layer.routes.weights, torch.sigmoid(values))
    sinkroute.set_step(layer.train(), 1)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"token_ids is None, but the routes of stable-moe are frozen.*token_ids="):
            layer.train(training)(x_TD)


def test_a_second_gate_of_one_router_is_refused():
    router = make()
    sinkroute.MoE(D, 4, E, 1, router)
    with pytest.raises(ValueError, match="this stable-moe router has a gate already; make one router per layer"):
        sinkroute.MoE(D, 4, E, 1, router)


def test_resetting_makes_a_frozen_layer_a_new_one():
    layer = make_layer(2, freeze_step=1)
    sinkroute.set_step(layer, 1)
    torch.manual_seed(0)
    layer.gate.reset_parameters()
    layer.router.state.reset_parameters()
    for name, value in make_layer(2).gate.state_dict().items():
        assert torch.equal(layer.gate.state_dict()[name], value)
    layer(random(3, D))  # without ids
    sinkroute.set_step(layer, 1)
    assert (layer.gate.experts_VK >= 0).all()


def test_the_initial_values_are_the_published_ones():
    gate = make(experts=6, vocab_size=2000, light_dim=10).make_gate(20)
    for matrix in (gate.centroids, gate.light_centroids):
        torch.testing.assert_close(matrix @ matrix.t(), 0.01 * torch.eye(6))
    assert gate.embeddings.std().item() == pytest.approx(1, abs=0.03)


def test_gradients_of_the_gate_are_those_of_finite_differences():
    gate = make(vocab_size=4, light_dim=3).make_gate(D).double()
    ids, x_TD = torch.tensor([0, 3, 3]), random(3, D, dtype=torch.float64).requires_grad_()
    names, values = zip(*gate.named_parameters(), strict=True)

    def logits(x_TD, *values):
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (x_TD, ids))

    assert torch.autograd.gradcheck(logits, (x_TD, *values))


def test_a_gate_in_bfloat16_computes_in_the_dtype_of_the_tokens():
    gate, x_TD = make_layer(dtype=torch.bfloat16).gate, random(6, D)
    logits_TX = gate(x_TD, torch.arange(6))
    assert logits_TX.dtype == torch.float32
    torch.testing.assert_close(logits_TX[:, :E], F.linear(x_TD, gate.centroids.float()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_step": -1}, r"freeze_step must be an integer of 0 or more, got -1"),
        ({"vocab_size": 0}, r"vocab_size must be an integer of 1 or more, got 0"),
        ({"light_dim": 0}, r"light_dim must be an integer of 1 or more, got 0"),
        ({"balance_coefficient": -1}, r"balance_coefficient must be a finite number of 0 or more, got -1; 0\.3"),
        ({"distill_coefficient": float("inf")}, r"distill_coefficient must be a finite number of 0 or more, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
