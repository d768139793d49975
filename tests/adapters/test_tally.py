"""`handle.summary()`: what the routers of a patched model did at first and did last."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.adapters._fit import is_asked
from sinkroute.adapters._patched import Patched
from sinkroute.routing.attached import attach

ONE, EVEN = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2)  # 4 : 0 and 2 : 2


def patched(name="softmax", layers=1, top_k=1, **options):
    model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(layers)))
    handle = Patched(model, name)
    for place, host in enumerate(model):
        router = sinkroute.create_router(name, num_experts=2, top_k=top_k, **options)
        attach(host, router)
        handle.add(f"layers.{place}.gate", host, router, "rule")
    return handle


def line(handle, layer):
    found = [row.split() for row in handle.summary().splitlines()]
    return next(row[1:] for row in found if row[0] == layer)


def run(handle, *batches):
    for logits_TE in batches:
        for router in handle.routers.values():
            router(logits_TE)


def test_before_a_pass_it_says_that_there_was_none():
    handle = patched(layers=3)
    assert handle.summary() == "softmax in 3 of 3 layers of Sequential: no training pass yet"
    assert "no training pass yet" in repr(handle) and len(handle) == 3
    run(handle, EVEN)
    assert "3 of 3 layers of Sequential: 1 training pass\n" in handle.summary() and "1 training pass)" in repr(handle)


def test_then_is_of_the_first_ten_passes_and_now_of_the_last_ten():
    handle = patched()
    run(handle, *[ONE] * 10, EVEN)
    # Now: 9 · 4 + 2 = 38 of 40 for the first expert, of a mean of 20.
    assert line(handle, "0") == ["1.000", "0.900", "1", "0"]
    run(handle, *[EVEN] * 8)
    assert line(handle, "0") == ["1.000", "0.100", "1", "0"]
    run(handle, *[EVEN] * 5)
    assert line(handle, "0") == ["1.000", "0.000", "1", "0"]


def test_few_passes_are_the_first_and_the_last():
    handle = patched()
    run(handle, ONE, EVEN)
    assert line(handle, "0") == ["0.500", "0.500", "0", "0"]


def test_all_layers_have_the_mean_and_many_are_grouped():
    handle = patched(layers=34)
    for place, router in enumerate(handle.routers.values()):
        router(ONE if place < 17 else EVEN)
    assert line(handle, "all") == ["0.500", "0.500", "17", "17"]
    rows = handle.summary().splitlines()[2:14]
    assert rows[0].split() == ["0", "to", "2", "1.000", "1.000", "3", "3"]
    assert [row.split()[0] for row in rows] == [*map(str, range(0, 34, 3))]


def test_plans_are_steps_with_one_and_kept_is_what_the_state_says():
    handle = patched("ssr-bias", probability="piecewise(0: 1, 2: 0)")
    (router,) = handle.routers.values()
    for step in range(4):
        for part in range(3):
            sinkroute.set_step(router, step, part)
            router(ONE + torch.arange(2))
    sinkroute.end_step(router)
    assert line(handle, "0")[:2] == ["2", "2"]
    handle = patched("ssr-l", layers=2, probability=1.0)
    run(handle, EVEN)
    assert "kept" not in handle.summary() and line(handle, "all")[0] == "1"


def test_ssr_dual_counts_its_first_plan():
    handle = patched("ssr-dual")
    for step in range(3):
        sinkroute.set_step(next(iter(handle.routers.values())), step)
        run(handle, ONE + torch.randn(4, 2, generator=torch.Generator().manual_seed(step)))
    assert line(handle, "0")[0] == "1"


def test_evaluation_is_not_counted_and_does_not_make_a_plain_router_asked():
    handle = patched()
    (router,) = handle.routers.values()
    router.eval()
    run(handle, ONE)
    assert "no training pass yet" in handle.summary()
    assert not is_asked(router)
    router.register_forward_hook(lambda *_: None)
    assert is_asked(router)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_pass_that_is_repeated_counts_once(use_reentrant):
    handle = patched(top_k=2)
    (router,) = handle.routers.values()
    logits_TE = EVEN.clone().requires_grad_()
    weights_TK = checkpoint(lambda x: router(x).weights, logits_TE, use_reentrant=use_reentrant)
    weights_TK[:, 0].sum().backward()
    assert "1 training pass\n" in handle.summary()


def test_a_compiled_pass_counts_in_one_graph_for_all_passes():
    torch.compiler.reset()
    handle = patched()
    (router,) = handle.routers.values()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: router(x).weights, fullgraph=True, backend=backend)
    for logits_TE in [*[ONE] * 10, *[EVEN] * 10]:
        compiled(logits_TE)
    assert line(handle, "0") == ["1.000", "0.000", "1", "0"]
    assert len(graphs) == 1


def test_nothing_of_it_is_in_a_state_dict_and_a_copy_counts_for_itself():
    handle = patched("loss-free")
    run(handle, ONE)
    assert not [key for key in handle.state_dict() if "tally" in key or "pass" in key]
    twin = copy.deepcopy(handle)
    run(twin, EVEN)
    assert "1 training pass\n" in handle.summary() and "2 training passes\n" in twin.summary()


def test_after_remove_nothing_is_counted():
    handle = patched()
    run(handle, ONE)
    routers = list(handle.routers.values())
    handle.remove()
    routers[0](EVEN)
    assert line(handle, "0")[0] == "1.000"
