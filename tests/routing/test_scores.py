"""Scores, groups and weights: by hand, and as the routers of model families have them (transformers)."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import sinkroute
from sinkroute.routing.scores import limit_to_groups, log_scores, scores, weigh


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make(experts, top_k, name="softmax", **options):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


# -- model families --------------------------------------------------------------------------------------------------


def family(router, experts, top_k, **config):
    """A family's router whose logits are its input: D = E, and its weight is the identity."""
    sizes = {
        "hidden_size": experts,
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
    }
    module = router(SimpleNamespace(**sizes, **config))
    with torch.no_grad():
        module.weight.copy_(torch.eye(experts))
    return module


def table(experts_TK, weights_TK, experts):
    """(T, E) weights, 0 where not chosen, and which are chosen: neither depends on the order of the K."""
    zeros_TE = torch.zeros(len(experts_TK), experts)
    return zeros_TE.scatter(1, experts_TK, weights_TK), zeros_TE.scatter(1, experts_TK, 1.0)


def assert_alike(router, module, logits_TE):
    """Same experts, weights and gradient of the logits."""
    results = []
    for call in (lambda z: router(z), module):
        leaf_TE = logits_TE.clone().requires_grad_()
        out = call(leaf_TE)
        experts_TK, weights_TK = (out.experts, out.weights) if hasattr(out, "experts") else (out[2], out[1])
        weights_TE, chosen_TE = table(experts_TK, weights_TK, logits_TE.shape[1])
        (weights_TE * random(*weights_TE.shape, seed=1)).sum().backward()
        results.append((weights_TE.detach(), chosen_TE, leaf_TE.grad))
    (weights_TE, chosen_TE, gradient_TE), (their_weights_TE, their_chosen_TE, their_gradient_TE) = results
    assert torch.equal(chosen_TE, their_chosen_TE) and (chosen_TE.sum(1) == router.top_k).all()
    torch.testing.assert_close(weights_TE, their_weights_TE, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient_TE, their_gradient_TE, rtol=1e-5, atol=1e-6)
    assert gradient_TE.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("router", "config", "options"),
    [
        pytest.param(MixtralTopKRouter, {}, {}, id="Mixtral"),
        pytest.param(OlmoeTopKRouter, {"norm_topk_prob": False}, {"norm_topk": False}, id="OLMoE"),
        pytest.param(OlmoeTopKRouter, {"norm_topk_prob": True}, {}, id="OLMoE, normalised"),
        pytest.param(Qwen3MoeTopKRouter, {"norm_topk_prob": True}, {}, id="Qwen3-MoE"),
        pytest.param(Qwen3MoeTopKRouter, {"norm_topk_prob": False}, {"norm_topk": False}, id="Qwen3-MoE, plain"),
        pytest.param(GptOssTopKRouter, {}, {}, id="GPT-OSS: softmax after the top-k"),
    ],
)
def test_softmax_families_choose_and_weigh_alike(router, config, options, training):
    for scale in (0.1, 1.0, 8.0):
        assert_alike(make(16, 4, **options).train(training), family(router, 16, 4, **config), scale * random(50, 16))


def test_one_expert_per_token_is_weighed_by_its_score_as_olmoe_does_without_normalising():
    assert_alike(make(8, 1), family(OlmoeTopKRouter, 8, 1, norm_topk_prob=False), random(30, 8))


def test_one_expert_per_token_weighs_1_if_that_is_asked_for_as_mixtral_does():
    weights = make(8, 1, norm_topk=True)(random(30, 8)).weights
    assert torch.equal(weights, torch.ones(30, 1))
    assert torch.equal(family(MixtralTopKRouter, 8, 1)(random(30, 8))[1], torch.ones(30, 1))


