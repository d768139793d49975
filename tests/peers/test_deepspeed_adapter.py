"""Our routers inside DeepSpeed's layers: against its own gates, on the CPU."""

import copy
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import sinkroute

os.environ.setdefault("DS_ACCELERATOR", "cpu")
gates = pytest.importorskip("deepspeed.moe.sharded_moe")
ep_router = pytest.importorskip("deepspeed.moe.ep_router")
layer = pytest.importorskip("deepspeed.moe.layer")

import deepspeed  # noqa: E402

from sinkroute.adapters import deepspeed as adapter  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the model's gates is off.*"),
    pytest.mark.filterwarnings("ignore:.*torch.utils.checkpoint.*"),
]

EXPERTS, WIDTH = 8, 16
QUIET = {"probability": 0.0, "noise": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    os.environ.setdefault("LOCAL_RANK", "0")
    store = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo", dist_init_required=False, auto_mpi_discovery=False)
    yield
    dist.destroy_process_group()


def make_gate(k, factor=1.0, least=0, drop=True, **options):
    torch.manual_seed(0)
    noiseless = {"use_rts": False, "top2_2nd_expert_sampling": False}
    return gates.TopKGate(WIDTH, EXPERTS, k, factor, factor, least, drop_tokens=drop, **(noiseless | options))


def make_layer(k=2, alone=True, **options):
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
    moe = layer.MoE(WIDTH, expert, EXPERTS, k=k, top2_2nd_expert_sampling=False, use_rts=False, **options)
    if alone:  # no engine will
        moe.set_deepspeed_parallelism()
    return moe


def tokens(count=60):
    """Some experts get more of them than others."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)


def dense(output):
    """What a gate gives, in either form: weights (S, E, C) and who has which place."""
    if len(output) == 4:
        return output[1], output[2], output[3]
    _, capacity, experts, experts_KS, places_KS, weights_KS, load_E = output
    weights = torch.zeros(experts_KS.shape[1], experts, int(capacity))
    taken = torch.zeros_like(weights, dtype=torch.bool)
    for experts_S, places_S, weights_S in zip(experts_KS.long(), places_KS.long(), weights_KS, strict=True):
        kept = (experts_S >= 0).nonzero()[:, 0]
        where = (kept, experts_S[kept], places_S[kept])
        weights, taken = weights.index_put(where, weights_S[kept]), taken.index_put(where, torch.tensor(True))
    return weights, taken, load_E


def routed(gate, x, *arguments):
    x = x.clone().requires_grad_()
    weights, taken, load_E = dense(gate(x, *arguments))
    projection = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    (weights * projection).sum().backward()
    return weights, taken, load_E, gate.wg.weight.grad, x.grad


# -- the training forward pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "room", [{"factor": 0.5}, {"factor": 1.5}, {"factor": 0.1, "least": 20}, {"factor": 9.0}, {"drop": False}]
)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_without_plans_and_noise_weights_places_and_gradients_are_deepspeeds(k, room, sparse):
    theirs = make_gate(k, **room)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", **QUIET)
    for mine, his in zip(routed(ours, tokens(), None, sparse), routed(theirs, tokens(), None, sparse), strict=True):
        assert mine.dtype == his.dtype
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sparse_routes_have_deepspeeds_shapes_dtypes_and_marks(k):
    theirs = make_gate(k, factor=0.5)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", probability=1.0)
    mine, his = ours(tokens(), None, True, False), theirs(tokens(), None, True, False)
    for ours_part, their_part in zip(mine[3:], his[3:], strict=True):
        assert (ours_part.shape, ours_part.dtype) == (their_part.shape, their_part.dtype)
        assert ours_part.is_contiguous()
    assert (int(mine[1]), mine[2]) == (int(his[1]), his[2])
    dropped = mine[3] < 0
    assert dropped.any() and (mine[3][dropped] == -1).all() and (mine[4][dropped] == 0).all()
    assert (mine[5][dropped] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_on_sinkhorn_steps_the_plan_of_the_gates_scores_chooses_and_weighs(k):
    gate = make_gate(k, drop=False)
    adapter.patch(gate, "ssr-s", probability=1.0, layer=0)
    alone = sinkroute.create_router("ssr-s", num_experts=EXPERTS, top_k=k, probability=1.0, norm_topk=k > 1, layer=0)
    for part in (gate, alone):
        sinkroute.set_step(part, 7)
    routes = alone(gate.wg(tokens()))
    weights, taken, load_E = dense(gate(tokens(), None, True))
    assert routes.branch == "sinkhorn" and torch.equal(load_E, routes.load)
    expected = torch.zeros(60, EXPERTS).scatter(1, routes.experts, routes.weights)
    torch.testing.assert_close(weights.sum(-1), expected)
    assert (taken.sum(0) <= 1).all(), "two tokens have one place"


@pytest.mark.parametrize(("k", "method"), [(1, "load-balance"), (3, "load-balance"), (2, "gshard")])
def test_the_loss_of_a_method_is_l_aux(k, method):
    theirs = make_gate(k)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, method, coefficient=1.0)
    gradients = []
    for gate in (ours, theirs):
        l_aux = gate(tokens(), None, True)[0]
        l_aux.backward()
        gradients.append((l_aux, gate.wg.weight.grad))
    for mine, his in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)


def test_a_method_without_a_loss_gives_an_l_aux_of_zero():
    gate = make_gate(2)
    adapter.patch(gate, "ssr-l")
    assert gate(tokens(), None, True)[0].item() == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_padding_gets_no_place_and_no_part_in_plan_and_load(k):
    used = (torch.arange(60) % 3 != 0).long()
    loose = make_gate(k, drop=False)
    adapter.patch(loose, "ssr-l", probability=1.0, noise=0.0)
    whole = dense(loose(tokens(), used, True))
    alone = dense(loose(tokens()[used.bool()], None, True))
    assert not whole[1][used == 0].any() and whole[2].sum() == 40 * k
    torch.testing.assert_close(whole[0][used.bool()].sum(-1), alone[0].sum(-1))
    assert torch.equal(whole[2], alone[2])


def test_padding_of_one_choice_is_treated_as_deepspeed_does():
    used = (torch.arange(60) % 3 != 0).long()
    theirs = make_gate(1, factor=0.5)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", **QUIET)
    for mine, his in zip(routed(ours, tokens(), used, True), routed(theirs, tokens(), used, True), strict=True):
        torch.testing.assert_close(mine, his)


def test_who_is_dropped_at_random_is_keyed_to_the_step_and_fills_the_same_room():
    theirs = make_gate(1, factor=0.5, use_rts=True)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", **QUIET)
    taken = []
    for step in (0, 0, 1):
        sinkroute.set_step(ours, step)
        taken.append(dense(ours(tokens(), None, True))[1].any(-1))
    assert torch.equal(taken[0], taken[1]) and not torch.equal(taken[0], taken[2])
    assert torch.equal(taken[0].sum(0), dense(theirs(tokens(), None, True))[1].any(-1).sum(0))
    # Not the first who came.
    assert taken[2].nonzero()[:, 0].float().mean() > 20


def test_deepspeeds_jitter_of_the_tokens_stays_on():
    gate = make_gate(2, drop=False, noisy_gate_policy="Jitter")
    adapter.patch(gate, "ssr-l", **QUIET)
    once, twice = (dense(gate(tokens(), None, True))[0].sum(-1) for _ in range(2))
    assert not torch.equal(once, twice) and torch.allclose(once, twice, atol=0.1)


@pytest.mark.filterwarnings("default")
def test_noise_of_deepspeeds_that_is_replaced_is_told():
    with pytest.warns(UserWarning, match="top2_2nd_expert_sampling=True of the model's gates is off in training"):
        adapter.patch(make_gate(2, top2_2nd_expert_sampling=True), "ssr-l")
    with pytest.warns(UserWarning, match="RSample"):
        adapter.patch(make_gate(1, noisy_gate_policy="RSample"), "ssr-l")


# -- whole layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_layers_output_and_gradients_are_deepspeeds_without_plans_and_noise(k):
    theirs, ours = make_layer(k, capacity_factor=1.0), make_layer(k, capacity_factor=1.0)
    adapter.patch(ours, "ssr-s", **QUIET)
    outputs = []
    for moe in (ours, theirs):
        y, _, load_E = moe(tokens().view(2, 30, WIDTH))
        y.square().mean().backward()
        outputs.append([y, load_E, *(p.grad for p in moe.parameters() if p.grad is not None)])
    assert len(outputs[0]) == len(outputs[1])
    for mine, his in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_in_eval_outputs_are_deepspeeds_to_the_last_bit(k):
    theirs, ours = make_layer(k), make_layer(k)
    adapter.patch(ours, "ssr-l", probability=1.0)
    assert torch.equal(ours.eval()(tokens())[0], theirs.eval()(tokens())[0])


def test_checkpoints_load_both_ways_and_what_is_removed_leaves_nothing():
    plain, patched = make_layer(), make_layer()
    handle = adapter.patch(patched, "ssr-s")
    gate = patched.deepspeed_moe.gate
    names = [name for name, _ in patched.named_modules()]
    patched.load_state_dict(plain.state_dict())
    plain.load_state_dict(patched.state_dict())
    handle.remove()
    handle.remove()
    assert type(gate) is gates.TopKGate and patched.deepspeed_moe.gate is gate
    assert names == [name for name, _ in patched.named_modules()]
    assert str(handle).splitlines() == [
        "ssr-s in 1 of 1 layers of MoE",
        "  1 × deepspeed_moe.gate  TopKGate  softmax, top 2 of 8",
    ]
    assert not sinkroute.routing.attached.named_routers(patched)


def test_what_a_method_remembers_is_in_the_checkpoint_and_serves():
    moe = make_layer(capacity_factor=8.0, eval_capacity_factor=8.0)
    adapter.patch(moe, "loss-free", update_rate=0.5)
    before = moe.eval()(tokens())[2]
    for step in range(3):
        sinkroute.set_step(moe.train(), step)
        moe(tokens())
    sinkroute.end_step(moe)
    assert "deepspeed_moe.gate.router.state.bias_E" in moe.state_dict()
    assert not torch.equal(moe.eval()(tokens())[2], before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_token_twice(reentrant):
    gradients = []
    for recompute in (False, True):
        moe = make_layer(1, capacity_factor=0.5, min_capacity=0)
        moe.deepspeed_moe.gate.use_rts = True
        losses = {"load-balance": 0.5}
        adapter.patch(moe, "ssr-l", probability=0.5, noise=1.0, weights="scores", losses=losses, layer=3)
        with sinkroute.LoadMonitor(moe) as monitor:
            for step in range(4):
                sinkroute.set_step(moe, step)
                x = tokens().requires_grad_()
                y, l_aux, _ = checkpoint(moe, x, use_reentrant=reentrant) if recompute else moe(x)
                (y.square().mean() + l_aux).backward()
        (metrics,) = monitor.metrics().values()
        assert metrics["tokens"] == 4 * 60
        gradients.append([p.grad for p in moe.parameters() if p.grad is not None])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_trains_a_model_that_is_patched_before_and_after_it_is_made(stage):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = make_layer(alone=False)

        def forward(self, x):
            y, l_aux, _ = self.moe(x)
            return (y - x).square().mean() + l_aux

    losses = []
    for late in (False, True):
        model = Model()
        if not late:
            adapter.patch(model, "ssr-l", probability=0.5, weights="scores")
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
        }
        groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        if late:
            adapter.patch(engine.module, "ssr-l", probability=0.5, weights="scores")
        assert engine.gate_modules == [model.moe.deepspeed_moe.gate]
        seen = []
        for _ in range(8):
            accumulated = engine.micro_steps % engine.gradient_accumulation_steps()
            sinkroute.set_step(engine.module, engine.global_steps, accumulated)
            loss = engine(tokens())
            engine.backward(loss)
            engine.step()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


# -- folded into the gate --------------------------------------------------------------------------------------------

FOLDED = {"ssr-dual": {}, "ssr-fold": {"probability": 0.5}, "ssr-bias": {"probability": 0.5}, "quantile": {}}


def some(seed, count=60):
    """Tokens that are alike: their common part is the same for every seed."""
    common = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) + common


def choices(gate):
    """The largest load when it serves, in shares."""
    with torch.no_grad():
        load_E = gate.eval()(some(50, 600))[-1]
    gate.train()
    return (load_E.max() / load_E.float().mean()).item()


def folded(gate, steps=8):
    for step in range(steps):
        sinkroute.set_step(gate, step)
        gate(some(step))
    sinkroute.end_step(gate)
    return gate


def without_state(gate):
    return {key: value for key, value in gate.state_dict().items() if not key.startswith("router.")}


@pytest.mark.parametrize("make", [lambda: make_gate(2, drop=False), lambda: autoep_router()], ids=["gate", "autoep"])
@pytest.mark.parametrize("name", FOLDED)
def test_potentials_are_in_the_gate_which_plain_deepspeed_serves_to_the_last_bit(name, make):
    ours, plain = make(), make()
    before = choices(plain)
    adapter.patch(ours, name, **FOLDED[name])
    plain.load_state_dict(without_state(folded(ours)))
    for mine, its in zip(ours.eval()(tokens()), plain.eval()(tokens()), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(its))
    assert choices(plain) < 0.75 * before


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = make_layer(alone=False)

    def forward(self, x):
        y, l_aux, _ = self.moe(x)
        return (y - x).float().square().mean() + l_aux


def engine_of(model, stage, dtype):
    """One whose optimiser moves nothing: what moves the gate is the router alone."""
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def trained(stage, dtype, rank=0, world=1):
    """The gate after some steps of an engine, which take no move back."""
    model = Residual()
    adapter.patch(model, "ssr-dual", process_group="world")
    engine = engine_of(model, stage, dtype)
    gate = model.moe.deepspeed_moe.gate
    for step in range(8):
        sinkroute.set_step(engine.module, engine.global_steps)
        moved = gate.wg.weight.detach().clone()
        engine.backward(engine(some(step, 120).chunk(world)[rank].to(dtype)))
        engine.step()
        # But for roundings to bfloat16 of weights below 1.
        torch.testing.assert_close(gate.wg.weight.detach(), moved, rtol=0, atol=2**-7)
    sinkroute.end_step(engine.module)
    return gate


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), *itertools.product((1, 2), ("float32", "bfloat16"))])
def test_a_step_of_zero_keeps_the_moves_of_the_gate(stage, dtype):
    before = choices(Residual().moe.deepspeed_moe.gate)
    gate = trained(stage, getattr(torch, dtype))
    assert gate.wg.weight.dtype == getattr(torch, dtype)
    assert choices(gate) < 0.75 * before


def trained_on_a_rank():
    deepspeed.init_distributed("gloo", dist_init_required=False, auto_mpi_discovery=False)
    return {"gate": trained(2, torch.bfloat16, dist.get_rank(), 2).wg.weight.detach()}


def test_a_step_of_zero_keeps_the_moves_of_a_gate_whose_copy_is_on_one_rank_of_two(run_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    first, second = (rank["gate"] for rank in run_ranks(trained_on_a_rank, 2))
    assert torch.equal(first, second)
    # Of the same tokens, on one rank.
    torch.testing.assert_close(first, trained(2, torch.bfloat16).wg.weight.detach(), rtol=0.05, atol=0.02)


def test_without_a_name_the_recommended_router_comes_in_the_form_that_fits():
    for gate, where in (
        (make_gate(2), "folded into the gate"),
        (autoep_router("sigmoid"), "folded into the gate"),
        (biased_router("buffer"), "its bias is the layer's"),
    ):
        told = str(adapter.patch(gate)).splitlines()
        assert told[0].startswith("ssr-dual in 1 of 1 layers") and where in told[1]
    assert gate.router.bias_on == "scores"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gate: setattr(gate.wg.weight, "ds_id", 0), "'ssr-dual' moves the gate, which ZeRO 3 keeps in parts"),
        (
            lambda gate: gate.bfloat16(),
            "which is torch.bfloat16, and the optimiser's float32 copy of it cannot be foun",
        ),
    ],
)
def test_a_gate_whose_move_would_be_lost_is_refused(change, words):
    gate = make_gate(2, drop=False)
    adapter.patch(gate, "ssr-dual")
    change(gate)
    (link,) = gate.router.links
    with pytest.raises(ValueError, match=words):
        link.add(gate.wg.weight, torch.zeros(gate.wg.weight.shape, dtype=torch.float64))


# -- AutoEP's router -------------------------------------------------------------------------------------------------


def autoep_router(score="softmax", norm=False, groups=None, group_score="top2_sum", bias=False):
    torch.manual_seed(0)
    router = ep_router.TokenChoiceTopKRouter(
        WIDTH, EXPERTS, groups, groups and 2, 3, score, norm, 2.5, True, group_score
    )
    if bias:
        router.e_score_correction_bias = nn.Parameter(torch.linspace(-0.3, 0.3, EXPERTS), requires_grad=False)
    return router


def biased_router(kept):
    """As AutoEP copies DeepSeek-V3's: sigmoid, and the bias a buffer or a parameter that is not trained."""
    router = autoep_router("sigmoid", norm=True, bias=True)
    bias_E = 0 * router.e_score_correction_bias.detach()
    del router.e_score_correction_bias
    if kept == "buffer":
        router.register_buffer("e_score_correction_bias", bias_E)
    else:
        router.e_score_correction_bias = nn.Parameter(bias_E, requires_grad=False)
    return router


def trained_bias(_):
    router = autoep_router(bias=True)
    router.e_score_correction_bias.requires_grad_(True)
    return router


# The first: their own code runs. The second: ours, with noise that changes nothing.
@pytest.mark.parametrize("noise", [0.0, 1e-12])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [{}, {"groups": 4}, {"groups": 4, "group_score": "max"}])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_autoeps_router_gives_its_own_weights_choices_and_gradients_without_plans(score, norm, groups, bias, noise):
    theirs = autoep_router(score, norm, **groups, bias=bias)
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-l", probability=0.0, noise=noise)
    sinkroute.set_step(ours, 0)
    outputs = []
    for router in (ours, theirs):
        weights, experts, load_E = router(tokens())
        weights_TE = torch.zeros(60, EXPERTS).scatter(1, experts, weights)
        (weights_TE * torch.randn(60, EXPERTS, generator=torch.Generator().manual_seed(2))).sum().backward()
        outputs.append((weights_TE, load_E, router.gate.weight.grad))
    for mine, his in zip(*outputs, strict=True):
        assert mine.dtype == his.dtype
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


