"""Our routers inside Megatron-Core's: against its own `TopKRouter`, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import sinkroute
from sinkroute.routing.attached import named_routers
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.registry import router_options

megatron_router = pytest.importorskip("megatron.core.transformer.moe.router")
transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
moe_layer = pytest.importorskip("megatron.core.transformer.moe.moe_layer")
moe_logging = pytest.importorskip("megatron.core.transformer.moe.moe_logging")
finalize = pytest.importorskip("megatron.core.distributed.finalize_model_grads")
layer_specs = pytest.importorskip("megatron.core.models.gpt.gpt_layer_specs")
spec_utils = pytest.importorskip("megatron.core.transformer.spec_utils")
parallel_state = pytest.importorskip("megatron.core.parallel_state")
parallel_random = pytest.importorskip("megatron.core.tensor_parallel.random")
dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")

from sinkroute.adapters.megatron import make_router, patch  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:megatron.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUIET = {"probability": 0.0, "noise": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_megatron_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    moe_logging.get_moe_metrics_tracker().metrics.clear()


def random(tokens, experts, seed=0):
    """Logits of which some experts get more than others, the same ones for every seed."""
    popular_E = torch.randn(experts, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) + popular_E


def config_of(experts=8, top_k=2, **options):
    said = {"moe_router_load_balancing_type": "none", "add_bias_linear": False, "use_cpu_initialization": True}
    return transformer_config.TransformerConfig(
        num_layers=4,
        hidden_size=12,
        num_attention_heads=4,
        moe_ffn_hidden_size=16,
        num_moe_experts=experts,
        moe_router_topk=top_k,
        **said | options,
    )


def groups():
    world = dist.group.WORLD
    return SimpleNamespace(tp=world, cp=world, tp_cp=world, tp_dp_cp=world)


def build(router, experts=8, top_k=2, layer=3, options=None, is_mtp_layer=False, pg_collection=None, **config):
    """Ours by its name and options, or Megatron's own (None)."""
    make = megatron_router.TopKRouter if router is None else make_router(router, **(options or {}))
    pg_collection = pg_collection or groups()
    made = make(config=config_of(experts, top_k, **config), pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
    made.set_layer_number(layer)
    return made


def run(router, logits_TE, padding_T=None, sequences=1):
    """probs, map and the gradient of the logits, for one random gradient of the probs; tokens as (length, batch)."""
    logits_TE = logits_TE.clone().requires_grad_()
    padding_LB = None if padding_T is None else padding_T.view(-1, sequences)
    probs_TE, map_TE = router.routing(logits_TE.view(-1, sequences, logits_TE.shape[1]), padding_LB)
    projection_TE = torch.randn(probs_TE.shape, generator=torch.Generator().manual_seed(1)).to(probs_TE.dtype)
    (probs_TE * projection_TE * (1 if padding_T is None else ~padding_T[:, None])).sum().backward()
    return probs_TE.detach(), map_TE, logits_TE.grad


def model_of(*routers):
    """What Megatron's updates of a global batch walk through."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(routers)
    return model


# -- as Megatron where nothing is balanced ---------------------------------------------------------------------------

SIGMOID = {"moe_router_score_function": "sigmoid"}
PRE = {"moe_router_pre_softmax": True}
CONFIGS = {
    "softmax over the chosen": (8, 2, {}),
    "softmax over the chosen, scaled": (8, 3, {"moe_router_topk_scaling_factor": 2.5}),
    "softmax before the choice": (8, 2, PRE),
    "softmax before the choice, one": (8, 1, PRE | {"moe_router_topk_scaling_factor": 8.0}),
    "sigmoid": (8, 3, SIGMOID),
    "sigmoid, one": (8, 1, SIGMOID),
    "sqrtsoftplus": (8, 2, {"moe_router_score_function": "sqrtsoftplus"}),
    "sqrtsoftplus, one": (8, 1, {"moe_router_score_function": "sqrtsoftplus"}),
    "best expert of a group": (16, 3, PRE | {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "best expert of a group, logits": (16, 3, {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "best two of a group": (16, 4, PRE | {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "as DeepSeek-V3": (
        16,
        6,
        SIGMOID
        | {
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 3,
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_dtype": "fp32",
        },
    ),
    "expert bias on sqrtsoftplus": (
        8,
        2,
        {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True},
    ),
}


@pytest.mark.parametrize("router", ["ssr-l", "ssr-s"])
@pytest.mark.parametrize("case", CONFIGS)
def test_without_plans_and_noise_probs_map_and_gradient_are_those_of_megatron(case, router):
    experts, top_k, options = CONFIGS[case]
    ours, theirs = build(router, experts, top_k, options=QUIET, **options), build(None, experts, top_k, **options)
    if ours.expert_bias is not None:
        for part in (ours, theirs):
            part.expert_bias.copy_(0.3 * random(1, experts, seed=5)[0])
    logits_TE = random(60, experts)
    for mine, its in zip(run(ours, logits_TE, sequences=2), run(theirs, logits_TE, sequences=2), strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    if ours.expert_bias is not None:
        torch.testing.assert_close(ours.local_tokens_per_expert, theirs.local_tokens_per_expert)
        assert ours.local_tokens_per_expert.sum() == 60 * top_k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_probs_have_the_dtype_of_the_logits(dtype):
    # Even steps: no two logits of a token are the same in bfloat16, whose ties anyone may break.
    logits_TE = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(40)]).to(
        dtype
    )
    for mine, its in zip(run(build("ssr-l", options=QUIET), logits_TE), run(build(None), logits_TE), strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_serving_is_megatrons_to_the_last_bit(grouped):
    options = {"moe_router_num_groups": 4, "moe_router_group_topk": 2} if grouped else {}
    ours = build("ssr-l", 16, 4, options={"probability": 1.0, "noise": 1.0}, **options, **SIGMOID).eval()
    theirs = build(None, 16, 4, **options, **SIGMOID).eval()
    for mine, its in zip(run(ours, random(50, 16)), run(theirs, random(50, 16)), strict=True):
        assert torch.equal(mine, its)


# -- plans and noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("router", ["ssr-l", "ssr-s", "ssr-b", "sinkhorn", "base"])
def test_a_plan_chooses_and_weighs_as_without_megatron(router, score):
    options = {"probability": 1.0, "noise": 0.5, "seed": 7} if "probability" in router_options(router) else {"seed": 7}
    ours = build(router, options=options, moe_router_score_function=score, moe_router_topk_scaling_factor=2.0)
    alone = sinkroute.create_router(
        router, num_experts=8, top_k=2, score=score, norm_topk=True, route_scale=2.0, layer=3, **options
    )
    logits_TE = random(64, 8).requires_grad_()
    for part in (ours, alone):
        sinkroute.set_step(part, 11)
    routes = alone(logits_TE)
    probs_TE, map_TE, gradient_TE = run(ours, logits_TE.detach())
    assert routes.branch == ("assignment" if router == "base" else "sinkhorn")
    assert torch.equal(map_TE, torch.zeros(64, 8, dtype=torch.bool).scatter(1, routes.experts, True))
    assert torch.equal(probs_TE.gather(1, routes.experts), routes.weights)
    assert torch.equal(probs_TE != 0, map_TE)
    projection_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    (routes.weights * projection_TE.gather(1, routes.experts)).sum().backward()
    torch.testing.assert_close(gradient_TE, logits_TE.grad)
    plain = run(build(None, moe_router_score_function=score), logits_TE.detach())[1].sum(0)
    assert map_TE.sum(0).max() < 0.8 * plain.max()


def test_a_plan_keeps_a_token_in_its_groups():
    ours = build(
        "ssr-l", 16, 4, options={"probability": 1.0}, moe_router_num_groups=4, moe_router_group_topk=2, **SIGMOID
    )
    map_TE = run(ours, random(80, 16))[1]
    assert (map_TE.view(80, 4, 4).any(-1).sum(-1) <= 2).all() and (map_TE.sum(-1) == 4).all()


def test_noise_is_keyed_by_seed_layer_step_and_micro_batch():
    def noisy(layer=1, step=0, micro_batch=0, seed=0, is_mtp_layer=False):
        options = {"probability": 0.0, "noise": 8.0, "seed": seed}
        ours = build("ssr-l", layer=layer, is_mtp_layer=is_mtp_layer, options=options)
        sinkroute.set_step(model_of(ours), step, micro_batch)
        return run(ours, random(64, 8))[0]

    assert torch.equal(noisy(), noisy())
    # The first layer of multi-token prediction is number 1 too; it must not have the noise of the decoder's.
    for other in ({"layer": 2}, {"step": 1}, {"micro_batch": 1}, {"seed": 1}, {"is_mtp_layer": True}):
        assert not torch.equal(noisy(), noisy(**other)), other


def test_all_layers_take_their_plan_in_the_same_steps():
    model = model_of(*(build("ssr-l", layer=layer, options={"probability": 0.3}) for layer in (1, 2, 3)))
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(20):
            sinkroute.set_step(model, step)
            before = monitor.metrics()
            for layer in model.layers:
                run(layer, random(16, 8))
            after = monitor.metrics()
            plans = {
                name: after[name]["sinkhorn_share"] * (step + 1) - (before[name]["sinkhorn_share"] or 0) * step
                for name in monitor.layers
            }
            assert len({round(share) for share in plans.values()}) == 1
    assert monitor.layers == [f"layers.{layer}" for layer in range(3)]
    assert 0 < after[monitor.layers[0]]["sinkhorn_share"] < 1


# -- padding ---------------------------------------------------------------------------------------------------------


def test_true_is_padding_in_megatrons_own_router_whatever_its_docstrings_say():
    logits_TE = random(40, 8)
    padding_T = torch.arange(40) % 4 == 1
    theirs = build(None, moe_z_loss_coeff=1.0)
    theirs.routing(logits_TE[:, None], padding_T[:, None])
    z_loss = moe_logging.get_moe_metrics_tracker().metrics["z_loss"].values.sum()
    torch.testing.assert_close(z_loss, torch.logsumexp(logits_TE[~padding_T], -1).square().mean())


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_padding_is_in_no_plan(noise):
    padding_T = torch.arange(64) % 4 == 1
    ours = build("ssr-l", options={"probability": 1.0, "noise": noise})
    logits_TE = random(64, 8)
    before = run(ours, logits_TE, padding_T, sequences=2)
    logits_TE[padding_T] = float("nan")
    after = run(ours, logits_TE, padding_T, sequences=2)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[~padding_T], other[~padding_T])
    if not noise:
        alone = run(ours, logits_TE[~padding_T])
        torch.testing.assert_close(alone[0], after[0][~padding_T], rtol=1e-3, atol=1e-5)
        assert torch.equal(alone[1], after[1][~padding_T])


def test_padding_goes_to_all_experts_in_turn_with_weight_0():
    # Dispatchers without capacity take it for granted that every row of the map has K experts.
    padding_T = torch.arange(60) >= 20
    ours = build("ssr-l")
    probs_TE, map_TE, gradient_TE = run(ours, random(60, 8), padding_T)
    assert (map_TE.sum(-1) == 2).all()
    assert map_TE[padding_T].sum(0).tolist() == [10] * 8
    assert (probs_TE[padding_T] == 0).all() and (gradient_TE[padding_T] == 0).all()
    assert (probs_TE[~padding_T].sum(-1) - 1).abs().max() < 1e-6


# -- what stays Megatron's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_its_losses_have_their_value_and_gradient(kind, padded):
    options = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}
    padding_T = torch.arange(60) % 5 == 1 if padded else None
    with pytest.warns(UserWarning, match="moe_aux_loss_coeff=0.3 with router='ssr-l': both balance"):
        ours = build("ssr-l", options=QUIET, **options)
    results = []
    for router in (ours, build(None, **options)):
        gradient_TE = run(router, random(60, 8), padding_T, sequences=3)[2]
        metrics = moe_logging.get_moe_metrics_tracker().metrics
        results.append([gradient_TE, *(metrics.pop(name).values.clone() for name in sorted(metrics))])
    assert len(results[0]) == len(results[1]) == 3
    for mine, its in zip(*results, strict=True):
        real = slice(None) if padding_T is None or mine.ndim == 1 else ~padding_T
        torch.testing.assert_close(mine[real], its[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_drops_as_in_megatron(policy, padded):
    options = {
        "moe_expert_capacity_factor": 1.0,
        "moe_token_drop_policy": policy,
        "moe_pad_expert_input_to_capacity": padded,
    }
    ours, theirs = build("ssr-l", options=QUIET, **options), build(None, **options)
    mine, its = run(ours, random(64, 8)), run(theirs, random(64, 8))
    assert torch.equal(mine[1], its[1]) and mine[1].sum(0).max() == 16
    torch.testing.assert_close(mine[0], its[0])


def test_a_plan_leaves_little_to_drop():
    options = {"moe_expert_capacity_factor": 1.0}
    kept = [
        run(build("ssr-b", options={"probability": probability}, **options), random(256, 8))[1].sum().item()
        for probability in (0.0, 1.0)
    ]
    assert kept[0] < 0.85 * 512 and kept[1] >= 0.99 * 512


def test_the_expert_bias_learns_from_real_tokens_and_not_from_plans():
    options = {"moe_router_enable_expert_bias": True, **SIGMOID}
    padding_T = torch.arange(60) % 3 == 1
    counted = []
    for probability in (0.0, 1.0):
        ours = build("ssr-l", options={"probability": probability, "noise": 0.0}, **options)
        map_TE = run(ours, random(60, 8), padding_T)[1]
        counted.append(ours.local_tokens_per_expert)
        if probability == 0:
            assert torch.equal(ours.local_tokens_per_expert, map_TE[~padding_T].sum(0).float())
    assert counted[1].sum() == 0


def test_a_loss_of_ours_reaches_the_gate():
    ours = build("ssr-l", options=QUIET | {"losses": {"load-balance": 0.5, "z-loss": 0.1}})
    alone = sinkroute.create_router("softmax", num_experts=8, top_k=2, losses={"load-balance": 0.5, "z-loss": 0.1})
    logits_TE = random(60, 8).requires_grad_()
    alone(logits_TE).aux_loss.backward()
    wanted_TE = logits_TE.grad.clone()
    input_TE = logits_TE.detach().clone().requires_grad_()
    (ours.routing(input_TE[:, None])[0].sum() * 0).backward()
    torch.testing.assert_close(input_TE.grad, wanted_TE)


def test_per_token_losses_are_scaled_like_megatrons():
    # With calculate_per_token_loss every gradient is later divided by all tokens: what it attaches is multiplied first.
    padding_T = torch.arange(60) % 3 == 1
    gradients = []
    for scaled in (False, True):
        ours = build("ssr-l", options=QUIET | {"losses": {"z-loss": 0.1}}, calculate_per_token_loss=scaled)
        logits_TE = random(60, 8).requires_grad_()
        (ours.routing(logits_TE[:, None], padding_T[:, None])[0].sum() * 0).backward()
        gradients.append(logits_TE.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * 40)


# -- its expert bias, moved by ours ----------------------------------------------------------------------------------

BIASED = SIGMOID | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.02}
# Methods that serve with a bias on the scores.
MOVERS = {
    "ssr-dual": {},
    "ssr-dual exactly": {"exact": True},
    "ssr-bias": {"probability": 0.5},
    "loss-free": {"update_rate": 0.02},
    "quantile": {"scope": "batch"},
    "smebu": {"update_rate": 0.05},
}


def moved(name, steps=6, **config):
    """A router that has moved `expert_bias` in training, with Megatron's own updates after each global batch."""
    ours = build(name.split()[0], options=MOVERS[name], **BIASED | config)
    model = model_of(ours)
    for step in range(steps):
        for micro_batch in range(2):
            sinkroute.set_step(model, step, micro_batch)
            run(ours, random(64, 8, seed=2 * step + micro_batch))
        before_E = ours.expert_bias.clone()
        finalize._update_router_expert_bias([model], ours.config, dist.group.WORLD)
        finalize.reset_model_temporary_tensors(ours.config, [model])
        assert torch.equal(ours.expert_bias, before_E), "Megatron moved it"
    sinkroute.end_step(model)
    return ours


@pytest.mark.parametrize("name", MOVERS)
def test_a_bias_of_ours_is_megatrons_own_which_plain_megatron_serves_to_the_last_bit(name):
    ours, theirs = moved(name), build(None, **BIASED)
    learned_E = ours.router.serving().bias_E
    assert learned_E.abs().max() > 1e-3 and torch.equal(ours.expert_bias, learned_E)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("router.")})
    logits_TE = random(640, 8, seed=50)
    for mine, its in zip(run(ours.eval(), logits_TE), run(theirs.eval(), logits_TE), strict=True):
        assert torch.equal(mine, its)
    plain = run(build(None, **BIASED).eval(), logits_TE)[1].sum(0).max()
    assert run(theirs, logits_TE)[1].sum(0).max() < plain