def test_the_bias_of_gpt_oss_belongs_to_the_gate():
    module, bias_E = family(GptOssTopKRouter, 8, 2), random(8, seed=2)
    with torch.no_grad():
        module.bias.copy_(bias_E)
    routes, (_, weights_TK, experts_TK) = make(8, 2)(random(30, 8) + bias_E), module(random(30, 8))
    assert torch.equal(routes.experts, experts_TK)
    torch.testing.assert_close(routes.weights, weights_TK)


@st.composite
def group_sizes(draw):
    groups, members = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(top_groups * members, 6)))
    return groups, groups * members, top_groups, top_k


@settings(deadline=None, max_examples=40)
@given(group_sizes(), st.floats(0.1, 20), st.booleans(), st.integers(0, 2**32))
def test_deepseek_v2_chooses_groups_by_their_best_expert(sizes, route_scale, limited, seed):
    groups, experts, top_groups, top_k = sizes
    module = family(
        DeepseekV2TopkRouter,
        experts,
        top_k,
        topk_method="group_limited_greedy" if limited else "greedy",
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=route_scale,
    )
    options = {"groups": groups, "top_groups": top_groups, "group_score": "max"} if limited else {}
    router = make(experts, top_k, norm_topk=False, route_scale=route_scale, **options)
    assert_alike(router, module, random(20, experts, seed=seed))


@pytest.mark.parametrize("module", [DeepseekV3TopkRouter, Glm4MoeTopkRouter], ids=["DeepSeek-V3", "GLM-4"])
@settings(deadline=None, max_examples=40)
@given(group_sizes(), st.floats(0.1, 20), st.booleans(), st.sampled_from([0.0, 0.3]), st.integers(0, 2**32))
def test_deepseek_v3_chooses_by_biased_sigmoids_in_groups_with_the_best_two(
    module, sizes, route_scale, normalise, bias_scale, seed
):
    groups, experts, top_groups, top_k = sizes
    config = {
        "n_group": groups,
        "topk_group": top_groups,
        "routed_scaling_factor": route_scale,
        "norm_topk_prob": normalise,
    }
    module = family(module, experts, top_k, **config)
    options = {"groups": groups, "top_groups": top_groups, "route_scale": route_scale, "norm_topk": normalise}
    router = make(experts, top_k, "loss-free", score="sigmoid", **options)
    bias_E = bias_scale * random(experts, seed=3)
    module.e_score_correction_bias.copy_(bias_E)
    router.state.bias_E.copy_(bias_E)
    if normalise and top_k == 1:  # the one weight is constant: no gradient for either
        logits_TE = random(20, experts, seed=seed)
        assert torch.equal(router(logits_TE).experts, module(logits_TE)[2])
        return
    assert_alike(router, module, random(20, experts, seed=seed))
    if bias_scale == 0:  # and without a bias any router with sigmoid scores
        assert_alike(make(experts, top_k, score="sigmoid", **options), module, random(20, experts, seed=seed))


@settings(deadline=None, max_examples=40)
@given(group_sizes(), st.integers(0, 2**32))
def test_mistral_4_chooses_by_softmax_scores_in_groups_with_the_best_two(sizes, seed):
    groups, experts, top_groups, top_k = sizes
    config = {"n_group": groups, "topk_group": top_groups, "routed_scaling_factor": 1.0, "norm_topk_prob": top_k > 1}
    module = family(Mistral4TopkRouter, experts, top_k, **config)
    router = make(experts, top_k, groups=groups, top_groups=top_groups)
    # Even where the sums of two logits would choose other groups than the sums of two scores.
    assert_alike(router, module, 2 * random(20, experts, seed=seed))


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama_4_weighs_by_the_sigmoid_of_the_chosen_logits(top_k):
    module = family(Llama4Router, 8, top_k)

    def call(logits_TE):
        scores_TE, _ = module(logits_TE)
        experts_TK = scores_TE.topk(top_k).indices
        return None, scores_TE.gather(1, experts_TK), experts_TK

    assert_alike(make(8, top_k, score="sigmoid", norm_topk=False), call, random(30, 8))


