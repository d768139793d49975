"""Our routers inside torchtitan's layers: against its own `TokenChoiceTopKRouter` and `MoE`, on the CPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import sinkroute

titan_moe = pytest.importorskip("torchtitan.models.common.moe")
titan_linear = pytest.importorskip("torchtitan.models.common.linear")
titan_override = pytest.importorskip("torchtitan.config.override")
titan_dims = pytest.importorskip("torchtitan.distributed.parallel_dims")
titan_protocols = pytest.importorskip("torchtitan.protocols.module")
titan_optimizer = pytest.importorskip("torchtitan.components.optimizer.optimizer")

from sinkroute.adapters import torchtitan as adapter  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:.*torch.utils.checkpoint.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]

EXPERTS, WIDTH, TOP_K = 8, 16, 2
# The first: their own code runs. The second: ours, with noise that changes nothing.
QUIET = [{"probability": 0.0, "noise": 0.0}, {"probability": 0.0, "noise": 1e-12}]


def layer_config(coeff=None, top_k=TOP_K, **options):
    gate = titan_linear.Linear.Config(
        in_features=WIDTH, out_features=EXPERTS, param_init={"weight": lambda weight: nn.init.normal_(weight, std=0.3)}
    )
    normal = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), lambda weight: nn.init.normal_(weight, std=0.1))
    return titan_moe.MoE.Config(
        num_experts=EXPERTS,
        load_balance_coeff=coeff,
        routed_experts=titan_moe.RoutedExperts.Config(
            inner_experts=titan_moe.GroupedExperts.Config(
                dim=WIDTH, hidden_dim=32, num_experts=EXPERTS, param_init=normal
            ),
            token_dispatcher=titan_moe.LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=top_k),
        ),
        router=titan_moe.TokenChoiceTopKRouter.Config(num_experts=EXPERTS, gate=gate, top_k=top_k, **options),
    )


def make_layer(coeff=None, top_k=TOP_K, **options):
    moe = layer_config(coeff, top_k, **options).build()
    torch.manual_seed(0)
    with torch.no_grad():
        moe.init_states()
    return moe


def tokens(batch=2, length=30):
    """Some experts get more of them than others."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)


def spread(weights, experts):
    """(..., K) as (T, E): the order of columns is nobody's."""
    rows = experts.flatten(0, -2)
    return torch.zeros(len(rows), EXPERTS).scatter(1, rows, weights.flatten(0, -2))


def routed(router, x, bias=None):
    """Weights (T, E), and the gradients of the gate and of the tokens for random numbers on the weights."""
    x = x.clone().requires_grad_()
    router.zero_grad()
    weights, experts, scores = router(x, bias)
    weights_TE = spread(weights, experts)
    projection_TE = torch.randn(weights_TE.shape, generator=torch.Generator().manual_seed(2))
    (weights_TE * projection_TE).sum().backward()
    return weights_TE, scores, router.gate.weight.grad.clone(), x.grad


def largest_load(experts):
    return experts.flatten().bincount(minlength=EXPERTS).max().item()