def test_ssr_dual_serves_plain_megatron_nearly_in_balance():
    theirs = build(None, **BIASED)
    theirs.expert_bias.copy_(moved("ssr-dual", steps=20).expert_bias)
    load_E = run(theirs.eval(), random(4096, 8, seed=51))[1].sum(0)
    assert load_E.max() < 1.2 * 4096 * 2 / 8 < 1.5 * run(build(None).eval(), random(4096, 8, seed=51))[1].sum(0).max()


def test_loss_free_balancing_moves_the_bias_as_megatron_does():
    ours, theirs = moved("loss-free"), build(None, **BIASED)
    for step in range(6):
        for micro_batch in range(2):
            run(theirs, random(64, 8, seed=2 * step + micro_batch))
        finalize._update_router_expert_bias([model_of(theirs)], theirs.config, dist.group.WORLD)
        finalize.reset_model_temporary_tensors(theirs.config, [model_of(theirs)])
    torch.testing.assert_close(ours.expert_bias, theirs.expert_bias, rtol=0, atol=1e-7)
    assert theirs.expert_bias.abs().max() > 0.05


def test_evaluation_with_gradients_does_not_move_the_bias_either():
    ours = moved("ssr-dual")
    run(ours.eval(), random(64, 8))
    ours.train()
    before_E = ours.expert_bias.clone()
    finalize._update_router_expert_bias([model_of(ours)], ours.config, dist.group.WORLD)
    assert torch.equal(ours.expert_bias, before_E)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_ended_and_from_megatrons_with_its_bias():
    ours, resumed, theirs = moved("ssr-dual"), build("ssr-dual", **BIASED), build(None, **BIASED)
    resumed.load_state_dict(ours.state_dict(), strict=True)
    for router in (ours, resumed):
        sinkroute.set_step(router, 6)
        run(router, random(64, 8, seed=60))
        sinkroute.end_step(router)
    assert torch.equal(ours.expert_bias, resumed.expert_bias)
    theirs.expert_bias.copy_(random(1, 8, seed=61)[0])
    resumed.load_state_dict(theirs.state_dict(), strict=True)
    for mine, its in zip(run(resumed.eval(), random(64, 8)), run(theirs.eval(), random(64, 8)), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(resumed.router.serving().bias_E, theirs.expert_bias)


def test_the_bias_is_float32_in_a_model_of_bfloat16():
    ours = build("ssr-dual", **BIASED).bfloat16()
    for step in range(3):
        sinkroute.set_step(ours, step)
        ours(torch.randn(64, 1, 12, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(step)))
    sinkroute.end_step(ours)
    assert ours.expert_bias.dtype == torch.float32
    assert torch.equal(ours.expert_bias, ours.router.serving().bias_E) and ours.expert_bias.abs().max() > 0


def test_a_model_whose_bias_ours_moved_keeps_it_when_ours_is_removed():
    theirs = build(None, **BIASED)
    model = model_of(theirs)
    handle = patch(model, "ssr-dual")
    for step in range(3):
        sinkroute.set_step(model, step)
        run(theirs, random(64, 8, seed=step))
    sinkroute.end_step(model)
    served = run(theirs.eval(), random(64, 8))
    handle.remove()
    assert type(theirs) is megatron_router.TopKRouter and theirs.expert_bias.abs().max() > 0
    for before, after in zip(served, run(theirs, random(64, 8)), strict=True):
        assert torch.equal(before, after)


def test_a_bias_that_is_frozen_is_not_moved():
    ours = build("ssr-dual", **BIASED)
    ours.frozen_expert_bias = True
    with pytest.raises(ValueError, match="frozen_expert_bias=True, and SSRDualRouter moves expert_bias"):
        run(ours, random(64, 8))
    run(ours.eval(), random(64, 8))


# -- without an expert bias: folded into the gate --------------------------------------------------------------------

FOLDED = {"ssr-dual": {}, "ssr-fold": {"probability": 0.5}, "ssr-bias": {"probability": 0.5}, "quantile": {}}


def tokens(seed, count=64):
    """(count, 1, 12), alike: their common part is the same for every seed."""
    common = torch.randn(12, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, 1, 12, generator=torch.Generator().manual_seed(seed)) + 2 * common


def folded(router, steps=8, after_step=lambda router: None):
    for step in range(steps):
        sinkroute.set_step(router, step)
        router(tokens(step))
        sinkroute.end_step(router)
        after_step(router)
    return router


def most(router):
    """The largest load when it serves, in shares."""
    with torch.no_grad():
        return router.eval()(tokens(50, 1024))[1].sum(0).max().item() / (1024 * 2 / 8)


def skewed(router, **how):
    torch.manual_seed(0)
    made = build(router, **how)
    torch.nn.init.normal_(made.weight, std=0.3)
    return made


@pytest.mark.parametrize("config", [{}, PRE, SIGMOID, {"add_bias_linear": True}], ids=["", "pre", "sigmoid", "bias"])
@pytest.mark.parametrize("name", FOLDED)
def test_potentials_are_in_the_gate_which_plain_megatron_serves_to_the_last_bit(name, config):
    ours, theirs = (skewed(router, options=FOLDED[name] if router else None, **config) for router in (name, None))
    before = most(theirs)
    if theirs.bias is not None:
        theirs.bias.data.copy_(ours.bias)
    folded(ours)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("router.")})
    for mine, its in zip(ours.eval()(tokens(9)), theirs.eval()(tokens(9)), strict=True):
        assert torch.equal(mine, its)
    assert most(theirs) < 0.75 * before