# -- by hand ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 9), st.data())
def test_weights_are_the_scores_of_the_chosen_and_normalised_sum_to_1(tokens, experts, data):
    score = data.draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    logits_TE = 5 * random(tokens, experts, seed=data.draw(st.integers(0, 2**32)), dtype=torch.float64)
    experts_TK = random(tokens, experts, seed=1).topk(data.draw(st.integers(1, experts))).indices
    chosen_TK = scores(logits_TE, score).gather(1, experts_TK)
    torch.testing.assert_close(weigh(logits_TE, experts_TK, score, normalise=False), chosen_TK)
    normalised_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weigh(logits_TE, experts_TK, score, normalise=True), normalised_TK)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_normalised_weights_survive_scores_that_underflow(score):
    # exp(-200) is 0 in float32, for the chosen of a softmax and for sigmoids alike; their ratio is e : 1.
    logits_TE = torch.tensor([[0.0, -200.0, -201.0]]) if score == "softmax" else torch.tensor([[-300.0, -200, -201]])
    logits_TE.requires_grad_()
    weights_TK = weigh(logits_TE, torch.tensor([[1, 2]]), score, normalise=True)
    weights_TK[0, 0].backward()
    ratio = 1 / (1 + torch.e**-1)
    torch.testing.assert_close(weights_TK, torch.tensor([[ratio, 1 - ratio]]))
    slope = ratio * (1 - ratio)
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[0.0, slope, -slope]]))


def test_deepseek_v4_scores_are_roots_of_softplus():
    # log(1 + e⁰) = 0.6931, log(1 + 3) = 1.3863.
    logits_TE = torch.tensor([[0.0, torch.tensor(3.0).log()]])
    torch.testing.assert_close(scores(logits_TE, "sqrtsoftplus"), torch.tensor([[0.83255, 1.17741]]), rtol=1e-5, atol=0)


def test_of_far_negative_logits_roots_of_softplus_keep_their_ratio_and_gradient():
    # √log(1 + eᶻ) is e^(z/2) there: a ratio of √e for a difference of 1, and a slope of half of a softmax's.
    for lowest in (-30.0, -120.0, -300.0):
        logits_TE = torch.tensor([[5.0, lowest + 1, lowest]], requires_grad=True)
        weights_TK = weigh(logits_TE, torch.tensor([[1, 2]]), "sqrtsoftplus", normalise=True)
        weights_TK[0, 0].backward()
        ratio = 1 / (1 + torch.e**-0.5)
        torch.testing.assert_close(weights_TK, torch.tensor([[ratio, 1 - ratio]]))
        slope = ratio * (1 - ratio) / 2
        torch.testing.assert_close(logits_TE.grad, torch.tensor([[0.0, slope, -slope]]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=6))
def test_logarithms_of_scores_are_right_up_to_a_constant(score, logits):
    logits_TE = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    shares_TE = torch.softmax(log_scores(logits_TE, score), dim=-1)
    plain_TE = scores(logits_TE, score)
    torch.testing.assert_close(shares_TE, plain_TE / plain_TE.sum(), rtol=1e-6, atol=1e-12)
    (gradient,) = torch.autograd.grad(shares_TE[0, 0], logits_TE, retain_graph=True)
    (expected,) = torch.autograd.grad((plain_TE / plain_TE.sum())[0, 0], logits_TE)
    assert gradient.isfinite().all()
    if logits_TE.min() > -15:  # below, the plain way's own derivatives round
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)


def test_a_sigmoid_that_rounds_to_1_still_tells_experts_apart():
    routes = make(4, 2, score="sigmoid")(torch.tensor([[20.0, 30.0, 25.0, 40.0]]))
    assert routes.experts.tolist() == [[3, 1]]


def test_the_two_scores_of_a_group_choose_different_groups():
    # Groups (4, 0), (3, 3): the best expert is in the first, the best two together are in the second.
    values_TE = torch.tensor([[4.0, 0.0, 3.0, 3.0]])
    assert limit_to_groups(values_TE, 2, 1, "max").isfinite().tolist() == [[True, True, False, False]]
    assert limit_to_groups(values_TE, 2, 1, "top2-sum").isfinite().tolist() == [[False, False, True, True]]


