"""GShard's loss: by hand, and beside the loss over all choices."""

import pytest
import torch

import sinkroute
from sinkroute.routing.losses.gshard import gshard_loss
from sinkroute.routing.losses.load_balance import load_balance_loss


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_loss_and_gradient_worked_by_hand():
    # Scores (1/2, 1/3, 1/6) twice and (1/6, 1/3, 1/2); first choices 0, 0, 2: f = (2/3, 0, 1/3).
    # P = (7/18, 6/18, 5/18): 3 · (2/3 · 7/18 + 1/3 · 5/18) = 19/18.
    # Gradient of a token with scores p, f fixed: (3/3) · p_j (f_j − Σ f p): for the first, Σ f p = 7/18.
    logits_TE = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]).log().requires_grad_()
    loss = gshard_loss(logits_TE, torch.tensor([[0, 1], [0, 1], [2, 1]]))
    loss.backward()
    assert loss.item() == pytest.approx(19 / 18)
    torch.testing.assert_close(logits_TE.grad[0], torch.tensor([5 / 36, -7 / 54, -1 / 108]))


def test_the_router_has_the_loss_with_its_coefficient():
    logits_TE = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]).log()
    for coefficient, options in ((0.01, {}), (0.5, {"coefficient": 0.5})):
        routes = sinkroute.create_router("gshard", num_experts=3, top_k=2, **options)(logits_TE)
        assert routes.aux_loss.item() == pytest.approx(coefficient * 19 / 18)
        assert routes.load.tolist() == [2, 3, 1]  # of both choices; the loss has (2, 0, 1)


def test_with_one_expert_per_token_it_is_the_loss_of_the_switch_transformer():
    logits_TE = random(20, 5)
    gshard, switch = (sinkroute.create_router(n, num_experts=5, top_k=1)(logits_TE) for n in ("gshard", "load-balance"))
    assert gshard.aux_loss == switch.aux_loss


def test_it_is_the_other_loss_for_the_load_of_first_choices():
    logits_TE, experts_TK = random(20, 5), random(20, 5, seed=1).topk(3).indices
    first_load_E = torch.tensor([int((experts_TK[:, 0] == expert).sum()) for expert in range(5)])
    for score in ("softmax", "sigmoid"):
        expected = load_balance_loss(logits_TE, first_load_E, score=score)
        assert gshard_loss(logits_TE, experts_TK, score=score) == expected


def test_masked_tokens_do_not_count():
    logits_TE, mask = random(9, 4), torch.arange(9) % 3 != 1
    padded, alone = logits_TE.clone().requires_grad_(), logits_TE[mask].clone().requires_grad_()
    router = sinkroute.create_router("gshard", num_experts=4, top_k=2)
    loss, expected = router(padded, mask).aux_loss, router(alone).aux_loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(padded.grad[mask], alone.grad)
    assert not padded.grad[~mask].any()


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_real_token_loss_and_gradient_are_0(tokens):
    logits_TE = random(tokens, 4).requires_grad_()
    routes = sinkroute.create_router("gshard", num_experts=4, top_k=2)(logits_TE, torch.zeros(tokens, dtype=torch.bool))
    routes.aux_loss.backward()
    assert routes.aux_loss.item() == 0 and not logits_TE.grad.any()


def test_a_token_that_no_expert_took_has_no_first_choice():
    # Expert choice fills such a token's places up; they are no choices.
    logits_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    router = sinkroute.create_router("expert-choice", num_experts=4, top_k=1, losses={"gshard": 1.0})
    routes = router(logits_TE)
    firsts = [row[0] for row, chosen in zip(routes.experts.tolist(), routes.chosen.tolist(), strict=True) if chosen[0]]
    assert 0 < len(firsts) < 40
    share_E = torch.tensor([firsts.count(expert) / len(firsts) for expert in range(4)])
    expected = 4 * (share_E * logits_TE.softmax(1).mean(0)).sum()
    torch.testing.assert_close(routes.aux_loss, expected)
