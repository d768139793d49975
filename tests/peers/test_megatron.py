"""Routers, losses and bias updates against those of Megatron-Core, on the CPU and one rank."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import sinkroute

megatron_router = pytest.importorskip("megatron.core.transformer.moe.router")
transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
moe_logging = pytest.importorskip("megatron.core.transformer.moe.moe_logging")
finalize = pytest.importorskip("megatron.core.distributed.finalize_model_grads")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:megatron.*")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_megatron_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    moe_logging.get_moe_metrics_tracker().metrics.clear()


def random(tokens, experts, seed=0):
    """Logits of which some experts get more than others, the same ones for every seed."""
    popular_E = torch.randn(experts, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) + popular_E


def megatron(balancing, experts, top_k, coefficient=0.0, **options):
    config = transformer_config.TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        add_bias_linear=False,
        use_cpu_initialization=True,
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type=balancing,
        moe_aux_loss_coeff=coefficient,
        **options,
    )
    world = dist.group.WORLD
    router = megatron_router.TopKRouter(config, SimpleNamespace(tp=world, cp=world, tp_cp=world, tp_dp_cp=world))
    router.set_layer_number(1)
    return router


def peer(router, mask=None, sequences=1):
    """Megatron's tokens stand in (length, batch); its mask is True for PADDING, whatever its docstrings say."""

    def route(logits_TE):
        logits_LBE = logits_TE.view(sequences, -1, logits_TE.shape[1]).transpose(0, 1)
        padding_LB = None if mask is None else ~mask.view(sequences, -1).T
        probs_TE, map_TE = router.routing(logits_LBE, padding_LB)
        return (*(x.unflatten(0, (-1, sequences)).transpose(0, 1).flatten(0, 1) for x in (probs_TE, map_TE)), None)

    return route


def logged(name):
    """A loss as Megatron logs it, without its coefficient, since this was last asked."""
    metrics = moe_logging.get_moe_metrics_tracker().metrics
    return metrics.pop(name).values.item()


