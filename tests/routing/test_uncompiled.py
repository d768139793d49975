"""Routers under `torch.compile`: the same routes, and no new compilation with every step."""

import pytest
import torch

import sinkroute


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options"),
    [("softmax", {}), ("ssr-s", {"probability": 0.0}), ("ssr-s", {"probability": 1.0}), ("sinkhorn", {})],
)
def test_compiled_routers_route_alike_and_are_compiled_once(name, options):
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    compiled = torch.compile(router, backend=count)
    logits_TE, counts = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), []
    for step in range(12):  # far more than the number of times that one function may be compiled
        sinkroute.set_step(router, step)
        ours, eager = compiled(logits_TE), router(logits_TE)
        assert torch.equal(ours.experts, eager.experts) and torch.equal(ours.weights, eager.weights)
        assert ours.branch == eager.branch
        counts.append(graphs)
    assert graphs > 0 and counts[2] == counts[-1]