def test_of_equal_groups_the_lower_is_taken_or_those_that_are_drawn():
    values_TE = torch.zeros(2000, 8)
    assert limit_to_groups(values_TE, 4, 2, "max").isfinite().sum(0).tolist() == [2000] * 4 + [0] * 4
    assert limit_to_groups(values_TE.t().contiguous().t(), 4, 2, "max").isfinite().sum(0)[:4].tolist() == [2000] * 4
    drawn_E = limit_to_groups(values_TE, 4, 2, "max", torch.tensor(1)).isfinite().sum(0)
    assert (drawn_E - 1000).abs().max() < 120  # a standard deviation is 22


def test_a_group_of_one_expert_is_as_good_as_that():
    values_TE = torch.tensor([[1.0, 3.0, 2.0]])
    assert limit_to_groups(values_TE, 3, 2, "top2-sum").tolist() == [[float("-inf"), 3.0, 2.0]]


@settings(deadline=None, max_examples=60)
@given(group_sizes(), st.sampled_from(["max", "top2-sum"]), st.integers(0, 2**32))
def test_experts_of_the_best_groups_stay_and_keep_their_gradient(sizes, group_score, seed):
    groups, experts, top_groups, _ = sizes
    values_TE = random(6, experts, seed=seed).requires_grad_()
    limited_TE = limit_to_groups(values_TE, groups, top_groups, group_score)
    for row, limited in zip(values_TE.tolist(), limited_TE.tolist(), strict=True):
        parts = [sorted(row[g : g + experts // groups], reverse=True) for g in range(0, experts, experts // groups)]
        values = [part[0] if group_score == "max" else part[0] + part[1] for part in parts]
        best = sorted(range(groups), key=lambda g: -values[g])[:top_groups]
        expected = [v if e // (experts // groups) in best else float("-inf") for e, v in enumerate(row)]
        assert limited == expected
    limited_TE[limited_TE.isfinite()].sum().backward()
    assert torch.equal(values_TE.grad, limited_TE.isfinite().float())


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("group_score", ["max", "top2-sum"])
def test_all_groups_are_no_groups(score, group_score):
    logits_TE = 30 + 10 * random(40, 8)  # sigmoids that round to 1, too
    grouped = make(8, 3, score=score, groups=4, group_score=group_score)(logits_TE)
    plain = make(8, 3, score=score)(logits_TE)
    assert torch.equal(grouped.experts, plain.experts) and torch.equal(grouped.weights, plain.weights)


def test_the_scale_of_the_routes_multiplies_weights_and_no_loss():
    plain, scaled = (make(8, 2, "load-balance", route_scale=s)(random(20, 8)) for s in (1.0, 2.5))
    torch.testing.assert_close(scaled.weights, 2.5 * plain.weights)
    assert torch.equal(scaled.aux_loss, plain.aux_loss) and torch.equal(scaled.load, plain.load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "softmx"}, "unknown score 'softmx'; did you mean 'softmax'"),
        ({"group_score": "top2"}, "unknown group_score 'top2'; did you mean 'top2-sum'"),
        ({"groups": 3}, "groups must divide num_experts=8, got 3"),
        ({"groups": 0}, "groups must be an integer of 1 or more, got 0"),
        ({"groups": 4, "top_groups": 5}, "top_groups must be between 1 and groups=4 .*got 5"),
        ({"groups": 4, "top_groups": 0}, "top_groups must be an integer of 1 or more, got 0"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, r"hold top_k=3 experts \(2 in a group\), got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sinkroute.create_router("softmax", **{"num_experts": 8, "top_k": 2} | options)


@pytest.mark.parametrize("options", [{"groups": 2.0}, {"route_scale": "2"}])
def test_options_of_a_wrong_type_are_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        make(8, 2, **options)
