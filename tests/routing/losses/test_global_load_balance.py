"""The load-balancing loss over a step's micro-batches, on one process."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import sinkroute
from sinkroute.routing.losses.load_balance import load_balance_loss


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def global_router(experts=4, top_k=2, **options):
    options = {"coefficient": 1.0} | options
    return sinkroute.create_router("global-load-balance", num_experts=experts, top_k=top_k, **options)


def test_loss_and_gradient_worked_by_hand():
    # First micro-batch: scores (3/4, 1/4), top-1: f = (1, 0): 2 · 3/4 = 1.5. Second: scores (1/4, 3/4), but f is of
    # both, (1/2, 1/2): 2 · (1/2 · 1/4 + 1/2 · 3/4) = 1, and even f has no gradient. Alone it would be 1.5 again.
    router = global_router(2, 1)
    sinkroute.set_step(router, 0)
    assert router(torch.tensor([[3.0, 1.0]]).log()).aux_loss.item() == pytest.approx(1.5)
    sinkroute.set_step(router, 0, micro_batch=1)
    logits_TE = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    loss = router(logits_TE).aux_loss
    loss.backward()
    assert loss.item() == pytest.approx(1)
    torch.testing.assert_close(logits_TE.grad, torch.zeros(1, 2))


def test_the_coefficient_scales_the_loss():
    logits_TE = torch.tensor([[3.0, 1.0]]).log()
    assert sinkroute.create_router("global-load-balance", num_experts=2, top_k=1)(
        logits_TE
    ).aux_loss.item() == pytest.approx(0.015)
    assert global_router(2, 1, coefficient=0.2)(logits_TE).aux_loss.item() == pytest.approx(0.3)


def test_every_micro_batch_has_the_load_of_those_so_far_and_its_own_scores():
    router, load_E = global_router(), torch.zeros(4, dtype=torch.int64)
    for micro_batch in range(3):
        sinkroute.set_step(router, 5, micro_batch)
        ours, theirs = (random(7 + micro_batch, 4, seed=micro_batch).requires_grad_() for _ in range(2))
        routes = router(ours)
        load_E = load_E + routes.load
        expected = load_balance_loss(theirs, load_E)
        torch.testing.assert_close(routes.aux_loss, expected)
        routes.aux_loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_new_step_begins_with_no_load():
    router, logits_TE = global_router(), random(10, 4)
    sinkroute.set_step(router, 0)
    first = router(logits_TE).aux_loss
    sinkroute.set_step(router, 0, micro_batch=1)
    router(random(10, 4, seed=1) + torch.tensor([9.0, 0, 0, 0]))
    sinkroute.set_step(router, 1)
    assert router(logits_TE).aux_loss == first


def test_without_set_step_every_batch_is_a_step():
    router, logits_TE = global_router(), random(10, 4)
    first = router(logits_TE).aux_loss
    router(random(10, 4, seed=1) + torch.tensor([9.0, 0, 0, 0]))
    assert router(logits_TE).aux_loss == first


def test_an_evaluation_within_a_step_is_not_counted():
    router, logits_TE = global_router(), random(10, 4)
    expected = copy.deepcopy(router)
    for one, evaluated in ((router, True), (expected, False)):
        sinkroute.set_step(one, 0)
        one(random(10, 4, seed=1))
        if evaluated:
            one.eval()(random(10, 4, seed=2))
            one.train()
        sinkroute.set_step(one, 0, micro_batch=1)
    assert router(logits_TE).aux_loss == expected(logits_TE).aux_loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_repeated_for_checkpointing_has_the_same_loss_and_counts_once(reentrant):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = global_router()
            self.passes, self.aux_loss = 0, None

        def forward(self, logits_TE):
            self.passes += 1
            routes = self.router(logits_TE)
            self.aux_loss = routes.aux_loss
            return routes.weights

    gradients, losses = [], []
    for checkpointed in (True, False):
        layer, logits, aux_losses = Layer(), [], []
        for micro_batch in range(2):
            sinkroute.set_step(layer, 0, micro_batch)
            logits.append(random(10, 4, seed=micro_batch).requires_grad_())
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(layer, logits[-1], use_reentrant=reentrant)
            else:
                out = layer(logits[-1])
            aux_losses.append(layer.aux_loss)
            (out[:, 0].sum() + aux_losses[-1]).backward()
        gradients.append([z.grad for z in logits])
        losses.append([loss.item() for loss in aux_losses])
        assert layer.passes == (4 if checkpointed else 2)
    assert losses[0] == losses[1]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_masked_tokens_do_not_count():
    router, alone = global_router(), global_router()
    for micro_batch in range(2):
        logits_TE, mask = random(9, 4, seed=micro_batch), torch.arange(9) % 3 != micro_batch
        sinkroute.set_step(router, 0, micro_batch)
        sinkroute.set_step(alone, 0, micro_batch)
        torch.testing.assert_close(router(logits_TE, mask).aux_loss, alone(logits_TE[mask]).aux_loss)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_micro_batch_without_a_real_token_costs_nothing(tokens):
    router = global_router()
    sinkroute.set_step(router, 0)
    router(random(10, 4))
    sinkroute.set_step(router, 0, micro_batch=1)
    logits_TE = random(tokens, 4).requires_grad_()
    loss = router(logits_TE, torch.zeros(tokens, dtype=torch.bool)).aux_loss
    loss.backward()
    assert loss.item() == 0 and not logits_TE.grad.any()