# -- scores and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [2, 3])
def test_softmax_weights_are_those_of_megatron(agree, top_k):
    agree(
        sinkroute.create_router("softmax", num_experts=8, top_k=top_k), peer(megatron("none", 8, top_k)), random(50, 8)
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_that_are_not_renormalised_are_those_of_its_softmax_before_the_choice(agree, top_k):
    router = sinkroute.create_router("softmax", num_experts=8, top_k=top_k, norm_topk=False)
    agree(router, peer(megatron("none", 8, top_k, moe_router_pre_softmax=True)), random(50, 8))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sigmoid_weights_and_their_scale_are_those_of_megatron(agree, top_k):
    router = sinkroute.create_router("softmax", num_experts=8, top_k=top_k, score="sigmoid", route_scale=2.5)
    theirs = megatron("none", 8, top_k, moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5)
    agree(router, peer(theirs), random(50, 8))


def groups_of(score, top_k, top_groups, group_score):
    """16 experts in 4 groups. Megatron sums the best top_k / top_groups of a group: 1 is our "max", 2 our "top2-sum".

    With a softmax it sums logits, unless told to take the softmax first; DeepSeek and we sum scores.
    """
    options = {"moe_router_score_function": score, "moe_router_pre_softmax": score == "softmax"}
    router = sinkroute.create_router(
        "softmax",
        num_experts=16,
        top_k=top_k,
        score=score,
        norm_topk=score == "sigmoid",
        groups=4,
        top_groups=top_groups,
        group_score=group_score,
    )
    return router, megatron("none", 16, top_k, moe_router_num_groups=4, moe_router_group_topk=top_groups, **options)


@pytest.mark.parametrize(
    ("top_k", "top_groups", "group_score"), [(3, 2, "max"), (4, 2, "top2-sum"), (6, 3, "top2-sum")]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choices_within_groups_are_those_of_megatron(agree, score, top_k, top_groups, group_score):
    ours, theirs = groups_of(score, top_k, top_groups, group_score)
    plain = sinkroute.create_router("softmax", num_experts=16, top_k=top_k)
    routes = agree(ours, peer(theirs), random(80, 16))
    assert not torch.equal(routes.load, plain(random(80, 16)).load), "the groups forbid nothing here"


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_load_balancing_loss_is_that_of_megatron(agree, score, top_k, masked):
    mask = torch.arange(60) % 4 != 1 if masked else None
    router = sinkroute.create_router("load-balance", num_experts=8, top_k=top_k, coefficient=0.3, score=score)
    theirs = megatron("aux_loss", 8, top_k, 0.3, moe_router_score_function=score)
    routes = agree(router, peer(theirs, mask), random(60, 8), mask)
    assert routes.aux_loss.item() / 0.3 == pytest.approx(logged("load_balancing_loss"), rel=1e-5)


def test_the_load_balancing_loss_of_one_choice_is_that_of_megatron(agree):
    router = sinkroute.create_router("load-balance", num_experts=8, top_k=1)
    routes = agree(router, peer(megatron("aux_loss", 8, 1, 0.01, moe_router_pre_softmax=True)), random(60, 8))
    assert routes.aux_loss.item() / 0.01 == pytest.approx(logged("load_balancing_loss"), rel=1e-5)


def test_the_global_loss_is_that_of_megatron_over_the_micro_batches_of_two_steps(agree):
    # Both count the micro-batches up to the present one. Megatron takes the mean count over them by this one's tokens:
    # the same as ours where all have as many real tokens, as here.
    ours = sinkroute.create_router("global-load-balance", num_experts=8, top_k=2, coefficient=0.3)
    theirs = megatron("global_aux_loss", 8, 2, 0.3)
    for step in range(2):
        for micro_batch in range(3):
            sinkroute.set_step(ours, step, micro_batch)
            routes = agree(ours, peer(theirs), random(60, 8, seed=10 * step + micro_batch))
            assert routes.aux_loss.item() / 0.3 == pytest.approx(logged("global_load_balancing_loss"), rel=1e-5)
        theirs.reset_global_aux_loss_tracker()


def test_micro_batches_weigh_in_the_global_loss_by_their_real_tokens():
    # Megatron counts a step's choices per micro-batch: after one of 60 tokens, one of 20 sees shares that sum to 2.
    # The loss of even scores is 1 whatever the load, if f are shares: ours is, and Megatron's is 2.
    ours = sinkroute.create_router("global-load-balance", num_experts=8, top_k=2, coefficient=1.0)
    theirs = megatron("global_aux_loss", 8, 2, 1.0)
    for micro_batch, tokens in enumerate((60, 20)):
        sinkroute.set_step(ours, 0, micro_batch)
        loss = ours(torch.zeros(tokens, 8)).aux_loss
        theirs.routing(torch.zeros(tokens, 1, 8))
        assert loss.item() == pytest.approx(1.0)
        assert logged("global_load_balancing_loss") == pytest.approx([1.0, 2.0][micro_batch])


@pytest.mark.parametrize("masked", [False, True])
def test_the_z_loss_is_that_of_megatron(agree, masked):
    mask = torch.arange(60) % 4 != 1 if masked else None
    router = sinkroute.create_router("z-loss", num_experts=8, top_k=2, coefficient=0.02)
    routes = agree(router, peer(megatron("none", 8, 2, moe_z_loss_coeff=0.02), mask), random(60, 8), mask)
    assert routes.aux_loss.item() / 0.02 == pytest.approx(logged("z_loss"), rel=1e-5)


def test_losses_add_up_as_in_megatron(agree):
    losses = {"load-balance": 0.3, "global-load-balance": 0.1, "z-loss": 0.02}
    router = sinkroute.create_router("softmax", num_experts=8, top_k=2, losses=losses)
    theirs = megatron(["aux_loss", "global_aux_loss"], 8, 2, [0.3, 0.1], moe_z_loss_coeff=0.02)
    agree(router, peer(theirs), random(60, 8))


def test_within_groups_our_loss_counts_the_choices_made_and_megatrons_those_that_scores_alone_would_make():
    # DeepSeek-V2, whose groups these are, counts what a token selects (arXiv 2405.04434, section 2.2.3); so do we.
    logits_TE = random(80, 16)
    groups = {"groups": 4, "top_groups": 1, "score": "sigmoid"}
    made = sinkroute.create_router("load-balance", num_experts=16, top_k=2, coefficient=1.0, **groups)(logits_TE)
    alone = sinkroute.create_router("load-balance", num_experts=16, top_k=2, coefficient=1.0, score="sigmoid")(
        logits_TE
    )
    options = {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_score_function": "sigmoid"}
    _, map_TE, _ = peer(megatron("aux_loss", 16, 2, 1.0, **options))(logits_TE)
    assert torch.equal(map_TE.sum(0), made.load) and not torch.equal(made.load, alone.load)
    assert logged("load_balancing_loss") == pytest.approx(alone.aux_loss.item(), rel=1e-5)
    assert made.aux_loss.item() != pytest.approx(alone.aux_loss.item(), rel=0.01)


@pytest.mark.parametrize("method", ["load-balance", "global-load-balance", "z-loss"])
def test_neither_has_a_loss_when_serving(agree, method):
    balancing = {"load-balance": "aux_loss", "global-load-balance": "global_aux_loss", "z-loss": "none"}[method]
    theirs = megatron(balancing, 8, 2, 0.3, moe_z_loss_coeff=0.02).eval()
    assert (
        agree(sinkroute.create_router(method, num_experts=8, top_k=2).eval(), peer(theirs), random(60, 8)).aux_loss
        is None
    )


# -- assignments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_is_that_of_megatron(agree, training, top_k):
    # Megatron weighs one choice by its sigmoid and several by their softmax, not renormalised. It stops where the
    # scaling moves by less than 1e-4 in the mean, which leaves no choice of these logits in doubt.
    score = "sigmoid" if top_k == 1 else "softmax"
    options = {"score": score, "norm_topk": False, "tol": 1e-6}
    ours = sinkroute.create_router("sinkhorn", num_experts=8, top_k=top_k, **options).train(training)
    routes = agree(ours, peer(megatron("sinkhorn", 8, top_k).train(training)), random(60, 8))
    assert (routes.load.max() < 2 * routes.load.double().mean()) == training


# -- biases ----------------------------------------------------------------------------------------------------------


def model_of(router):
    """What Megatron's update of a global batch walks through."""
    model = torch.nn.Module()
    model.router = router
    return [model]


@pytest.mark.parametrize("groups", [1, 4])
def test_the_bias_and_what_it_chooses_stay_those_of_megatron_over_several_steps(agree, groups):
    options = {"groups": groups, "top_groups": 2 if groups > 1 else 1}
    ours = sinkroute.create_router("loss-free", num_experts=16, top_k=4, score="sigmoid", update_rate=0.02, **options)
    theirs = megatron(
        "none",
        16,
        4,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.02,
        moe_router_num_groups=groups if groups > 1 else None,
        moe_router_group_topk=2 if groups > 1 else None,
    )
    most = []
    for step in range(20):
        for micro_batch in range(2):
            sinkroute.set_step(ours, step, micro_batch)
            most.append(agree(ours, peer(theirs), random(64, 16, seed=micro_batch)).load.max().item())
        sinkroute.end_step(ours)
        finalize._update_router_expert_bias(model_of(theirs), theirs.config, dist.group.WORLD)
        finalize.reset_model_temporary_tensors(theirs.config, model_of(theirs))
        torch.testing.assert_close(ours.state.bias_E, theirs.expert_bias, rtol=0, atol=1e-7)
    assert most[-1] < 0.7 * most[0], "the bias has balanced nothing"
    agree(ours.eval(), peer(theirs.eval()), random(64, 16, seed=5))


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_quantile_balancing_is_that_of_megatron_over_several_steps(agree, score, ema):
    # Megatron subtracts its numbers from the logits, we add ours. Its own rule holds where experts divide the choices,
    # as here, and without padding.
    ours = sinkroute.create_router("quantile", num_experts=16, top_k=4, score=score, ema=ema)
    options = {"moe_router_score_function": score, "moe_router_quantile_balancing_ema": ema}
    theirs = megatron("quantile_balancing", 16, 4, **options)
    most = []
    for step in range(8):
        for micro_batch in range(2):
            sinkroute.set_step(ours, step, micro_batch)
            most.append(agree(ours, peer(theirs), random(64, 16, seed=micro_batch)).load.max().item())
        sinkroute.end_step(ours)
        finalize._update_router_qb_beta(model_of(theirs), theirs.config, dist.group.WORLD)
        finalize.reset_model_temporary_tensors(theirs.config, model_of(theirs))
        torch.testing.assert_close(ours.state.bias_E, -theirs.qb_beta, rtol=0, atol=1e-6)
    assert most[-1] < 0.7 * most[0], "the bias has balanced nothing"
    agree(ours.eval(), peer(theirs.eval()), random(64, 16, seed=5))


def test_evaluation_between_two_steps_moves_neither_quantile():
    ours = sinkroute.create_router("quantile", num_experts=16, top_k=4)
    theirs = megatron("quantile_balancing", 16, 4)
    sinkroute.set_step(ours, 0)
    for training, seed in ((True, 0), (False, 1)):
        ours.train(training)(random(64, 16, seed))
        peer(theirs.train(training))(random(64, 16, seed))
    sinkroute.end_step(ours)
    finalize._update_router_qb_beta(model_of(theirs.train()), theirs.config, dist.group.WORLD)
    torch.testing.assert_close(ours.state.bias_E, -theirs.qb_beta, rtol=0, atol=1e-6)