@pytest.mark.parametrize("part", ["all of it", "the first", "the last", "none"])
def test_the_optimisers_copy_of_a_gate_in_low_precision_is_moved_too(part, monkeypatch):
    ours = skewed("ssr-dual", moe_router_dtype="fp32").bfloat16()
    size = {"all of it": 96, "the first": 60, "the last": 36, "none": 0}[part]
    at = slice(0, size) if part != "the last" else slice(96 - size, 96)
    main = ours.weight.detach().flatten()[at].float()
    ours.weight.main_param = main if size else None
    if part != "all of it":
        ours.weight.main_param_sharded = True
        # The other ranks have the rest.
        monkeypatch.setattr(type(ours.router.ranks.load), "sum", lambda self, value: value + 1)

    def step_of_the_optimiser(router):
        written = router.weight.detach().flatten()[at]
        torch.testing.assert_close(written.float(), main, rtol=1e-2, atol=1e-3)
        written.copy_(main)

    if part in ("all of it", "none"):
        before = most(skewed(None, moe_router_dtype="fp32"))
        assert most(folded(ours, after_step=step_of_the_optimiser)) < 0.75 * before
    else:
        folded(ours, 3, step_of_the_optimiser)


@pytest.mark.parametrize(
    ("main", "words"),
    [(None, "keeps a float32 copy of that where it cannot be found"), (torch.zeros(30), "has 30 numbers of 96")],
)
def test_an_optimisers_copy_that_cannot_be_moved_is_refused(main, words):
    ours = skewed("ssr-dual").bfloat16()
    ours.weight.main_param, ours.weight.main_param_sharded = main, True
    sinkroute.set_step(ours, 0)
    ours(tokens(0).bfloat16())
    with pytest.raises(ValueError, match=words):
        sinkroute.end_step(ours)


