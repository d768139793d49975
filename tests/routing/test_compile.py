"""Routers under `torch.compile`: whole graphs, results and gradients of eager mode, no new graph with every step."""

import pytest
import torch
from packaging.version import Version

import sinkroute
from sinkroute.routing.registry import router_options

# What a router must be told before it can be trained.
NEEDED = {"stable-moe": {"freeze_step": 100}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    # Compiling anew more often than a test says is an error.
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts what it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph


def make(name, **options):
    return sinkroute.create_router(name, num_experts=8, top_k=2, **NEEDED.get(name, {}), **options)


def logits(router, tokens=20, seed=0):
    width = router.num_experts * router.logit_parts
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def assert_same(routes, expected):
    assert torch.equal(routes.experts, expected.experts) and torch.equal(routes.weights, expected.weights)
    assert torch.equal(routes.load, expected.load) and routes.branch == expected.branch
    assert (routes.aux_loss is None) == (expected.aux_loss is None)
    if routes.aux_loss is not None:
        assert torch.equal(routes.aux_loss, expected.aux_loss)


def trained_by(function, logits_TE, token_mask=None):
    """Routes, and the gradient of a loss that sees the weights unevenly."""
    logits_TE = logits_TE.clone().requires_grad_()
    routes = function(logits_TE, token_mask)
    loss = (routes.weights * torch.arange(routes.weights.numel()).view_as(routes.weights)).sum()
    (loss if routes.aux_loss is None else loss + routes.aux_loss).backward()
    return routes, logits_TE.grad


@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_serving_is_one_graph_with_the_routes_of_eager_mode(name):
    router = make(name).eval()
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    mask = torch.arange(20) % 3 != 1
    assert_same(compiled(logits(router), mask), router(logits(router), mask))


# Routers whose training depends on nothing but the batch and the step, and the SSR family between its plans.
ONE_GRAPH = [
    ("softmax", {"losses": "z-loss, load-balance"}),
    ("noisy", {}),
    ("loss-free", {}),
    ("smebu", {}),
    ("bip", {}),
    ("stable-moe", {}),
    ("ssr-l", {"probability": 0.0, "noise": 0}),
    ("ssr-l", {"probability": 0.0}),
    ("ssr-s", {"probability": 0.0, "noise": 0}),
    ("ssr-s", {"probability": 0.0}),
    ("ssr-s", {"probability": 0.0, "noise": "learned"}),
]


@pytest.mark.parametrize(("name", "options"), ONE_GRAPH)
def test_training_is_one_graph_over_all_steps_with_the_gradients_of_eager_mode(name, options):
    compiled_router, router = make(name, **options), make(name, **options)
    compiled = torch.compile(compiled_router, fullgraph=True, backend="aot_eager")  # and compiled once
    mask = torch.arange(20) % 3 != 1
    for step in range(8):
        for either in (compiled_router, router):
            sinkroute.set_step(either, step, step % 2)
        batch = logits(router, seed=step % 3)
        (routes, gradient), (expected, expected_gradient) = (
            trained_by(compiled, batch, mask),
            trained_by(router, batch, mask),
        )
        assert_same(routes, expected)
        assert torch.equal(gradient, expected_gradient) and gradient.any()
        for mine, theirs in zip(compiled_router.parameters(), router.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
    # What is remembered is what eager mode remembers.
    for either in (compiled_router, router):
        sinkroute.end_step(either)
    for key, value in router.state_dict().items():
        assert torch.equal(compiled_router.state_dict()[key], value), key


def test_the_noise_of_a_compiled_step_is_that_of_its_key():
    router = make("ssr-s", probability=0.0, noise=4.0)
    compiled, drawn = torch.compile(router, fullgraph=True, backend="aot_eager"), []
    for step in (1, 2, 1):
        sinkroute.set_step(router, step)
        drawn.append(compiled(torch.zeros(20, 8)).weights)
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_a_strength_of_noise_that_changes_every_step_is_compiled_twice_at_most():
    graphs = Graphs()
    with torch._dynamo.config.patch(recompile_limit=2):  # as a number, then as any number
        router = make("ssr-s", probability=0.0, noise="linear(1, 0.1, 100)")
        compiled = torch.compile(router, fullgraph=True, backend=graphs)
        for step in range(10):
            sinkroute.set_step(router, step)
            assert_same(compiled(logits(router)), router(logits(router)))
    assert graphs.count <= 2


def test_the_load_of_the_batch_is_the_same_graph_for_all_micro_batches_but_the_first():
    graphs, compiled_router, router = Graphs(), make("global-load-balance"), make("global-load-balance")
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(compiled_router, fullgraph=True, backend=graphs)
        for step in range(2):
            for micro_batch in range(5):
                for either in (compiled_router, router):
                    sinkroute.set_step(either, step, micro_batch)
                batch = logits(router, seed=micro_batch)
                assert_same(compiled(batch), router(batch))
    assert graphs.count == 2


@pytest.mark.parametrize("name", ["sinkhorn", "base", "expert-choice", "ssr-l", "ssr-s", "ssr-b", "ssr-ec", "ssr-bias"])
def test_a_step_that_solves_breaks_the_graph_once(name):
    options = {"probability": 1.0} if "probability" in router_options(name) else {}
    router = make(name, **options)
    explained = torch._dynamo.explain(router)(logits(router))
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)


@pytest.mark.parametrize(("name", "plan_gradient"), [("ssr-l", "none"), ("ssr-s", "full"), ("ssr-bias", "none")])
def test_switching_between_branches_compiles_each_once(name, plan_gradient):
    graphs, branches = Graphs(), []
    compiled_router, router = (make(name, probability=0.5, plan_gradient=plan_gradient) for _ in range(2))
    # The branch is known when the router is entered: two versions, and one of what comes after the plan.
    # Before torch 2.13, once more: for the number of a plan's passes, which it takes for a constant at first.
    more = Version(torch.__version__) < Version("2.13")
    with torch._dynamo.config.patch(recompile_limit=2 + more):
        compiled = torch.compile(compiled_router, backend=graphs)
        for step in range(12):
            for either in (compiled_router, router):
                sinkroute.set_step(either, step)
            batch = logits(router, seed=step % 3)
            (routes, gradient), (expected, expected_gradient) = trained_by(compiled, batch), trained_by(router, batch)
            assert_same(routes, expected)
            assert torch.equal(gradient, expected_gradient)
            branches.append(routes.branch)
    assert {*branches[:6]} == {*branches[6:]} == {"softmax", "sinkhorn"}
    assert graphs.count <= 4 + more
