"""Equal experts: who is chosen where the gate cannot tell them apart, at the start of a training."""

import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation

QUIET = {"noise": 0.0, "probability": 0.0}
PLANNED = {"noise": 0.0, "probability": 1.0}
METHODS = [
    ("softmax", {}),
    ("softmax", {"score": "sigmoid"}),
    ("softmax", {"groups": 4, "top_groups": 2}),
    ("softmax", {"groups": 4, "top_groups": 2, "group_score": "max"}),
    ("load-balance", {}),
    ("loss-free", {}),
    ("smebu", {}),
    ("quantile", {}),
    ("bip", {}),
    ("gshard", {}),
    ("sinkhorn", {}),
    ("smoe-dropout", {"training_k": 2}),
    ("expert-choice", {}),
    ("ssr-l", QUIET),
    ("ssr-l", PLANNED),
    ("ssr-s", PLANNED),
    ("ssr-ec", PLANNED),
    ("ssr-bias", QUIET),
]


def make(name, experts=8, top_k=2, **options):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.filterwarnings("ignore:smoe-dropout stays")
def test_a_gate_of_zeros_is_spread_evenly_in_training(name, options):
    logits_TE = torch.zeros(4000, 8)
    router = make(name, ties="spread", **options)
    sinkroute.set_step(router, 3)
    routes = router(logits_TE)
    # A load of 1000 has a standard deviation of 27. Without the option it is 4000 for two experts, MaxVio 3.
    assert max_violation(routes.load) < 0.15
    plain = make(name, **options)
    sinkroute.set_step(plain, 3)
    if name != "expert-choice" and name != "ssr-ec":  # there it is the tokens that are equal
        assert plain(logits_TE).load.tolist() == [4000, 4000, 0, 0, 0, 0, 0, 0]
        torch.testing.assert_close(routes.weights, plain(logits_TE).weights)
    else:
        chosen = [(r(logits_TE).weights > 0).any(1).sum() for r in (router, plain)]
        assert chosen[0] > 3000 and chosen[1] == 1000


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.filterwarnings("ignore:smoe-dropout stays")
def test_serving_does_not_know_of_it(name, options):
    logits_TE = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).round()
    spread, first = make(name, ties="spread", **options).eval()(logits_TE), make(name, **options).eval()(logits_TE)
    assert torch.equal(spread.experts, first.experts) and torch.equal(spread.weights, first.weights)


def test_without_ties_it_changes_nothing():
    logits_TE = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    spread, first = make("softmax", ties="spread")(logits_TE), make("softmax")(logits_TE)
    assert torch.equal(spread.experts, first.experts) and torch.equal(spread.weights, first.weights)


def test_the_order_depends_on_step_layer_micro_batch_and_seed_and_on_nothing_else():
    logits_TE, seen = torch.zeros(100, 8), []
    for seed, layer, step, part in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        router = make("softmax", ties="spread", seed=seed, layer=layer)
        sinkroute.set_step(router, step, part)
        seen.append(router(logits_TE).experts)
        torch.manual_seed(0)
        assert torch.equal(router(logits_TE).experts, seen[-1])
    assert all((one != other).any() for n, one in enumerate(seen) for other in seen[:n])


def test_compiled_training_draws_the_same_order():
    logits_TE, router = torch.zeros(64, 8), make("softmax", ties="spread")
    compiled = torch.compile(router, backend="eager")
    for step in range(2):
        sinkroute.set_step(router, step)
        assert torch.equal(compiled(logits_TE).experts, router(logits_TE).experts)


def test_a_model_that_has_chosen_already_is_not_believed_in_training():
    for name, options in (("softmax", {}), ("ssr-l", QUIET)):
        router = make(name, ties="spread", **options)
        assert not router.is_plain() and router.eval().is_plain()


def upcycled(ties):
    """A layer whose experts are copies of one, behind a gate of zeros."""
    torch.manual_seed(0)
    layer = sinkroute.MoE(16, 16, 4, 2, router="softmax", router_options={"ties": ties})
    with torch.no_grad():
        layer.gate.weight.zero_()
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    return layer


@pytest.mark.parametrize(("ties", "learns"), [("first", False), ("spread", True)])
def test_copies_of_one_expert_part_and_the_gate_learns_only_where_they_are_spread(ties, learns):
    layer, generator = upcycled(ties), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    x, target = torch.randn(2, 256, 16, generator=generator)
    for step in range(6):
        sinkroute.set_step(layer, step)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool(layer.gate.weight.abs().max() > 1e-5) is learns
    layer.eval()(x)
    assert bool((layer.routes.load == 0).any()) is not learns  # first: two experts have all tokens for ever


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="unknown ties 'spred'; did you mean 'spread'"):
        make("softmax", ties="spred")


def test_without_steps_it_warns_that_draws_repeat():
    router, logits_TE = make("softmax", ties="spread"), torch.zeros(4, 8)
    for _ in range(63):
        router(logits_TE)
    with pytest.warns(UserWarning, match="Call sinkroute.set_step"):
        router(logits_TE)