def test_without_a_name_the_recommended_router_comes_in_the_form_that_fits():
    for config, where in (({}, "folded into the gate"), (BIASED, "its bias is the layer's")):
        model = model_of(build(None, **config))
        told = str(patch(model)).splitlines()
        assert told[0] == "ssr-dual in 1 of 1 layers of Module" and told[1].endswith(where)
    assert make_router()(config=config_of(), pg_collection=groups()).router.bias_on == "logits"
    assert model.layers[0].router.bias_on == "scores"


def test_a_gate_that_is_frozen_is_not_moved():
    theirs = skewed(None)
    theirs.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="SSRDualRouter moves the gate's weight of Megatron's router, which is frozen"):
        patch(theirs, "ssr-dual")


# -- the layer -------------------------------------------------------------------------------------------------------


def layer_of(router=None, **options):
    """A whole MoE layer on the CPU, where its all-gather dispatcher runs."""
    submodules = spec_utils.get_submodules(layer_specs.get_gpt_layer_local_submodules(num_experts=8).mlp)
    if router is not None:
        submodules.router = router
    torch.manual_seed(0)
    layer = moe_layer.MoELayer(config_of(moe_router_dtype="fp32", **options), submodules)
    layer.set_layer_number(2)
    return layer


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_trains_and_is_watched(padded):
    layer = layer_of(make_router("ssr-b", probability=1.0))
    padding_BL = (torch.arange(24) >= 18).expand(2, 24) if padded else None
    x_LBD = torch.randn(24, 2, 12, generator=torch.Generator().manual_seed(0))
    with sinkroute.LoadMonitor(layer) as monitor:
        sinkroute.set_step(layer, 0)
        layer(x_LBD, padding_mask=padding_BL)[0].square().sum().backward()
        metrics = monitor.metrics()["router"]
    assert sum(metrics["load"]) == metrics["tokens"] * 2 == (72 if padded else 96)
    assert metrics["max_vio"] < 0.12 and metrics["sinkhorn_share"] == 1
    assert layer.router.weight.grad is not None


