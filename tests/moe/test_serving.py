"""What a model is when its training is over: with most methods a plain top-k model, to the last bit.

A router says so itself (`serving`); `SERVED` has those that need more, and those that are trained with options.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.routing.registry import router_options

WIDTH, EXPERTS, TOP_K, VOCAB = 16, 6, 2, 40


class Plain(NamedTuple):
    """It serves as the plain model with the same weights.

    Attributes:
        options: of the method in training.
        router_options: of the plain softmax router: some methods weigh otherwise.
        gate_bias: whether the gate has a bias.
        gate_rows: the gate's first rows are the plain gate; None: all.
        own_gate: the gate is none that other models have; the plain router takes its logits.
    """

    options: dict = {}  # noqa: RUF012  nobody writes to it
    router_options: dict = {}  # noqa: RUF012
    gate_bias: bool = False
    gate_rows: int | None = None
    own_gate: bool = False


class Otherwise(NamedTuple):
    """It needs more than the weights to serve.

    Attributes:
        options: of the method in training.
        what: it does instead.
        rule: (layer, x, ids) → experts and weights, by the textbook.
    """

    options: dict
    what: str
    rule: object


def softmax_over(logits_TE, experts_TK):
    return torch.softmax(logits_TE.gather(1, experts_TK), dim=1)


def by_bias(layer, x, ids):
    logits_TE, serving = layer.gate(x), layer.router.serving()
    values_TE = torch.softmax(logits_TE, 1) if serving.on == "scores" else logits_TE
    experts_TK = torch.topk(values_TE + serving.bias_E, TOP_K).indices
    return experts_TK, softmax_over(logits_TE, experts_TK)


def by_frozen_table(layer, x, ids):
    experts_TK = layer.gate.experts_VK[ids]
    return experts_TK, torch.sigmoid(x @ layer.gate.centroids.T).gather(1, experts_TK)


def by_hash(layer, x, ids):
    return layer.gate.experts_VK[ids], torch.full((len(x), TOP_K), 1 / TOP_K)


SSR = {"probability": 0.5, "noise": 1.0}
SERVED = {
    "load-balance": Plain({"coefficient": 1.0}),
    "gshard": Plain({"coefficient": 1.0}),
    "global-load-balance": Plain({"coefficient": 1.0}),
    "z-loss": Plain({"coefficient": 1.0}),
    "loss-free": Otherwise({"update_rate": 0.02}, "the K largest score + bias, weighted by score", by_bias),
    "noisy": Plain(gate_rows=EXPERTS),
    "base": Plain(router_options={"score": "sigmoid", "norm_topk": False}),
    "expert-choice": Plain(router_options={"norm_topk": False}),
    "xmoe": Plain(own_gate=True),
    "stable-moe": Otherwise({"freeze_step": 4, "vocab_size": VOCAB}, "the frozen experts of each id", by_frozen_table),
    "smoe-dropout": Plain(gate_bias=True),
    "hash": Otherwise({"vocab_size": VOCAB}, "the experts of each id, with equal weights", by_hash),
    "ssr-fold": Plain(SSR, gate_bias=True),
}


def served(name):
    options = SSR if "probability" in router_options(name) else {}
    serving = sinkroute.create_router(name, num_experts=EXPERTS, top_k=TOP_K).serving()
    plain = Plain(options) if serving is None or serving.plain else None
    return SERVED.get(name) or plain or Otherwise(options, "the K largest + bias, weighted by score", by_bias)


EVERY = {name: served(name) for name in sinkroute.list_routers()}
PLAIN = {name: promise for name, promise in EVERY.items() if isinstance(promise, Plain)}
OTHERWISE = {name: promise for name, promise in EVERY.items() if isinstance(promise, Otherwise)}


class Model(nn.Module):
    """Two layers, which are enough for an error in the first to show in the second."""

    def __init__(self, router, options, **sizes):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            sinkroute.MoE(WIDTH, 8, EXPERTS, TOP_K, router, router_options=options, **sizes) for _ in range(2)
        )

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x, token_ids=ids)
        return x


def batch(seed):
    return torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(seed))


def trained(name, options, steps=8):
    """A model whose training has just ended."""
    model = Model(name, options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        sinkroute.set_step(model, step, total_steps=steps)
        loss = (model(batch(step)) - 1).square().mean()
        for layer in model.layers:
            loss = loss + (0 if layer.routes.aux_loss is None else layer.routes.aux_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sinkroute.end_step(model)
    return model.eval()


def weights_of(model):
    return {key: value for key, value in model.state_dict().items() if ".router." not in key}


def assert_same(model, plain, ids, within=0.0):
    """To the last bit, unless told otherwise."""
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=within)
    for mine, theirs in zip(model.layers, plain.layers, strict=True):
        assert torch.equal(mine.routes.experts, theirs.routes.experts)
        torch.testing.assert_close(mine.routes.weights, theirs.routes.weights, rtol=0, atol=within)
        assert torch.equal(mine.routes.load, theirs.routes.load)


@pytest.mark.parametrize("name", PLAIN)
def test_the_served_model_is_the_plain_one_with_the_same_weights(name):
    promise = PLAIN[name]
    model = trained(name, promise.options)
    plain = Model("softmax", promise.router_options, gate_bias=promise.gate_bias).eval()
    weights = weights_of(model)
    for number, (layer, plain_layer) in enumerate(zip(model.layers, plain.layers, strict=True)):
        gate = f"layers.{number}.gate."
        if promise.own_gate:
            plain_layer.gate = type(layer.gate)(WIDTH, EXPERTS, EXPERTS // 2, 1.0)
        elif promise.gate_rows is not None:
            weights[gate + "weight"] = weights[gate + "weight"][: promise.gate_rows]
    plain.load_state_dict(weights)  # nothing is missing, nothing is left over
    for seed in range(100, 103):
        # A product with half as many rows may be computed in another order.
        assert_same(model, plain, batch(seed), within=0.0 if promise.gate_rows is None else 1e-5)


@pytest.mark.parametrize("name", OTHERWISE)
def test_methods_that_need_more_than_weights_serve_by_their_rule(name):
    method = OTHERWISE[name]
    model, ids = trained(name, method.options), batch(100)
    with torch.inference_mode():
        x = model.embed(ids)
        for layer in model.layers:
            y = layer(x, token_ids=ids)
            experts_TK, weights_TK = method.rule(layer, x, ids)
            order = layer.routes.experts.sort(1), experts_TK.sort(1)
            assert torch.equal(order[0].values, order[1].values), method.what
            torch.testing.assert_close(
                layer.routes.weights.gather(1, order[0].indices), weights_TK.gather(1, order[1].indices)
            )
            x = x + y


@pytest.mark.parametrize("name", [name for name, promise in OTHERWISE.items() if promise.rule is by_bias])
def test_a_bias_that_chooses_is_no_part_of_a_plain_model(name):
    model = trained(name, OTHERWISE[name].options)
    plain = Model("softmax", {}).eval()
    plain.load_state_dict(weights_of(model))
    with torch.inference_mode():
        model(batch(100)), plain(batch(100))
    assert not torch.equal(model.layers[0].routes.experts, plain.layers[0].routes.experts)


def test_ssr_bias_serves_as_a_plain_model_if_it_is_told_so():
    model = trained("ssr-bias", SSR | {"serve_with": "plain"})
    assert any(layer.router.state.bias_E.any() for layer in model.layers)
    plain = Model("softmax", {}).eval()
    plain.load_state_dict(weights_of(model))
    assert_same(model, plain, batch(100))


# -- folding the bias of ssr-bias ------------------------------------------------------------------------------------


def test_folding_the_bias_into_the_gate_changes_no_choice():
    model, ids = trained("ssr-bias", SSR), batch(100)
    layer, x = model.layers[0], model.embed(ids)
    before = layer.router(layer.gate(x))
    layer.router.fold_into(layer.gate)
    after, plain = layer.router(layer.gate(x)), sinkroute.create_router("softmax", num_experts=EXPERTS, top_k=TOP_K)
    assert torch.equal(after.experts, before.experts) and not torch.equal(after.weights, before.weights)
    assert torch.equal(plain(layer.gate(x)).experts, before.experts)
    assert not layer.router.state.bias_E.any()


def test_a_model_whose_biases_are_folded_loads_into_a_plain_model_with_biases_of_gates():
    model = trained("ssr-bias", SSR)
    for layer in model.layers:
        layer.router.fold_into(layer.gate)
    plain = Model("softmax", {}, gate_bias=True).eval()
    plain.load_state_dict(weights_of(model))
    for seed in range(100, 103):
        assert_same(model, plain, batch(seed))


def test_folding_adds_to_a_bias_that_is_there():
    router, gate = sinkroute.create_router("ssr-bias", num_experts=3, top_k=1), nn.Linear(2, 3)
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    router.state.bias_E.copy_(torch.tensor([0.5, 0.0, -0.5]))
    router.fold_into(gate)
    assert gate.bias.tolist() == [1.5, 2.0, 2.5] and isinstance(gate.bias, nn.Parameter)
    router.fold_into(gate)  # there is nothing left to add
    assert gate.bias.tolist() == [1.5, 2.0, 2.5]
