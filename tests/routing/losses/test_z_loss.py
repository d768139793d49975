"""The router z-loss, by hand."""

import math

import pytest
import torch

import sinkroute
from sinkroute.routing.losses.z_loss import z_loss


def z_router(experts, top_k, **options):
    return sinkroute.create_router("z-loss", num_experts=experts, top_k=top_k, **options)


def test_loss_and_gradient_worked_by_hand():
    # Rows (0, 0) and (ln 3, 0): log-sum-exps ln 2 and ln 4 = 2 ln 2; mean square (1 + 4)/2 · (ln 2)² = 2.5 (ln 2)².
    # Gradient: (2/T) · lse_i · softmax_ij: ln 2 · (1/2, 1/2) and 2 ln 2 · (3/4, 1/4).
    logits_TE = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log().requires_grad_()
    loss = z_loss(logits_TE)
    loss.backward()
    assert loss.item() == pytest.approx(2.5 * math.log(2) ** 2)
    torch.testing.assert_close(logits_TE.grad, math.log(2) * torch.tensor([[0.5, 0.5], [1.5, 0.5]]))


def test_the_router_scales_the_loss_by_its_coefficient():
    logits_TE = torch.zeros(5, 4)  # (ln 4)² = 1.9218
    assert z_router(4, 2)(logits_TE).aux_loss.item() == pytest.approx(1e-3 * math.log(4) ** 2)
    assert z_router(4, 2, coefficient=2.0)(logits_TE).aux_loss.item() == pytest.approx(2 * math.log(4) ** 2)


def test_masked_tokens_do_not_count():
    logits_TE = torch.tensor([[0.0, 0.0], [50.0, 60.0], [0.0, 0.0]])
    mask = torch.tensor([True, False, True])
    assert z_router(2, 1, coefficient=1.0)(logits_TE, mask).aux_loss.item() == pytest.approx(math.log(2) ** 2)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_real_token_loss_and_gradient_are_0(tokens):
    logits_TE = torch.ones(tokens, 4, requires_grad=True)
    routes = z_router(4, 2)(logits_TE, torch.zeros(tokens, dtype=torch.bool))
    routes.aux_loss.backward()
    assert routes.aux_loss.item() == 0 and torch.equal(logits_TE.grad, torch.zeros(tokens, 4))


def test_no_loss_when_serving():
    assert z_router(4, 2).eval()(torch.zeros(3, 4)).aux_loss is None