def test_a_layer_is_as_without_sinkroute_when_it_serves_and_a_monitor_sees_it():
    x_LBD = torch.randn(24, 2, 12, generator=torch.Generator().manual_seed(0))
    ours, theirs = layer_of(make_router("ssr-l", noise=1.0)).eval(), layer_of().eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        wanted_LBD = theirs(x_LBD)[0]
        assert torch.equal(ours(x_LBD)[0], wanted_LBD)
        with sinkroute.LoadMonitor(ours) as monitor:
            assert torch.equal(ours(x_LBD)[0], wanted_LBD)
            map_TE = ours.router(x_LBD)[1]
    load_E = torch.tensor(monitor.metrics("eval")["router"]["load"])
    assert torch.equal(load_E, 2 * map_TE.sum(0))


@pytest.mark.parametrize("router", ["ssr-l", "ssr-bias", "load-balance"])
def test_megatrons_recomputation_repeats_the_choices_and_counts_once(router, monkeypatch):
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        monkeypatch.setattr(parallel_random, name, lambda *args, **kwargs: torch.zeros(1, dtype=torch.uint8))
    x_LBD = torch.randn(24, 2, 12, generator=torch.Generator().manual_seed(0))
    options = {} if router == "load-balance" else {"probability": 0.5, "noise": 4.0}
    results = []
    for recompute in (False, True):
        how = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
        layer = layer_of(make_router(router, **options), **how)
        with sinkroute.LoadMonitor(layer) as monitor:
            for step in range(4):
                sinkroute.set_step(layer, step)
                layer(x_LBD.clone().requires_grad_())[0].square().sum().backward()
        (metrics,) = monitor.metrics().values()
        results.append((layer.router.weight.grad, metrics["load"]))
        if router == "ssr-bias":
            sinkroute.end_step(layer)
            results[-1] += (layer.router.router.state.bias_E.clone(),)
            assert results[-1][2].abs().max() > 0
    assert sum(results[1][1]) == 4 * 48 * 2
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(recomputed), torch.as_tensor(plain), rtol=0, atol=1e-6)


