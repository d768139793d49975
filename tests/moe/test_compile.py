"""The layer under `torch.compile`, and where there are shapes only: fake tensors and the meta device."""

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

import sinkroute
from sinkroute.routing.registry import router_options

NEEDED = {"stable-moe": {"freeze_step": 100}}


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def make(router="softmax", cls=sinkroute.MoE, dtype=torch.float32, router_options=None, **options):
    torch.manual_seed(0)
    sizes = (16, 24, 4, 2) if cls is sinkroute.MoE else (16, 2, 24, 4, 2)
    layer = cls(*sizes, router, router_options=NEEDED.get(router, {}) | (router_options or {}), **options).to(dtype)
    if router == "noisy":
        torch.nn.init.normal_(layer.gate.weight)  # at first it is 0, and all logits are equal
    return layer


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained_by(function, layer, x):
    """Output, gradient of x and gradients of all weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    (y * random(*y.shape, seed=9, dtype=y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


# Each kind of gate, a bias that chooses, and the SSR family.
@pytest.mark.parametrize(
    "router", ["softmax", "noisy", "xmoe", "hash", "stable-moe", "smoe-dropout", "quantile", "ssr-s"]
)
def test_serving_is_one_graph_with_the_output_of_eager_mode(compiler, router):
    layer, x = make(router, shared_hidden=8).eval(), random(2, 9, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    ids = torch.arange(18).view(2, 9)
    torch.testing.assert_close(compiled(x, token_ids=ids), layer(x, token_ids=ids))


@pytest.mark.parametrize(
    ("router", "options", "dtype", "sizes"),
    [
        ("softmax", {}, torch.float32, {"bias": True}),
        ("softmax", {}, torch.bfloat16, {"bias": True}),
        ("ssr-s", {"probability": 0.0}, torch.float64, {}),
        ("ssr-l", {"probability": 0.0}, torch.float32, {"cls": sinkroute.MultiHeadMoE}),
    ],
)
def test_training_is_one_graph_over_all_steps_with_the_gradients_of_eager_mode(compiler, router, options, dtype, sizes):
    layer = make(router, dtype=dtype, router_options=options, **sizes)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for step in range(6):
        sinkroute.set_step(layer, step)
        x = random(3, 8, 16, seed=step, dtype=dtype)  # other tokens, other counts
        for mine, theirs in zip(trained_by(compiled, layer, x), trained_by(layer, layer, x), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_a_sinkhorn_step_breaks_the_graph_at_the_plan_only(compiler):
    layer, breaks = make("ssr-s", router_options={"probability": 1.0}), []
    graph_breaks = torch._dynamo.explain(layer)(random(9, 16)).break_reasons
    for reason in graph_breaks:
        breaks.append(reason.user_stack[-1].filename.split("/")[-1])
    # Once for each caller that is on the stack at the plan: the layer, and the router.
    assert set(breaks) <= {"operations.py", "layer.py", "router.py"} and len(breaks) <= 3


def test_branches_and_counts_that_change_compile_each_branch_once():
    torch._dynamo.reset()
    graphs = []
    layer = make("ssr-s", router_options={"probability": 0.5})
    # 2: each function is compiled for either branch.
    # Before torch 2.13, once more: for the number of a plan's passes, which it takes for a constant at first.
    more = Version(torch.__version__) < Version("2.13")
    with torch._dynamo.config.patch(recompile_limit=2 + more, fail_on_recompile_limit_hit=True):
        compiled, branches = torch.compile(layer, backend=lambda graph, _: (graphs.append(1), graph)[1]), []
        for step in range(12):
            sinkroute.set_step(layer, step)
            x = random(9, 16, seed=step)
            torch.testing.assert_close(compiled(x), layer(x))
            branches.append((layer.routes.branch, len(graphs)))
    assert {branch for branch, _ in branches[:6]} == {branch for branch, _ in branches[6:]} == {"softmax", "sinkhorn"}
    assert branches[5][1] == branches[-1][1]
    torch._dynamo.reset()


@pytest.mark.slow  # 25 s of work, most of it the C++ compiler's
def test_inductor_compiles_output_and_gradients(compiler):
    layer = make("ssr-s", router_options={"probability": 0.0, "noise": 1.0}, bias=True)
    compiled, x = torch.compile(layer, fullgraph=True), random(12, 16)
    for step in (0, 1):
        sinkroute.set_step(layer, step)
        for mine, theirs in zip(trained_by(compiled, layer, x), trained_by(layer, layer, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# -- shapes only -----------------------------------------------------------------------------------------------------

ROUTERS = ["softmax", "load-balance", "loss-free", "noisy", "xmoe", "hash", "ssr-l", "ssr-s", "ssr-bias"]
NO_PLAN = {"probability": 0.0}


def pass_through(layer, x, **arguments):
    """Shapes and dtypes of the output and of all gradients."""
    y = layer(x, **arguments)
    assert layer.routes.experts.shape == layer.routes.weights.shape and layer.routes.load.dtype == torch.int64
    (y.sum() if layer.routes.aux_loss is None else y.sum() + layer.routes.aux_loss).backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())
    assert x.grad.shape == x.shape
    return y.shape, y.dtype, y.device.type


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_meta_device_tells_shapes_in_both_directions(router, dtype):
    with torch.device("meta"):
        layer = make(
            router, dtype=dtype, bias=True, router_options=NO_PLAN if "probability" in router_options(router) else {}
        )
    sinkroute.set_step(layer, 3)
    x = torch.empty(2, 5, 16, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    ids = torch.empty(2, 5, dtype=torch.int64, device="meta")
    assert pass_through(layer, x, token_mask=mask, token_ids=ids) == ((2, 5, 16), dtype, "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_fake_tensors_tell_shapes_in_both_directions(router, dtype):
    layer = make(
        router, dtype=dtype, bias=True, router_options=NO_PLAN if "probability" in router_options(router) else {}
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 5, 16, dtype=dtype, requires_grad=True)
        ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
        assert pass_through(layer, x, token_mask=mask, token_ids=ids) == ((2, 5, 16), dtype, "cpu")


def test_a_layer_from_the_meta_device_draws_as_any_other():
    with torch.device("meta"):
        layer = make("ssr-s", router_options={"probability": 0.0, "noise": 2.0})
    usual = make("ssr-s", router_options={"probability": 0.0, "noise": 2.0})
    layer.to_empty(device="cpu").load_state_dict(usual.state_dict())
    for either in (layer, usual):
        sinkroute.set_step(either, 5)
    assert torch.equal(layer(random(20, 16)), usual(random(20, 16)))