def test_autoeps_router_is_its_own_in_eval_and_balanced_by_a_plan_in_training():
    theirs = autoep_router()
    ours = copy.deepcopy(theirs)
    adapter.patch(ours, "ssr-b", probability=1.0, noise=0.0)
    most = [router(tokens())[2].max().item() for router in (ours, theirs)]
    assert most[0] <= 24 < most[1]
    for mine, his in zip(ours.eval()(tokens()), theirs.eval()(tokens()), strict=True):
        assert torch.equal(mine, his)


# Methods that serve with a bias on the scores.
MOVERS = {
    "ssr-dual": {},
    "ssr-dual exactly": {"exact": True},
    "ssr-bias": {"probability": 0.5},
    "loss-free": {"update_rate": 0.02},
    "quantile": {"scope": "batch"},
    "smebu": {"update_rate": 0.05},
}


@pytest.mark.parametrize("kept", ["buffer", "parameter"])
@pytest.mark.parametrize("name", MOVERS)
def test_a_bias_of_ours_is_autoeps_own_which_plain_autoep_serves_to_the_last_bit(name, kept):
    ours, plain = (biased_router(kept) for _ in range(2))
    handle = adapter.patch(ours, name.split()[0], **MOVERS[name])
    for step in range(6):
        sinkroute.set_step(ours, step)
        ours(tokens())
    sinkroute.end_step(ours)
    (router,) = handle.routers.values()
    learned_E = router.serving().bias_E
    assert learned_E.abs().max() > 1e-3 and torch.equal(ours.e_score_correction_bias, learned_E)
    before = plain(tokens())[2].max()
    plain.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("router.")})
    served = ours.eval()(tokens())
    handle.remove()
    for mine, removed, its in zip(served, ours(tokens()), plain(tokens()), strict=True):
        assert torch.equal(mine, its) and torch.equal(removed, its)
    assert served[2].max() < before