# -- a model that is built already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["ssr-b", "ssr-bias"])
def test_a_patched_layer_routes_as_one_that_was_built_with_the_router(router):
    x_LBD = torch.randn(24, 2, 12, generator=torch.Generator().manual_seed(0))
    built, patched = layer_of(make_router(router, probability=0.5)), layer_of()
    handle = patch(patched, router, probability=0.5)
    outputs = []
    for layer in (built, patched):
        for step in range(3):
            sinkroute.set_step(layer, step)
            layer(x_LBD)[0].sum().backward()
        sinkroute.end_step(layer)
        outputs.append([layer(x_LBD)[0], layer.router.weight.grad, *layer.state_dict().values()])
    assert built.state_dict().keys() == patched.state_dict().keys()
    for one, other in zip(*outputs, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert bool(handle.state_dict()) == (router == "ssr-bias")


def test_what_is_removed_leaves_nothing():
    layer, plain = layer_of(), layer_of()
    handle = patch(layer, "ssr-bias")
    assert str(handle).splitlines() == [
        "ssr-bias in 1 of 1 layers of MoELayer",
        "  1 × router  TopKRouter  softmax, top 2 of 8, renormalised, folded into the gate",
    ]
    with pytest.raises(ValueError, match=r"remove\(\) first"):
        patch(layer, "ssr-l")
    handle.remove()
    handle.remove()
    assert type(layer.router) is megatron_router.TopKRouter
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert not sinkroute.routing.attached.named_routers(layer)


# -- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "ssr-l", "ssr-s", "ssr-b", "sinkhorn", "load-balance"])
def test_a_router_that_remembers_nothing_adds_no_key(router):
    ours, theirs = build(router), build(None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.sharded_state_dict().keys() == theirs.sharded_state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_of_loss_free_balancing_is_float32_and_that_of_megatron(score):
    ours = build("loss-free", options={"update_rate": 0.02}, moe_router_score_function=score).bfloat16()
    theirs = build(
        None, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.02, moe_router_score_function="sigmoid"
    )
    model = model_of(ours)
    for step in range(10):
        for micro_batch in range(2):
            sinkroute.set_step(model, step, micro_batch)
            logits_TE = random(64, 8, seed=micro_batch)
            mine, its = run(ours, logits_TE), run(theirs, logits_TE)
            if score == "sigmoid":
                torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
        sinkroute.end_step(model)
        finalize._update_router_expert_bias([model_of(theirs)], theirs.config, dist.group.WORLD)
        finalize.reset_model_temporary_tensors(theirs.config, [model_of(theirs)])
    bias_E = ours.router.state.bias_E
    assert bias_E.dtype == torch.float32 and bias_E.abs().max() > 0.05
    if score == "sigmoid":
        torch.testing.assert_close(bias_E, theirs.expert_bias, rtol=0, atol=1e-7)
        for mine, its in zip(run(ours.eval(), random(64, 8)), run(theirs.eval(), random(64, 8)), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def trained():
    ours = build("loss-free", options={"update_rate": 0.2})
    sinkroute.set_step(ours, 0)
    run(ours, random(64, 8))
    sinkroute.end_step(ours)
    return ours


def test_what_is_remembered_travels_in_the_state_dict():
    ours, fresh = trained(), build("loss-free")
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(fresh.router.state.bias_E, ours.router.state.bias_E)
    assert fresh.router.state.bias_E.abs().max() > 0.1
    assert set(ours.state_dict()) - set(build(None).state_dict()) == {
        f"router.state.{name}" for name in ("bias_E", "saved_steps", "saved_load_E")
    }


def test_a_checkpoint_from_before_loads_strictly_into_a_router_that_remembers():
    ours, theirs = trained(), model_of(build(None))
    bias_E = ours.router.state.bias_E.clone()
    model_of(ours).load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.weight, theirs.layers[0].weight)
    assert torch.equal(ours.router.state.bias_E, bias_E)


def test_half_a_state_is_refused_when_it_is_loaded_strictly():
    state = trained().state_dict()
    del state["router.state.bias_E"]
    with pytest.raises(RuntimeError, match=r"Missing key.*router\.state\.bias_E"):
        build("loss-free").load_state_dict(state, strict=True)


@pytest.mark.filterwarnings("ignore")
def test_megatrons_distributed_checkpoints_go_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def save(router, name):
        (tmp_path / name).mkdir()
        dist_checkpointing.save(router.sharded_state_dict(prefix="router."), str(tmp_path / name))

    def load(router, name, **how):
        state = dist_checkpointing.load(router.sharded_state_dict(prefix="router."), str(tmp_path / name), **how)
        router.load_state_dict({key.removeprefix("router."): value for key, value in state.items()}, strict=True)
        return router

    ours, theirs = trained(), build(None)
    save(ours, "ours")
    save(theirs, "theirs")
    biased = moved("ssr-dual")
    save(biased, "biased")
    assert torch.equal(load(build(None, **BIASED), "biased").expert_bias, biased.expert_bias)
    resumed = load(build("loss-free"), "ours")
    assert torch.equal(resumed.router.state.bias_E, ours.router.state.bias_E)
    assert resumed.router.state.ended == ours.router.state.ended == 0
    assert torch.equal(load(build(None), "ours").weight, ours.weight)
    assert torch.equal(load(build("ssr-l"), "theirs").weight, theirs.weight)
    begun = load(build("loss-free"), "theirs", strict="log_unexpected")
    assert torch.equal(begun.weight, theirs.weight) and begun.router.state.bias_E.abs().max() == 0


def test_a_bias_of_our_own_serves_too():
    ours = trained()
    plain, served = run(build(None).eval(), random(64, 8))[1].sum(0), run(ours.eval(), random(64, 8))[1].sum(0)
    assert served.max() < 0.8 * plain.max()


def test_set_inference_reaches_the_router():
    ours = build("ssr-l").eval()
    plain = run(ours, random(64, 8))[1].sum(0)
    sinkroute.set_inference(model_of(ours), "sinkhorn")
    assert run(ours, random(64, 8))[1].sum(0).max() < 0.8 * plain.max()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "options", "config", "words"),
    [
        ("ssr", {}, {}, "unknown router 'ssr'"),
        ("ssr-l", {"plan_ranks": "pp"}, {}, "unknown plan_ranks 'pp'"),
        ("ssr-l", {"plan_ranks": "ep"}, {}, "needs the group 'ep', .* lacks; it has tp_cp, tp_dp_cp, tp, cp: take"),
        ("ssr-l", {"reg_": 1.0}, {}, "unknown option of router 'ssr-l': 'reg_'; did you mean 'reg'"),
        ("ssr-l", {"score": "sigmoid"}, {}, "score='sigmoid' is read from Megatron's config"),
        ("ssr-l", {"process_group": "world"}, {}, "process_group='world': plan_ranks says .* tp_cp"),
        ("ssr-l", {"layer": 3}, {}, "layer=3: Megatron numbers"),
        ("ssr-l", {"noise": "learned"}, {}, "has a parameter"),
        ("xmoe", {}, {}, "'xmoe' brings a gate"),
        (
            "ssr-fold",
            {},
            {"moe_router_enable_expert_bias": True, **SIGMOID},
            "SSRFoldRouter balances the gate, and moe_router_enable_expert_bias puts a bias",
        ),
        ("expert-choice", {}, {}, "does not give every token top_k=2 experts"),
        ("ssr-ec", {}, {}, "does not give every token top_k=2 experts"),
        ("ssr-l", {}, {"moe_router_load_balancing_type": "sinkhorn"}, 'sinkhorn.* set it to "none"'),
        ("ssr-l", {}, {"moe_router_load_balancing_type": "quantile_balancing"}, 'quantile.* set it to "none"'),
        ("ssr-l", {}, {"moe_router_fusion": True}, "moe_router_fusion=True.* set it to False"),
        ("ssr-l", {}, {"moe_enable_routing_replay": True}, "moe_enable_routing_replay=True.* set it to False"),
        (
            "quantile",
            {},
            {"moe_router_enable_expert_bias": True, **SIGMOID},
            "QuantileRouter serves with a bias on the logits, and that of moe_router_enable_expert_bias is on",
        ),
        (
            "ssr-dual",
            {"bias_on": "logits"},
            {"moe_router_enable_expert_bias": True, **SIGMOID},
            "SSRDualRouter serves with a bias on the logits",
        ),
        (
            "sinkhorn",
            {},
            {"moe_router_enable_expert_bias": True, **SIGMOID},
            "moe_router_enable_expert_bias puts a bias.* SinkhornRouter",
        ),
        ("ssr-l", {}, {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []}, "captures the router"),
        ("ssr-l", {}, {"cuda_graph_impl": "local", "cuda_graph_modules": ["moe_router"]}, "captures the router"),
    ],
)
def test_what_would_go_wrong_is_refused_by_name(router, options, config, words):
    with pytest.raises(ValueError, match=words):
        build(router, options=options, **config)


