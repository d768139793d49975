"""The tokens of a step's plans: all of them, in their order, or a part that takes no more memory than is allowed."""

import pytest
import torch

import sinkroute
from sinkroute.routing import step_tokens
from sinkroute.routing.step_tokens import StepTokens

CPU = torch.device("cpu")


def test_all_real_tokens_are_kept_in_their_order():
    tokens = StepTokens()
    first_TE, second_TE = torch.randn(5, 3), torch.randn(4, 3, dtype=torch.float64)
    tokens.note(first_TE, torch.tensor([True, False, True, True, False]))
    tokens.note(second_TE, None)
    assert tokens.passes == 2
    kept_NE = tokens.take(3, CPU)
    assert torch.equal(kept_NE, torch.cat([first_TE[[0, 2, 3]], second_TE.float()]))
    assert tokens.passes == 0 and tokens.take(3, CPU).shape == (0, 3)


@pytest.mark.parametrize("passes", [1, 7])
def test_of_many_tokens_every_nth_is_kept_and_no_more_memory(monkeypatch, passes):
    monkeypatch.setattr(step_tokens, "MOST", 60)
    tokens = StepTokens()
    for number in range(passes):
        tokens.note(torch.arange(40.0).add(40 * number)[:, None].expand(40, 3), None)
    kept_N = tokens.take(3, CPU)[:, 0]
    assert 10 <= len(kept_N) <= 20  # 60 numbers
    of_pass = kept_N.div(40).long().bincount(minlength=passes)
    assert of_pass.min() >= 1 and of_pass.max() - of_pass.min() <= 1  # as many of each
    tokens.note(torch.zeros(3, 3), None)
    assert len(tokens.take(3, CPU)) == 3  # the next step begins with all


def test_a_plan_of_several_micro_batches_balances_all_of_them():
    """Each half alone would want the other half's experts; together they are even."""
    router = sinkroute.create_router("ssr-dual", num_experts=4, top_k=1)
    half_TE = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    parts = [half_TE + torch.tensor([4.0, 0, 0, 0]), half_TE + torch.tensor([0.0, 4, 0, 0])]
    for part, logits_TE in enumerate(parts):
        sinkroute.set_step(router, 0, part)
        router(logits_TE)
    sinkroute.end_step(router)
    load_E = (torch.cat(parts) + router.state.bias_E).argmax(1).bincount(minlength=4)
    assert load_E.max() <= 1.02 * 128