def test_training_begins_with_the_bias_that_the_model_has():
    ours, theirs = autoep_router("sigmoid", bias=True), autoep_router("sigmoid", bias=True)
    (router,) = adapter.patch(ours, "loss-free").routers.values()
    assert torch.equal(router.serving().bias_E, theirs.e_score_correction_bias)
    ours.e_score_correction_bias.data.mul_(2)
    theirs.e_score_correction_bias.data.mul_(2)
    assert torch.equal(ours(tokens())[2], theirs(tokens())[2])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "options", "reason"),
    [
        (make_gate, "xmoe", {}, "brings a gate"),
        (make_gate, "ssr-l", {"noise": "learned"}, "parameter"),
        (make_gate, "ssr-ec", {}, "does not give every token top_k=2 experts"),
        (make_gate, "ssr-l", {"score": "sigmoid"}, "score='sigmoid' is read from DeepSpeed's gate"),
        (autoep_router, "load-balance", {}, "auxiliary loss"),
        (lambda _: autoep_router(bias=True), "base", {}, "e_score_correction_bias"),
        (lambda _: autoep_router(bias=True), "quantile", {}, "QuantileRouter serves with a bias on the logits"),
        (trained_bias, "ssr-dual", {}, "e_score_correction_bias, which is trained"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_and_nothing_is_patched(make, method, options, reason):
    gate = autoep_router() if make is autoep_router else make(2)
    with pytest.raises(ValueError, match=reason):
        adapter.patch(gate, method, **options)
    assert type(gate) in (gates.TopKGate, ep_router.TokenChoiceTopKRouter)


def test_a_model_without_gates_and_one_that_is_patched_already_are_refused():
    with pytest.raises(ValueError, match="nothing to patch"):
        adapter.patch(nn.Linear(2, 2), "ssr-l")
    gate = make_gate(2)
    adapter.patch(gate, "ssr-l")
    with pytest.raises(ValueError, match=r"remove\(\) first"):
        adapter.patch(gate, "ssr-s")


def test_a_deepspeed_with_another_gate_is_refused_with_its_version(monkeypatch):
    monkeypatch.setattr(gates.TopKGate, "forward", lambda self, hidden, mask=None: None)
    with pytest.raises(RuntimeError, match=r"deepspeed 0\.19\.8 is not supported: .* install deepspeed==0\.19\.8"):
        adapter.patch(make_gate(2), "ssr-l")


def test_a_monitor_sees_what_serves_and_changes_nothing():
    moe = make_layer(2)
    adapter.patch(moe, "ssr-l", probability=1.0)
    expected = moe.eval()(tokens())[0]
    with sinkroute.LoadMonitor(moe) as monitor:
        assert torch.equal(moe(tokens())[0], expected)
        (probed,) = monitor.probe(tokens()).values()
    (metrics,) = monitor.metrics("eval").values()
    assert metrics["tokens"] == len(probed) > 0 and sum(metrics["load"]) == 2 * metrics["tokens"]