@pytest.mark.parametrize(
    ("top_k", "config", "words"),
    [
        (6, {"moe_router_group_topk": 2, **SIGMOID}, "moe_router_group_topk=2 with moe_router_topk=6"),
        (4, {"moe_router_group_topk": 2}, "moe_router_pre_softmax=False"),
    ],
)
def test_groups_that_our_routers_would_judge_otherwise_are_refused(top_k, config, words):
    with pytest.raises(ValueError, match=words):
        build("ssr-l", 16, top_k, moe_router_num_groups=4, **config)


def test_a_graph_of_the_attention_alone_is_no_obstacle():
    assert build("ssr-l", cuda_graph_impl="local", cuda_graph_modules=["attn"])


def test_another_version_of_megatron_is_warned_of(monkeypatch):
    monkeypatch.setattr("sinkroute.adapters.megatron._version", "0.20.0")
    with pytest.warns(UserWarning, match="tested with Megatron-Core 0.19, this is 0.20.0"):
        build("ssr-l")


# -- several ranks ---------------------------------------------------------------------------------------------------

TOKENS = 96


def routed_on_a_rank():
    """Two data-parallel replicas of two context-parallel ranks, which hold a part each of one batch."""
    torch.cuda.current_device = lambda: "cpu"
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    own = SimpleNamespace(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
        tp_dp_cp=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )
    logits_TE = random(TOKENS, 8).chunk(4)[dist.get_rank()]
    seen = {}
    for plan_ranks in ("tp_cp", "tp_dp_cp"):
        options = {"probability": 1.0, "noise": 0.0, "tol": 1e-6, "plan_ranks": plan_ranks}
        probs_TE, map_TE, _ = run(build("ssr-l", pg_collection=own, options=options), logits_TE)
        seen[plan_ranks] = (probs_TE, map_TE)
    losses = {"losses": {"z-loss": 0.1}}
    input_TE = logits_TE.clone().requires_grad_()
    (build("ssr-l", pg_collection=own, options=QUIET | losses).routing(input_TE[:, None])[0].sum() * 0).backward()
    seen["loss gradient"] = input_TE.grad
    router = build("loss-free", pg_collection=own, options={"update_rate": 0.02})
    sinkroute.set_step(router, 0)
    seen["load"] = run(router, logits_TE)[1].sum(0)
    sinkroute.end_step(router)
    seen["bias"] = router.router.state.bias_E
    noisy = build("ssr-l", pg_collection=own, options={"probability": 0.0, "noise": 8.0})
    seen["noisy"] = run(noisy, torch.zeros(24, 8))[0]
    seen["group"] = torch.tensor(dist.get_process_group_ranks(own.tp_cp))
    return seen


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks(routed_on_a_rank, 4)