# -- the training forward pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", QUIET, ids=["theirs", "ours"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [{}, {"num_expert_groups": 4, "num_limited_groups": 2}], ids=["", "groups"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_without_plans_and_noise_choices_weights_and_gradients_are_torchtitans(
    score, top_k, norm, groups, biased, quiet
):
    options = {"score_func": score, "route_norm": norm, "route_scale": 2.5, **groups}
    theirs = make_layer(top_k=top_k, **options).router
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", **quiet)
    sinkroute.set_step(ours, 0)
    bias_E = torch.linspace(-0.3, 0.3, EXPERTS) if biased else None
    for mine, his in zip(routed(ours, tokens(), bias_E), routed(theirs, tokens(), bias_E), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


def test_where_the_method_is_plain_top_k_a_layers_output_and_gradients_are_torchtitans_to_the_last_bit():
    theirs = make_layer(coeff=1e-3, route_norm=True)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-s", **QUIET[0])
    outputs = []
    for moe in (ours, theirs):
        x = tokens().requires_grad_()
        y = moe(x)
        y.square().mean().backward()
        outputs.append([y, x.grad, *(p.grad for p in moe.parameters()), moe.tokens_per_expert_E])
    for mine, his in zip(*outputs, strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize("method", ["ssr-l", "ssr-s"])
def test_on_sinkhorn_steps_the_plan_of_the_gates_scores_chooses_and_weighs(method):
    moe = make_layer(score_func="softmax", route_norm=True, route_scale=2.0)
    alone = sinkroute.create_router(
        method, num_experts=EXPERTS, top_k=TOP_K, probability=1.0, norm_topk=True, route_scale=2.0, layer=0
    )
    adapter.patch(moe, method, probability=1.0, layer=0)
    for part in (moe, alone):
        sinkroute.set_step(part, 7)
    routes = alone(moe.router.gate(tokens()).flatten(0, 1))
    assert routes.branch == "sinkhorn"
    weights, experts, _ = moe.router(tokens())
    torch.testing.assert_close(spread(weights, experts), spread(routes.weights, routes.experts))
    moe(tokens())
    assert torch.equal(moe.tokens_per_expert_E, routes.load.float())


def test_a_layer_learns_on_every_kind_of_step():
    moe = make_layer(route_norm=True)
    adapter.patch(moe, "ssr-l", probability=0.5, noise=0.3, weights="scores")
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    branches, losses = set(), []
    for step in range(12):
        sinkroute.set_step(moe, step)
        branches.add(sinkroute.routing.attached.attached(moe.router).sinkhorn_now)
        loss = (moe(tokens()) - tokens()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert moe.router.gate.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert branches == {True, False} and losses[-1] < losses[0]


def test_plans_balance_loads_that_the_gate_does_not():
    moe = make_layer()
    before = moe.router(tokens())[1]
    adapter.patch(moe, "ssr-b", probability=1.0, noise=0.0)
    assert largest_load(moe.router(tokens())[1]) == 15 < largest_load(before)  # 60 · 2 / 8


def test_the_method_follows_the_layer_from_eval_to_training_and_back():
    moe = make_layer().eval()
    before = largest_load(moe.router(tokens())[1])
    adapter.patch(moe, "ssr-b", probability=1.0, noise=0.0, inference="noise")
    loads = [largest_load(moe.train(training).router(tokens())[1]) for training in (True, False, True)]
    assert loads == [15, before, 15]


def test_forced_balance_of_torchtitans_debugging_stays_as_it_is():
    moe = make_layer(_debug_force_load_balance=True)
    before = moe.router(tokens())[1]
    adapter.patch(moe, "ssr-l", probability=1.0)
    assert torch.equal(moe.router(tokens())[1], before)


# -- torchtitan's own bias -------------------------------------------------------------------------------------------


def updated(moe):
    """A model of one layer, and what torchtitan's optimiser does before each step of it."""
    block, model, updates = nn.Module(), nn.Module(), []
    block.moe_enabled, block.moe = True, moe
    model.layers = nn.ModuleDict({"0": block})
    titan_optimizer.register_moe_load_balancing_hook(
        SimpleNamespace(register_step_pre_hook=updates.append),
        [model],
        SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1),
    )
    return model, updates[0]


def test_torchtitans_bias_joins_the_choice_between_plans_and_its_hook_moves_it():
    moe = make_layer(coeff=0.05, route_norm=True)
    adapter.patch(moe, "ssr-s", probability=0.0, noise=1e-12)
    model, update = updated(moe)
    most = []
    for step in range(10):
        sinkroute.set_step(model, step)
        moe(tokens())
        most.append(moe.tokens_per_expert_E.max().item())
        update()
    assert most[-1] < 0.8 * most[0], "the bias has balanced nothing"


@pytest.mark.parametrize("method", sinkroute.list_routers())
def test_a_method_with_another_rule_is_refused_beside_torchtitans_bias(method):
    try:
        (router,) = adapter.patch(make_layer(), method).routers.values()
    except ValueError:
        pytest.skip("it is refused without a bias too")
    serving = router.serving()
    learned = serving is not None and not serving.plain and (serving.on == "scores" or hasattr(router, "bias_on"))
    if learned or (router.takes_correction() and not router.moves_gate):
        (router,) = adapter.patch(make_layer(coeff=1e-3), method).routers.values()
        assert bool(router.links) == learned
    else:
        with pytest.raises(ValueError, match="load_balance_coeff"):
            adapter.patch(make_layer(coeff=1e-3), method)


# Methods that serve with a bias on the scores.
MOVERS = {
    "ssr-dual": {},
    "ssr-dual exactly": {"exact": True},
    "ssr-bias": {"probability": 0.5},
    "loss-free": {"update_rate": 0.02},
    "quantile": {"scope": "batch"},
    "smebu": {"update_rate": 0.05},
}


def moved(moe, steps=6):
    """After some steps of training, with torchtitan's own updates; they leave the bias where it is."""
    model, update = updated(moe)
    for step in range(steps):
        for micro_batch in range(2):
            sinkroute.set_step(model, step, micro_batch)
            moe(tokens())
        before_E = moe.expert_bias_E.clone()
        assert moe.tokens_per_expert_E.sum() == 2 * 60 * TOP_K
        update()
        assert torch.equal(moe.expert_bias_E, before_E), "torchtitan moved it"
        assert moe.tokens_per_expert_E.sum() == 0
    sinkroute.end_step(model)
    return moe


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("name", MOVERS)
def test_a_bias_of_ours_is_torchtitans_own_which_plain_torchtitan_serves_to_the_last_bit(name, configured):
    method, options = name.split()[0], MOVERS[name]
    if configured:
        config = layer_config(coeff=0.05)
        config.router = adapter.route(config.router, method, **options)
        moe = config.build()
        torch.manual_seed(0)
        with torch.no_grad():
            moe.init_states()
    else:
        moe = make_layer(coeff=0.05)
        handle = adapter.patch(moe, method, **options)
    (router,) = sinkroute.routing.attached.named_routers(moved(moe)).values()
    learned_E = router.serving().bias_E
    assert learned_E.abs().max() > 1e-3 and torch.equal(moe.expert_bias_E, learned_E)
    plain = make_layer(coeff=0.05)
    before = largest_load(plain.eval().router(tokens(), plain.expert_bias_E)[1])
    plain.load_state_dict({key: value for key, value in moe.state_dict().items() if "router.router." not in key})
    assert torch.equal(moe.eval()(tokens()), plain(tokens()))
    assert largest_load(plain.router(tokens(), plain.expert_bias_E)[1]) < before
    if not configured:
        handle.remove()
        assert moe.load_balance_coeff == 0.05
        assert torch.equal(moe(tokens()), plain(tokens()))


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_ended_and_from_torchtitans_with_its_bias():
    ours, resumed, theirs = make_layer(coeff=0.05), make_layer(coeff=0.05), make_layer(coeff=0.05)
    for moe in (ours, resumed):
        adapter.patch(moe, "ssr-dual")
    resumed.load_state_dict(moved(ours).state_dict())
    for moe in (ours, resumed):
        sinkroute.set_step(moe, 6)
        moe(tokens())
        sinkroute.end_step(moe)
    assert torch.equal(ours.expert_bias_E, resumed.expert_bias_E)
    theirs.expert_bias_E.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    resumed.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(resumed.eval()(tokens()), theirs.eval()(tokens()))
    resumed.train()(tokens())
    (router,) = sinkroute.routing.attached.named_routers(resumed).values()
    assert torch.equal(router.serving().bias_E, theirs.expert_bias_E)


def test_a_bias_on_every_rank_is_moved_on_every_rank(mesh):
    moe = make_layer(coeff=0.05)
    adapter.patch(moe, "ssr-dual", process_group="world")
    moe.expert_bias_E = distribute_tensor(moe.expert_bias_E, mesh, [Replicate()])
    moe.router.gate.weight = nn.Parameter(distribute_tensor(moe.router.gate.weight.detach(), mesh, [Replicate()]))
    for step in range(3):
        sinkroute.set_step(moe, step)
        moe.router(distribute_tensor(tokens(), mesh, [Shard(0)]), moe.expert_bias_E)
    sinkroute.end_step(moe)
    (router,) = sinkroute.routing.attached.named_routers(moe).values()
    assert isinstance(moe.expert_bias_E, DTensor) and router.serving().bias_E.abs().max() > 0
    assert torch.equal(moe.expert_bias_E.to_local(), router.serving().bias_E)


def test_a_new_router_that_keeps_a_bias_serves_with_it(newcomer):
    moe = make_layer()
    (router,) = adapter.patch(moe, newcomer).routers.values()
    plain = moe.eval().router(tokens())[1]
    sinkroute.set_step(moe.train(), 0)
    moe(tokens())
    sinkroute.end_step(moe)
    router.state.bias_E *= 100
    assert not torch.equal(moe.eval().router(tokens())[1].sort().values, plain.sort().values)


def test_a_method_with_another_rule_is_refused_beside_the_bias_of_a_configured_layer():
    config = layer_config(coeff=1e-3)
    config.router = adapter.route(config.router, "base")
    with pytest.raises(ValueError, match="load_balance_coeff"):
        config.build()


# -- without a bias of torchtitan's: folded into the gate ------------------------------------------------------------

FOLDED = {"ssr-dual": {}, "ssr-fold": {"probability": 0.5}, "ssr-bias": {"probability": 0.5}, "quantile": {}}


def some(seed, batch=2):
    """Tokens that are alike: their common part is the same for every seed."""
    common = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.randn(batch, 30, WIDTH, generator=torch.Generator().manual_seed(seed)) + common


def folded(moe, steps=8):
    for step in range(steps):
        sinkroute.set_step(moe, step)
        moe.router(some(step))[0].sum().backward()
    sinkroute.end_step(moe)
    return moe


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_potentials_are_in_the_gate_which_plain_torchtitan_serves_to_the_last_bit(name, configured):
    options = {"score_func": "softmax", "route_norm": True}
    plain = make_layer(**options)
    before = largest_load(plain.eval().router(some(50, 20))[1])
    if configured:
        config = layer_config(**options)
        config.router = adapter.route(config.router, name, **FOLDED[name])
        with torch.device("meta"):
            moe = config.build()
        moe.to_empty(device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            moe.init_states()
    else:
        moe = make_layer(**options)
        adapter.patch(moe, name, **FOLDED[name])
    folded(moe)
    plain.load_state_dict({key: value for key, value in moe.state_dict().items() if "router.router." not in key})
    assert torch.equal(moe.eval()(tokens()), plain(tokens()))
    assert largest_load(plain.router(some(50, 20))[1]) < 0.75 * before


def test_a_gate_that_is_sharded_is_moved_on_every_rank(mesh):
    whole, sharded = make_layer(score_func="softmax"), make_layer(score_func="softmax")
    for moe in (whole, sharded):
        adapter.patch(moe, "ssr-dual", layer=0)
    fully_shard(sharded.router, mesh=mesh)
    weights = [folded(moe).router.gate.weight.detach() for moe in (whole, sharded)]
    assert isinstance(weights[1], DTensor)
    torch.testing.assert_close(weights[1].full_tensor(), weights[0])
    assert not torch.equal(weights[0], make_layer(score_func="softmax").router.gate.weight)
    sinkroute.set_step(sharded, 8)
    sharded.router(some(8))  # gathers it
    with pytest.raises(RuntimeError, match="FSDP has gathered"):
        sinkroute.end_step(sharded)


def test_without_a_name_the_recommended_router_comes_in_the_form_that_fits():
    for coeff, on, where in ((None, "logits", "folded into the gate"), (0.05, "scores", "its bias is the layer's")):
        config = layer_config(coeff=coeff)
        config.router = adapter.route(config.router)
        handle = adapter.patch(make_layer(coeff=coeff))
        told = str(handle).splitlines()
        assert told[0] == "ssr-dual in 1 of 1 layers of MoE" and told[1].endswith(where)
        (patched,) = handle.routers.values()
        assert patched.bias_on == config.build().router.router.bias_on == on


def test_a_gate_that_is_frozen_is_not_moved():
    moe = make_layer()
    moe.router.gate.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="SSRDualRouter moves the gate's weight of torchtitan's router, which is froz"):
        adapter.patch(moe, "ssr-dual")


# -- serving and checkpoints -----------------------------------------------------------------------------------------


def test_in_eval_outputs_are_torchtitans_to_the_last_bit():
    theirs = make_layer(coeff=1e-3)
    theirs.expert_bias_E.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", probability=1.0)
    assert torch.equal(ours.eval()(tokens()), theirs.eval()(tokens()))


def test_checkpoints_load_both_ways_and_what_is_removed_leaves_nothing():
    plain, patched = make_layer(coeff=1e-3), make_layer(coeff=1e-3)
    handle = adapter.patch(patched, "ssr-s")
    names = [name for name, _ in patched.named_modules()]
    patched.load_state_dict(plain.state_dict())
    plain.load_state_dict(patched.state_dict())
    handle.remove()
    handle.remove()
    assert type(patched.router) is titan_moe.TokenChoiceTopKRouter
    assert names == [name for name, _ in patched.named_modules()]
    assert str(handle).splitlines() == [
        "ssr-s in 1 of 1 layers of MoE",
        "  1 × router  TokenChoiceTopKRouter  sigmoid, top 2 of 8",
    ]
    assert not sinkroute.routing.attached.named_routers(patched)


def test_what_a_method_remembers_is_in_the_checkpoint_in_float32_and_serves():
    torch.set_default_dtype(torch.bfloat16)
    try:
        moe = make_layer().bfloat16()
        handle = adapter.patch(moe, "loss-free", update_rate=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    x = tokens().bfloat16()
    plain = moe.eval().router(x)[1]
    sinkroute.set_step(moe.train(), 0)
    moe(x)
    sinkroute.end_step(moe)
    assert moe.state_dict()["router.router.state.bias_E"].dtype == torch.float32
    assert isinstance(moe.router.router, titan_moe.TokenChoiceTopKRouter.__mro__[1])
    assert not torch.equal(moe.eval().router(x)[1].sort().values, plain.sort().values)
    handle.remove()
    assert "router.router.state.bias_E" not in moe.state_dict()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_token_twice(reentrant):
    gradients = []
    for recompute in (False, True):
        moe = make_layer(route_norm=True)
        adapter.patch(moe, "ssr-l", probability=0.5, noise=1.0, weights="scores", layer=3)
        with sinkroute.LoadMonitor(moe) as monitor:
            for step in range(4):
                sinkroute.set_step(moe, step)
                x = tokens().requires_grad_()
                y = checkpoint(moe, x, use_reentrant=reentrant) if recompute else moe(x)
                y.square().mean().backward()
        assert monitor.metrics()["router"]["tokens"] == 4 * 60
        gradients.append([p.grad for p in moe.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("method", ["ssr-l", "ssr-dual", "loss-free"])
def test_selective_checkpointing_changes_no_gradient_whatever_it_keeps(method):
    gradients = []
    for recompute in (False, True):
        moe = make_layer(coeff=0.05, route_norm=True)
        adapter.patch(moe, method, **({"probability": 0.5} if method == "ssr-l" else {}))
        for step in range(4):
            sinkroute.set_step(moe, step)
            x = tokens().requires_grad_()
            y = checkpoint(moe, x, use_reentrant=False, context_fn=kept) if recompute else moe(x)
            y.square().mean().backward()
        gradients.append([p.grad for p in moe.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def kept():
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.add.Tensor, aten.topk.default])


# -- ways into a model -----------------------------------------------------------------------------------------------


def test_a_configured_layer_is_built_on_the_meta_device_and_routes_as_a_patched_one():
    config = layer_config(route_norm=True)
    root = SimpleNamespace(traverse=config.traverse)
    target = "sinkroute.adapters.torchtitan.route"
    options = {"router": "ssr-l", "probability": 1.0, "noise": 0.2, "layer": 0}
    titan_override.apply_overrides(titan_override.OverrideConfig(imports=[(target, options)]), root)
    with torch.device("meta"):
        ours = config.build()
    assert all(isinstance(part, titan_moe.Module) for part in ours.modules())
    ours.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        ours.init_states()
    theirs = make_layer(route_norm=True)
    adapter.patch(theirs, "ssr-l", probability=1.0, noise=0.2, layer=0)
    for moe in (ours, theirs):
        sinkroute.set_step(moe, 3)
    assert torch.equal(ours(tokens()), theirs(tokens()))


def test_a_method_with_a_state_is_part_of_a_configured_model():
    config = layer_config()
    config.router = adapter.route(config.router, "loss-free")
    with torch.device("meta"):
        moe = config.build()
    assert all(isinstance(part, titan_moe.Module) for part in moe.modules())
    moe.to_empty(device="cpu")
    moe.init_states()
    assert moe.router.router.state.bias_E.tolist() == [0.0] * EXPERTS


def test_layers_are_numbered_by_their_block_in_whatever_stage_they_are():
    model = nn.Module()
    model.layers = nn.ModuleDict({"5": nn.ModuleDict({"moe": make_layer()}), "9": nn.ModuleDict({"moe": make_layer()})})
    handle = adapter.patch(model, "ssr-l")
    sinkroute.set_step(model, 0)
    assert {path: router.layer for path, router in handle.routers.items()} == {
        "layers.5.moe.router": 5,
        "layers.9.moe.router": 9,
    }


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("load-balance", {}, "auxiliary loss"),
        ("ssr-l", {"losses": ["z-loss"]}, "auxiliary loss"),
        ("xmoe", {}, "brings a gate"),
        ("ssr-l", {"noise": "learned"}, "parameter"),
        ("expert-choice", {}, "does not give every token top_k=2 experts"),
        ("ssr-ec", {}, "does not give every token top_k=2 experts"),
        ("ssr-l", {"score": "softmax"}, "score='softmax' is read from torchtitan's router"),
        ("srr-l", {}, "did you mean"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_and_nothing_is_patched(method, options, reason):
    moe = make_layer()
    with pytest.raises(ValueError, match=reason):
        adapter.patch(moe, method, **options)
    assert type(moe.router) is titan_moe.TokenChoiceTopKRouter


@pytest.mark.parametrize(("method", "options"), [("load-balance", {}), ("ssr-l", {"losses": ["z-loss"]})])
@pytest.mark.parametrize("coeff", [None, 1e-3])
def test_a_loss_is_refused_before_there_are_ranks_or_stages(method, options, coeff):
    config = layer_config(coeff=coeff)
    config.router = adapter.route(config.router, method, **options)
    with pytest.raises(ValueError, match="auxiliary loss, and nothing in torchtitan adds it"):
        config.build()


def test_choices_can_be_viewed_as_torchtitan_does():
    moe = make_layer()
    adapter.patch(moe, "loss-free")
    sinkroute.set_step(moe, 0)
    assert all(part.is_contiguous() for part in moe.router(tokens())[:2])


def test_a_model_without_layers_and_one_that_is_patched_already_are_refused():
    with pytest.raises(ValueError, match="nothing to patch"):
        adapter.patch(nn.Linear(2, 2), "ssr-l")
    moe = make_layer()
    adapter.patch(moe, "ssr-l")
    with pytest.raises(ValueError, match=r"remove\(\) first"):
        adapter.patch(moe, "ssr-s")


def test_a_torchtitan_with_another_router_is_refused_with_its_version(monkeypatch):
    monkeypatch.setattr(titan_moe.TokenChoiceTopKRouter, "forward", lambda self, x, bias=None: (x, x))
    adapter.check_contract.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"torchtitan 0\.3\.0 is not supported: .* gives tensors .* install torchtitan"
    ):
        adapter.patch(make_layer(), "ssr-l")
    monkeypatch.undo()
    adapter.check_contract()


def test_a_compiled_layer_is_refused_with_the_cure():
    moe = make_layer()
    adapter.patch(moe, "ssr-l")
    compiled = torch.compile(moe.router, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"compile\.components loss"):
        compiled(tokens())


# -- tensors over several ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(1), Shard(0)])
def test_tokens_on_several_ranks_are_routed_where_they_are(mesh, placement):
    moe = make_layer(route_norm=True)
    adapter.patch(moe, "ssr-l", probability=1.0, layer=0, process_group="world")
    expected = routed(moe.router, tokens())
    whole = moe.router.gate.weight
    moe.router.gate.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
    weights, experts, scores = moe.router(distribute_tensor(tokens(), mesh, [placement]))
    for part in (weights, experts, scores):
        assert isinstance(part, DTensor) and part.placements == (placement,)
    torch.testing.assert_close(spread(weights.to_local(), experts.to_local()), expected[0])
    (weights * torch.ones_like(weights)).sum().backward()
    assert isinstance(moe.router.gate.weight.grad, DTensor)


def one_rank(**degrees):
    sizes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1} | degrees
    return titan_dims.ParallelDims(**sizes, world_size=1, spmd_backend="partial_dtensor")


def test_a_router_learns_its_ranks_where_the_model_is_parallelized_or_is_told(mesh, monkeypatch):
    monkeypatch.setattr(titan_dims, "device_type", "cpu")
    for learn in (lambda moe: moe.router.parallelize(one_rank()), lambda moe: adapter.tell_ranks(moe, one_rank())):
        moe = make_layer()
        adapter.patch(moe, "ssr-l", process_group="loss")
        (router,) = sinkroute.routing.attached.named_routers(moe).values()
        assert [ranks.name for ranks in router.ranks] == ["loss"] * 3
        learn(moe)
        assert [repr(ranks) for ranks in router.ranks] == ["None"] * 3


def test_a_model_that_is_parallelized_already_needs_to_be_told_its_ranks(mesh, monkeypatch):
    monkeypatch.setattr(titan_dims, "device_type", "cpu")
    moe = make_layer()
    moe.router.parallelize(SimpleNamespace(spmd_backend="default"))
    for group in (None, "world"):
        with pytest.raises(ValueError, match="parallel_dims=None, but the model is parallelized already"):
            adapter.patch(moe, "ssr-l", process_group=group)
    adapter.patch(moe, "ssr-l", process_group="world", parallel_dims=one_rank())


def test_blocks_of_a_configured_model_are_numbered_as_they_become_parts_of_it():
    config = layer_config()
    config.router = adapter.route(config.router, "ssr-l")
    layers = titan_protocols.ModuleDict()
    for number in ("4", "7"):
        block = titan_protocols.Sequential(config.build())
        layers[number] = block
    del layers["4"]
    layers["0"] = layers["7"]  # torchtitan's MTP does so for a while
    stage = copy.deepcopy(layers)
    sinkroute.set_step(stage, 0)
    (router,) = sinkroute.routing.attached.named_routers(stage).values()
    assert router.layer == 7


def test_scores_that_are_spread_by_experts_are_refused(mesh):
    moe = make_layer()
    adapter.patch(moe, "ssr-l", process_group="world")
    moe.router.gate.weight = nn.Parameter(distribute_tensor(moe.router.gate.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(NotImplementedError, match="whole rows"):
        moe.router(distribute_tensor(tokens(), mesh, [Replicate()]))


def test_a_monitor_sees_what_serves_and_changes_nothing():
    moe = make_layer(route_norm=True)
    adapter.patch(moe, "ssr-l", probability=1.0)
    expected = moe.eval()(tokens())
    with sinkroute.LoadMonitor(moe) as monitor:
        assert torch.equal(moe(tokens()), expected)
        (probed,) = monitor.probe(tokens()).values()
    (metrics,) = monitor.metrics("eval").values()
    assert metrics["tokens"] == len(probed) == 60 and sum(metrics["load"]) == 60 * TOP_K
