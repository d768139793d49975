"""Activation checkpointing: every training rule gives the same output, gradients and state as without it."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sinkroute
from sinkroute.routing.losses.registry import LOSSES
from sinkroute.routing.registry import router_options

D, E, K, TOKENS, STEPS = 6, 5, 2, 12, 3
LOSS = {"losses": {"load-balance": 0.5, "global-load-balance": 0.25, "z-loss": 0.125}}


def rules():
    """Every router; those with several training rules by each."""
    for name in sinkroute.list_routers():
        if "probability" not in router_options(name):
            yield pytest.param(name, LOSS, id=name)
            continue
        for probability in (0.0, 1.0, "adaptive(high=0.1, low=0.05)"):
            options = LOSS | {"probability": probability, "noise": 1.0, "noise_scale": "absolute"}
            yield pytest.param(name, options, id=f"{name}, p = {probability}")
    yield pytest.param("ssr-s", LOSS | {"probability": 1.0, "plan_gradient": "full"}, id="ssr-s, full gradient")
    yield pytest.param("ssr-l", LOSS | {"probability": 0.5, "draw": "layer", "noise": "learned"}, id="ssr-l, learned")
    yield pytest.param("quantile", LOSS | {"scope": "batch", "score": "sigmoid"}, id="quantile, batch")


every_rule = pytest.mark.parametrize(("name", "options"), list(rules()))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self, name, options):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.moe = sinkroute.MoE(D, 8, E, K, router=name, router_options=options)

    def forward(self, x, token_ids):
        return x + self.moe(self.norm(x), token_ids=token_ids)


def some_are_kept():
    """Every second result of some operations, as torchtitan keeps those of matrix products."""
    aten, seen = torch.ops.aten, Counter()
    kept = {aten.mm.default, aten.addmm.default, aten.gather.default, aten._softmax.default, aten.topk.default}

    def policy(context, operation, *args, **kwargs):
        seen[operation, context.is_recompute] += 1
        keep = operation in kept and seen[operation, context.is_recompute] % 2
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Model(nn.Module):
    """Two blocks, each recomputed in the backward pass if `use_reentrant` is not None."""

    def __init__(self, name, options, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(name, options) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x, token_ids):
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x, token_ids)
            elif self.use_reentrant == "selective":
                x = checkpoint(block, x, token_ids, use_reentrant=False, context_fn=some_are_kept)
            else:
                x = checkpoint(block, x, token_ids, use_reentrant=self.use_reentrant)
        return x

    def aux_loss(self):
        losses = [block.moe.routes.aux_loss for block in self.blocks]
        return sum(loss for loss in losses if loss is not None)


def train(model, micro_batches=2, scale=1.0, total_steps=STEPS):
    """What came out and what was learnt: outputs, losses and gradients of each step, and the state at the end."""
    record = []
    for step in range(STEPS):
        model.zero_grad()
        for part in range(micro_batches):
            sinkroute.set_step(model, step, part, total_steps=total_steps)
            x = random(TOKENS, D, seed=10 * step + part).requires_grad_()
            y = model(x, torch.arange(TOKENS) % 7)
            loss = scale * ((y * random(TOKENS, D, seed=99)).sum() + model.aux_loss())
            loss.backward()
            record += [y.detach(), loss.detach(), x.grad]
        record += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 / scale * parameter.grad
    sinkroute.end_step(model)
    return record + list(model.state_dict().values())


@every_rule
@pytest.mark.parametrize("use_reentrant", [True, False, "selective"], ids=["reentrant", "not reentrant", "selective"])
def test_recomputation_changes_neither_output_nor_gradients_nor_state(name, options, use_reentrant):
    plain = train(Model(name, options))
    model = Model(name, options, use_reentrant)
    with sinkroute.LoadMonitor(model, "detailed"):  # has work in first passes alone
        repeated = train(model)
    assert len(plain) == len(repeated)
    for ours, theirs in zip(repeated, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_alone_keeps_its_gradient(loss, use_reentrant):
    # Nothing else has a gradient here: the output is not in what is differentiated.
    options, gradients = {"losses": {loss: 3.0}}, []
    for reentrant in (None, use_reentrant):
        model = Model("softmax", options, reentrant)
        sinkroute.set_step(model, 0)
        y = model(random(TOKENS, D).requires_grad_(), torch.zeros(TOKENS, dtype=torch.int64))
        (0 * y.sum() + model.aux_loss()).backward()
        gradients.append([block.moe.gate.weight.grad for block in model.blocks])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_scaled_loss_has_scaled_gradients(use_reentrant):
    # What a gradient scaler for float16 does. A power of two: the same bits.
    results = []
    for scale in (1.0, 2.0**16):
        model = Model("load-balance", {"coefficient": 1.0}, use_reentrant)
        sinkroute.set_step(model, 0)
        y = model(random(TOKENS, D).requires_grad_(), torch.zeros(TOKENS, dtype=torch.int64))
        (scale * (y.square().sum() + model.aux_loss())).backward()
        results.append([parameter.grad / scale for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_loss_that_is_left_out_has_no_gradient(use_reentrant):
    gradients = []
    for coefficient in (0.0, 1.0):
        model = Model("load-balance", {"coefficient": coefficient}, use_reentrant)
        y = model(random(TOKENS, D).requires_grad_(), torch.zeros(TOKENS, dtype=torch.int64))
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def gate_gradient(run, name="load-balance", **options):
    layer = sinkroute.MoE(D, 8, E, K, router=name, router_options={"coefficient": 1.0} | options)
    layer.load_state_dict(Model(name, {"coefficient": 1.0} | options).blocks[0].moe.state_dict())
    run(layer)
    return layer.gate.weight.grad


def test_a_layer_that_is_used_twice_keeps_the_gradients_of_both_losses():
    def plain(layer):
        first = layer(random(TOKENS, D))
        loss = layer.routes.aux_loss
        second = layer(first)
        (second.sum() + 2 * loss + 3 * layer.routes.aux_loss).backward()

    def repeated(layer):
        first = checkpoint(layer, random(TOKENS, D).requires_grad_(), use_reentrant=True)
        loss = layer.routes.aux_loss
        second = checkpoint(layer, first, use_reentrant=True)
        (second.sum() + 2 * loss + 3 * layer.routes.aux_loss).backward()

    torch.testing.assert_close(gate_gradient(repeated), gate_gradient(plain), rtol=0, atol=1e-6)


def test_a_trial_without_gradients_does_not_take_the_loss_away():
    def plain(layer):
        (layer(random(TOKENS, D)).sum() + layer.routes.aux_loss).backward()

    def repeated(layer):
        y = checkpoint(layer, random(TOKENS, D).requires_grad_(), use_reentrant=True)
        loss = y.sum() + layer.routes.aux_loss
        with torch.no_grad():
            layer(random(TOKENS, D, seed=1))  # between the forward and the backward pass of another
        loss.backward()

    torch.testing.assert_close(gate_gradient(repeated), gate_gradient(plain), rtol=0, atol=1e-6)


def test_a_checkpoint_within_a_checkpoint_keeps_the_gradient_of_the_loss():
    def nested(layer):
        def inner(x):
            return checkpoint(layer, x, use_reentrant=True)

        y = checkpoint(inner, random(TOKENS, D).requires_grad_(), use_reentrant=True)
        (y.sum() + layer.routes.aux_loss).backward()

    def plain(layer):
        (layer(random(TOKENS, D)).sum() + layer.routes.aux_loss).backward()

    torch.testing.assert_close(gate_gradient(nested), gate_gradient(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["loss-free", "quantile"])
def test_a_checkpointed_layer_that_is_compiled_counts_once(name, use_reentrant):
    torch._dynamo.reset()
    router = sinkroute.create_router(name, num_experts=E, top_k=K)
    compiled = torch.compile(lambda logits_TE: router(logits_TE).weights ** 2, backend="eager")
    for part in range(2):
        sinkroute.set_step(router, 0, part)
        checkpoint(compiled, random(TOKENS, E).requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    torch._dynamo.reset()
    assert router.state.load_E.sum() == 2 * K * TOKENS
    assert name == "loss-free" or router.state.passes == 2


# -- pipelined schedules: other micro-batches between a forward and its backward pass --------------------------------


def pipelined(model, keys, backward_keys):
    """All forward passes, then the backward passes in the same order, told the key unless it is None."""
    losses = []
    for part, key in enumerate(keys):
        sinkroute.set_step(model, 0, key)
        y = model(random(TOKENS, D, seed=part).requires_grad_(), torch.arange(TOKENS) % 7)
        losses.append(y.square().sum() + model.aux_loss())
    for loss, key in zip(losses, backward_keys, strict=True):
        if key is not None:
            sinkroute.set_step(model, 0, key)
        loss.backward()
    sinkroute.end_step(model)
    return [parameter.grad for parameter in model.parameters()] + list(model.state_dict().values())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    ("keys", "backward_keys"),
    [
        pytest.param([0, 1, 2], [0, 1, 2], id="told before each backward pass"),
        pytest.param([0, 0, 0], [None, None, None], id="one key for all"),
    ],
)
def test_pipelined_micro_batches_are_repeated_as_they_were(keys, backward_keys, use_reentrant):
    options = {
        "probability": 0.5,
        "draw": "layer",
        "noise": 2.0,
        "noise_scale": "absolute",
        "losses": "load-balance: 1",
    }
    expected = pipelined(Model("ssr-bias", options), keys, backward_keys)
    found = pipelined(Model("ssr-bias", options, use_reentrant), keys, backward_keys)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# -- keyed draws -----------------------------------------------------------------------------------------------------


def noisy_router(**options):
    return sinkroute.create_router("ssr-s", num_experts=E, top_k=K, noise=3.0, noise_scale="absolute", **options)


def test_a_new_router_told_the_same_step_draws_the_same():
    logits_TE, old = random(TOKENS, E), noisy_router(probability=0.5, seed=3)
    for step in range(20):
        sinkroute.set_step(old, step, 1)
        new = noisy_router(probability=0.5, seed=3)
        sinkroute.set_step(new, step, 1)
        one, other = old(logits_TE), new(logits_TE)
        assert one.branch == other.branch and torch.equal(one.experts, other.experts)


@every_rule
def test_no_router_reads_or_moves_the_global_generator_in_training(name, options):
    outputs, model = [], Model(name, options)
    start = copy.deepcopy(model.state_dict())
    for seed in (1, 2):
        model.load_state_dict(start)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sinkroute.set_step(model, 0, total_steps=STEPS)
        outputs.append(model(random(TOKENS, D), torch.arange(TOKENS) % 7).detach())
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*outputs)


def test_the_branch_of_a_step_is_that_of_all_its_micro_batches_unless_drawn_per_layer():
    for draw, several in (("step", False), ("layer", True)):
        router, branches = noisy_router(probability=0.5, draw=draw), []
        for step in range(30):
            taken = set()
            for part in range(4):
                sinkroute.set_step(router, step, part)
                taken.add(router(random(TOKENS, E)).branch)
            branches.append(taken)
        assert any(len(taken) == 2 for taken in branches) == several
        assert set.union(*branches) == {"softmax", "sinkhorn"}


def test_one_micro_batch_has_the_branch_of_the_same_step_in_four():
    routers = [noisy_router(probability=0.5) for _ in range(2)]
    for step in range(30):
        sinkroute.set_step(routers[0], step)
        whole = routers[0](random(4 * TOKENS, E)).branch
        for part in range(4):
            sinkroute.set_step(routers[1], step, part)
            assert routers[1](random(TOKENS, E)).branch == whole


def test_the_micro_batches_of_a_step_have_different_noise():
    router, noises = noisy_router(), []
    for part in range(4):
        sinkroute.set_step(router, 5, part)
        noises.append(router.draw_normal(torch.empty(TOKENS, E)))
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4


@pytest.mark.parametrize("first", [0, 1])
def test_a_repetition_meets_the_batch_load_of_its_own_pass_though_another_came_in_between(first):
    # Two passes under one key, as in a pipeline that leaves micro_batch at 0: F0 F1 B0 B1, or B1 B0.
    def gradient(use_reentrant):
        torch.manual_seed(0)
        layer = sinkroute.MoE(D, 8, E, K, router="global-load-balance", router_options={"coefficient": 1.0})
        sinkroute.set_step(layer, 0)
        losses = []
        for part in range(2):
            x = random(TOKENS, D, seed=part).requires_grad_()
            y = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
            losses.append(y.sum() + layer.routes.aux_loss)
        for part in (first, 1 - first):
            losses[part].backward()
        return layer.gate.weight.grad

    torch.testing.assert_close(gradient(use_reentrant=False), gradient(None))