@pytest.mark.parametrize("plan_ranks", ["tp_cp", "tp_dp_cp"])
def test_a_plan_is_that_of_all_the_tokens_of_its_ranks(ranks, plan_ranks):
    logits_TE = random(TOKENS, 8)
    options = {"probability": 1.0, "noise": 0.0, "tol": 1e-6}
    together = [logits_TE] if plan_ranks == "tp_dp_cp" else logits_TE.chunk(2)
    assert ranks[0]["group"].tolist() == [0, 1] and ranks[3]["group"].tolist() == [2, 3]
    wanted = [run(build("ssr-l", options=options), part_TE) for part_TE in together]
    for place in (0, 1):
        seen_TE = torch.cat([rank[plan_ranks][place] for rank in ranks])
        torch.testing.assert_close(seen_TE, torch.cat([part[place] for part in wanted]), rtol=1e-3, atol=1e-5)


NAMES = ("tp", "cp", "tp_cp", "dp", "dp_cp", "tp_dp_cp", "ep", "tp_ep")


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_of_any_group_of_a_stage_and_counts_are_of_the_stage(name):
    alone = dist.new_group([0])
    own = SimpleNamespace(**{each: alone if each == name else dist.group.WORLD for each in NAMES})
    made = build("ssr-l", pg_collection=own, options={"plan_ranks": name})
    ranks = next(iter(named_routers(made).values())).ranks
    assert ranks.plan == Ranks(alone)
    assert ranks.load == ranks.noise == Ranks(own.tp_dp_cp)


def test_a_patch_takes_the_groups_of_the_part_that_the_router_is_in():
    alone = dist.new_group([0])
    model = model_of(build(None), build(None))
    model.pg_collection = SimpleNamespace(**vars(groups()), dp_cp=dist.group.WORLD)
    model.layers.pg_collection = SimpleNamespace(**vars(groups()), dp_cp=alone)
    with pytest.raises(ValueError, match=r"'dp', which .* lacks; it has tp_cp, tp_dp_cp, tp, cp, dp_cp: take"):
        patch(model, "ssr-l", plan_ranks="dp")
    routers = patch(model, "ssr-l", plan_ranks="dp_cp").routers
    assert [router.ranks.plan for router in routers.values()] == [Ranks(alone)] * 2


def test_a_patch_takes_the_groups_that_a_router_keeps_where_no_part_has_any():
    model = model_of(build(None))
    assert len(patch(model, "ssr-l", plan_ranks="cp")) == 1
    with pytest.raises(ValueError, match=r"'dp_cp', which .* lacks; it has tp_cp, tp_dp_cp, tp, cp: take"):
        patch(model_of(build(None)), "ssr-l", plan_ranks="dp_cp")


def test_the_two_kinds_of_plan_differ(ranks):
    assert not torch.equal(*(torch.cat([rank[kind][0] for rank in ranks]) for kind in ("tp_cp", "tp_dp_cp")))


def test_what_is_counted_over_a_batch_is_of_all_ranks(ranks):
    load_E = sum(rank["load"] for rank in ranks)
    bias_E = 0.02 * torch.sign(load_E.double().mean() - load_E).float()
    assert bias_E.abs().max() > 0
    for rank in ranks:
        torch.testing.assert_close(rank["bias"], bias_E)


def test_ranks_with_other_tokens_have_other_noise(ranks):
    assert len({tuple(rank["noisy"].flatten().tolist()) for rank in ranks}) == 4


def test_a_loss_of_ours_is_divided_by_the_ranks_whose_gradients_are_added_up(ranks):
    for rank, logits_TE in zip(ranks, random(TOKENS, 8).chunk(4), strict=True):
        logits_TE = logits_TE.clone().requires_grad_()
        (0.1 * torch.logsumexp(logits_TE, -1).square().mean() / 2).backward()
        torch.testing.assert_close(rank["loss gradient"], logits_TE.grad)


def test_a_loss_free_gate_is_plain_at_first():
    probs_TE, map_TE, _ = run(build("loss-free"), random(50, 8))
    weights_TK, experts_TK = random(50, 8).topk(2)
    assert torch.equal(map_TE, torch.zeros(50, 8, dtype=torch.bool).scatter(1, experts_TK, True))
    torch.testing.assert_close(probs_TE.gather(1, experts_TK), F.softmax(weights_TK, -1))


# -- Megatron's own tests --------------------------------------------------------------------------------------------


@pytest.mark.skipif("MEGATRON_REPO" not in os.environ, reason="MEGATRON_REPO names no checkout of Megatron-LM")
def test_the_router_tests_of_a_checkout_of_megatron_pass_with_ours_plugged_in():
    # `core_v0.19.0` of NVIDIA/Megatron-LM. The tests of a linear layer have no router in them, and take minutes.
    tests = Path(os.environ["MEGATRON_REPO"], "tests/unit_tests/transformer/moe/test_routers.py")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "ROUTER": "ssr-l",
        "OPTIONS": json.dumps(QUIET),
    }
    how = ["-p", "megatron_on_the_cpu", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "-q", "-rs"]
    program = [sys.executable, "-m", "pytest", *how, "--rootdir", str(tests.parent), "-k", "not gating_linear", tests]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
