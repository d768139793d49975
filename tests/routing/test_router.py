"""What all routers share: checks, masks, dtypes, serving, draws."""

import pytest
import torch
import torch.distributed

import sinkroute
from sinkroute._errors import NonFiniteLogits
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.registry import router_options
from sinkroute.routing.routes import Routes
from sinkroute.routing.serving import Link

QUIET = {"noise": 0.0}
# Every rule of every router, without noise, where the routes are functions of the scores alone.
# (Noisy ones have tests below; those where experts choose give other widths.)
FEW = ("noisy", "v-moe-noise", "expert-choice")
RULES = [
    *(pytest.param(name, {}, id=name) for name in sinkroute.list_routers() if name not in FEW and name[:3] != "ssr"),
    pytest.param("quantile", {"scope": "batch", "score": "sigmoid"}, id="quantile of the batch"),
    pytest.param("ssr-l", QUIET | {"probability": 0.0}, id="ssr-l by softmax"),
    pytest.param("ssr-l", QUIET | {"probability": 1.0, "plan_gradient": "weights"}, id="ssr-l by plan"),
    pytest.param("ssr-s", QUIET | {"probability": 0.0}, id="ssr-s by softmax"),
    pytest.param("ssr-s", QUIET | {"probability": 1.0}, id="ssr-s by plan"),
    pytest.param("ssr-s", QUIET | {"probability": 1.0, "plan_gradient": "weights"}, id="ssr-s by plan, weights"),
    pytest.param("ssr-s", QUIET | {"probability": 1.0, "plan_gradient": "full"}, id="ssr-s by plan, full"),
]
every_rule = pytest.mark.parametrize(("name", "options"), RULES)
# Noise is drawn for every place of a batch, so that tokens get another if the padding between them is left out.
NOISY_RULES = [pytest.param(name, {}, id=name) for name in ("noisy", "v-moe-noise")]
even_noisy_rules = pytest.mark.parametrize(("name", "options"), RULES + NOISY_RULES)


def make(name, options, experts=6, top_k=2):
    return sinkroute.create_router(name, num_experts=experts, top_k=top_k, **options)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(routes):
    """A loss that sees the weights unevenly, and the auxiliary loss."""
    tokens, top_k = routes.weights.shape
    loss = (routes.weights * torch.arange(1.0, 1 + tokens * top_k).view(tokens, top_k)).sum()
    return loss if routes.aux_loss is None else loss + routes.aux_loss


# -- masks -----------------------------------------------------------------------------------------------------------


@every_rule
def test_padding_changes_nothing_for_real_tokens(name, options):
    logits_TE, mask = random(30, 6, dtype=torch.float64), torch.arange(30) % 3 != 1
    padded, alone = logits_TE.clone().requires_grad_(), logits_TE[mask].clone().requires_grad_()
    routes, expected = make(name, options)(padded, mask), make(name, options)(alone)
    assert torch.equal(routes.experts[mask], expected.experts)
    assert torch.equal(routes.load, expected.load)
    torch.testing.assert_close(routes.weights[mask], expected.weights, rtol=0, atol=1e-12)
    gradient_TK = random(20, 2, seed=1, dtype=torch.float64)
    for given_routes, weights_TK in ((routes, routes.weights[mask]), (expected, expected.weights)):
        loss = (weights_TK * gradient_TK).sum()
        (loss if given_routes.aux_loss is None else loss + given_routes.aux_loss).backward()
    torch.testing.assert_close(padded.grad[mask], alone.grad, rtol=0, atol=1e-11)
    assert not padded.grad[~mask].any()


@even_noisy_rules
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_reaches_neither_routes_nor_gradients(name, options, garbage):
    mask = torch.tensor([True, False, True, True, False])
    results = []
    for content in (0.5, garbage):
        logits_TE = torch.where(mask[:, None], random(5, 6), content).requires_grad_()
        routes = make(name, options)(logits_TE, mask)
        loss_of(routes).backward()
        results.append((routes, logits_TE.grad))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert torch.equal(dirty.experts, clean.experts) and torch.equal(dirty.weights, clean.weights)
    assert torch.equal(dirty_gradient, clean_gradient) and torch.isfinite(dirty_gradient).all()


@even_noisy_rules
def test_masked_tokens_have_weight_0_and_indices_that_exist(name, options):
    mask = torch.tensor([False, True, True, False])
    for router in (make(name, options), make(name, options).eval()):
        routes = router(random(4, 6), mask)
        assert not routes.weights[~mask].any() and (routes.weights[mask] > 0).all()
        assert routes.experts.min() >= 0 and routes.experts.max() < 6


@even_noisy_rules
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_real_token_is_no_error(name, options, tokens):
    logits_TE = random(tokens, 6).requires_grad_()
    mask = torch.zeros(tokens, dtype=torch.bool)
    routes = make(name, options)(logits_TE, mask)
    assert routes.load.tolist() == [0] * 6 and routes.experts.shape == routes.weights.shape == (tokens, 2)
    assert not routes.weights.any() and (routes.aux_loss is None or routes.aux_loss == 0)
    loss_of(routes).backward()
    assert torch.equal(logits_TE.grad, torch.zeros(tokens, 6))


@even_noisy_rules
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 6, 2), (2, 6, 3), (1, 1, 1), (3, 2, 2)])
def test_fewer_tokens_than_experts_are_no_error(name, options, tokens, experts, top_k):
    logits_TE = random(tokens, experts).requires_grad_()
    routes = make(name, options, experts, top_k)(logits_TE)
    loss_of(routes).backward()
    assert int(routes.load.sum()) == tokens * top_k
    assert torch.isfinite(routes.weights).all() and torch.isfinite(logits_TE.grad).all()


# -- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_serving_is_plain_topk_to_the_last_bit(name, top_k):
    logits_TE, mask = random(50, 6), torch.arange(50) % 5 != 0
    options = {"probability": 1.0, "noise": 4.0} if "probability" in router_options(name) else {}
    router = make(name, options, top_k=top_k).eval()
    routes = router(logits_TE, mask)
    weighing = {"score": router.score, "norm_topk": router.norm_topk}  # some methods weigh by sigmoids
    plain = make("softmax", weighing, top_k=top_k).eval()(logits_TE, mask)
    assert torch.equal(routes.experts, plain.experts) and torch.equal(routes.weights, plain.weights)
    assert torch.equal(routes.load, plain.load) and routes.branch == "softmax"
    assert routes.aux_loss is routes.plan_error is routes.plan_passes is None


# -- dtypes ----------------------------------------------------------------------------------------------------------


@even_noisy_rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_the_routes_of_their_float32_values(name, options, dtype):
    half = random(30, 6).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    routes, expected = make(name, options)(half), make(name, options)(single)
    assert torch.equal(routes.experts, expected.experts) and torch.equal(routes.weights, expected.weights)
    assert routes.weights.dtype == torch.float32
    loss_of(routes).backward()
    loss_of(expected).backward()
    assert half.grad.dtype == dtype and torch.equal(half.grad, single.grad.to(dtype))


@even_noisy_rules
def test_float64_scores_stay_float64(name, options):
    routes = make(name, options)(random(10, 6, dtype=torch.float64))
    assert routes.weights.dtype == torch.float64
    assert routes.aux_loss is None or routes.aux_loss.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", {}),
        ("load-balance", {}),
        ("ssr-l", {"probability": 0.0}),
        ("ssr-s", {"probability": 1.0}),
    ],
)
def test_the_largest_bfloat16_scores_are_routed(name, options):
    logits_TE = torch.tensor([[3e38, -3e38, 0, 1], [1, 2, 3e38, -3e38]], dtype=torch.bfloat16, requires_grad=True)
    routes = make(name, options, experts=4)(logits_TE)
    loss_of(routes).backward()
    assert routes.experts[:, 0].tolist() == [0, 2]
    assert torch.isfinite(routes.weights).all() and torch.isfinite(logits_TE.grad).all()


# -- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("logits_TE", "mask", "error", "message"),
    [
        (torch.zeros(6), None, ValueError, r"logits_TE must have shape \(tokens, num_experts=6\), got \(6,\); flatten"),
        (torch.zeros(2, 3, 6), None, ValueError, r"logits_TE must have shape .*got \(2, 3, 6\); flatten"),
        (torch.zeros(3, 5), None, ValueError, r"logits_TE must have shape \(tokens, num_experts=6\), got \(3, 5\)"),
        (torch.zeros(3, 6, dtype=torch.int64), None, TypeError, r"logits_TE must be a float tensor, got torch\.int64"),
        (torch.zeros(3, 6, dtype=torch.bool), None, TypeError, r"logits_TE must be a float tensor, got torch\.bool"),
        (torch.zeros(3, 6, dtype=torch.complex64), None, TypeError, r"must be a float tensor, got torch\.complex64"),
        (torch.zeros(3, 6), torch.ones(3), TypeError, r"token_mask must be bool .*got torch\.float32; use mask\.bool"),
        (torch.zeros(3, 6), torch.ones(3).long(), TypeError, r"token_mask must be bool .*got torch\.int64"),
        (
            torch.zeros(3, 6),
            [True] * 3,
            TypeError,
            r"token_mask must be a bool tensor .*\(list\); use torch\.as_tensor",
        ),
        (
            torch.zeros(3, 6),
            "x",
            TypeError,
            r"token_mask must be a bool tensor .*got 'x' \(str\); use torch\.as_tensor",
        ),
        (torch.zeros(3, 6), torch.ones(4).bool(), ValueError, r"token_mask must have shape \(3,\).*got \(4,\)"),
        (torch.zeros(3, 6), torch.ones(3, 1).bool(), ValueError, r"token_mask must have shape \(3,\).*got \(3, 1\)"),
    ],
)
def test_input_of_a_wrong_form_is_refused(logits_TE, mask, error, message, training):
    with pytest.raises(error, match=message):
        make("ssr-s", {}).train(training)(logits_TE, mask)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_a_non_finite_score_of_a_real_token_is_named(name, value):
    logits_TE, mask = random(5, 6), torch.tensor([True, False, True, True, True])
    logits_TE[1, 0], logits_TE[3, 4], logits_TE[4, 0] = value, value, value  # the first is padding
    with pytest.raises(NonFiniteLogits, match=rf"logits_TE\[3, 4\] is {value}, one of 2 .*lower the learning rate"):
        make(name, {})(logits_TE, mask)


def test_infinities_of_both_signs_are_found_although_no_sum_is_infinite():
    with pytest.raises(NonFiniteLogits, match=r"logits_TE\[0, 0\] is inf, one of 2"):
        make("softmax", {}, experts=2)(torch.tensor([[float("inf"), float("-inf")]]))


def test_finite_scores_whose_sum_overflows_are_no_error():
    routes = make("softmax", {}, experts=2, top_k=1)(torch.full((4, 2), 3e38))
    assert torch.isfinite(routes.weights).all()


def test_a_number_that_float16_cannot_hold_is_found_in_it():
    with pytest.raises(NonFiniteLogits, match=r"logits_TE\[0, 1\] is inf"):
        make("softmax", {}, experts=2)(torch.tensor([[0.0, 1e6]]).half())


# -- draws -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend_rank(monkeypatch):
    def pretend(rank):
        monkeypatch.setattr(Ranks, "rank", rank)

    return pretend


def test_ranks_share_the_draw_of_the_branch_but_not_the_noise(pretend_rank):
    router, reference, uniforms, noises = make("ssr-s", {}), torch.empty(3, 6), [], []
    for rank in (0, 1, 0):
        pretend_rank(rank)
        uniforms.append([router.draw_uniform("branch", per_layer=per_layer) for per_layer in (False, True)])
        noises.append(router.draw_normal(reference))
    assert uniforms[0] == uniforms[1]
    assert not torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_a_process_alone_draws_as_rank_0_does(pretend_rank):
    router, reference = make("ssr-s", {}), torch.empty(3, 6)
    alone = router.draw_normal(reference)
    pretend_rank(0)
    assert torch.equal(router.draw_normal(reference), alone)


def test_the_description_tells_the_sizes():
    assert repr(make("softmax", {})) == "SoftmaxRouter(num_experts=6, top_k=2)"
    assert "reg=0.5, probability=0.001, noise=0.3" in repr(make("ssr-l", {}))


def test_the_gate_of_a_router_is_a_linear_map_without_bias():
    gate = make("softmax", {}).make_gate(10)
    assert gate.weight.shape == (6, 10) and gate.bias is None


# -- in a model that has a router already ----------------------------------------------------------------------------


def plain_of(logits_TE, top_k=2):
    """Another's choice, with weights that no rule of ours would give."""
    experts_TK = logits_TE.topk(top_k).indices
    return Routes(experts_TK, torch.full(experts_TK.shape, 0.25))


@pytest.mark.parametrize("name", ["softmax", "ssr-l", "ssr-b"])
def test_a_plain_choice_that_was_made_already_is_taken_as_it_is(name):
    options = {"probability": 0.0, **QUIET} if name != "softmax" else {}
    router, logits_TE = make(name, options | {"route_scale": 3.0}), random(20, 6)
    for training in (True, False):
        router.train(training)
        assert router.is_plain()
        given = plain_of(logits_TE)
        routes = router(logits_TE, plain=given)
        assert routes.experts is given.experts and torch.equal(routes.weights, given.weights)  # and not scaled
        assert routes.load.tolist() == given.experts.flatten().bincount(minlength=6).tolist()
        mask = torch.arange(20) < 15
        assert router(logits_TE, mask, plain=given).load.sum() == 30


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("load-balance", {}),
        ("loss-free", {}),
        ("sinkhorn", {}),
        ("ssr-l", QUIET | {"probability": 1.0}),
        ("ssr-l", {"probability": 0.0}),
        ("ssr-l", QUIET | {"probability": 0.0, "losses": {"z-loss": 0.1}}),
        ("ssr-bias", QUIET | {"probability": 0.0}),
    ],
)
def test_a_method_that_does_more_makes_its_own(name, options):
    router, logits_TE = make(name, options), random(20, 6)
    assert not router.is_plain()
    routes, expected = router(logits_TE, plain=plain_of(logits_TE)), make(name, options)(logits_TE)
    assert torch.equal(routes.weights, expected.weights) and torch.equal(routes.experts, expected.experts)
    assert not (routes.weights == 0.25).all()


@pytest.mark.parametrize("branch", ["softmax", "sinkhorn"])
def test_noise_of_the_other_branch_leaves_a_step_plain(branch):
    router = make("ssr-l", {"probability": 0.0, "noise": 0.5, "noise_branch": branch})
    assert router.is_plain() == (branch == "sinkhorn")


def test_serving_by_a_plan_is_not_plain():
    router = make("ssr-l", {}).eval()
    assert router.is_plain()
    sinkroute.set_inference(router, "sinkhorn")
    assert not router.is_plain()


@pytest.mark.parametrize("name", ["softmax", "ssr-l"])
@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_adds_to_scores_chooses_and_does_not_weigh(name, training):
    options = {"score": "sigmoid"} | ({} if name == "softmax" else {"probability": 0.0, **QUIET})
    router = make(name, options, experts=3).train(training)
    # Scores 0.5, 0.75, 0.25; with the correction 0.5, 0.15, 0.65.
    logits_TE = torch.tensor([[1.0, 3.0, 1 / 3]]).log()
    router.correction_E = torch.tensor([0.0, -0.6, 0.4])
    routes = router(logits_TE)
    assert routes.experts.tolist() == [[2, 0]]
    torch.testing.assert_close(routes.weights, torch.tensor([[1 / 3, 2 / 3]]))


def test_what_a_model_adds_to_logits_is_no_addition_to_scores():
    logits_TE = torch.tensor([[4.0, 3.0, 1.0]])
    chosen = {}
    for place in ("logits", "scores"):
        router = make("softmax", {"score": "sigmoid"}, experts=3, top_k=1)
        router.correction_E, router.correction_on = torch.tensor([0.0, 0.0, 2.5]), place
        chosen[place] = router(logits_TE).experts.item()
    assert chosen == {"logits": 0, "scores": 2}


def test_noise_in_front_of_a_correction_is_on_the_logits():
    router, logits_TE = make("ssr-l", {"probability": 0.0, "noise": 3.0, "noise_scale": "absolute"}), random(50, 6)
    router.correction_E = torch.tensor([9.0, 0, 0, 0, 0, 0])
    sinkroute.set_step(router, 1)
    routes = router(logits_TE)
    assert (routes.experts == 0).any(1).all()  # the correction outweighs every score
    noisy_TE = logits_TE + 3.0 * router.draw_normal(logits_TE)
    expected_TK = (noisy_TE.softmax(-1) + router.correction_E).topk(2).indices
    assert torch.equal(routes.experts, expected_TK)
    weights_TK = noisy_TE.gather(1, expected_TK).softmax(-1)
    torch.testing.assert_close(routes.weights, weights_TK)


def test_links_are_heard_before_a_step_ends_and_told_after_it():
    router, said = make("loss-free", {"update_rate": 0.5}, experts=2, top_k=1), []

    class Told(Link):
        def pull(self):
            router.state.bias_E.fill_(7.0)

        def push(self):
            said.append(router.state.bias_E.tolist())

    router.links.append(Told())
    sinkroute.set_step(router, 0)
    router(torch.tensor([[1.0, 0.0]]))
    sinkroute.end_step(router)
    assert said == [[6.5, 7.5]]


def test_a_correction_is_no_part_of_a_router():
    router = make("softmax", {})
    router.correction_E = torch.zeros(6)
    assert router.state_dict() == {} and list(router.buffers()) == []


def test_those_that_need_a_bias_or_a_gate_of_their_own_say_so():
    for name in sinkroute.list_routers():
        router = make(name, {})
        serving, bias = router.serving(), router.eval().choice_bias()
        assert (serving is None) == (not router.serves_any_gate) and (bias is None or serving == bias)
        if serving is not None:
            routes, plain_TK = router(logits_TE := random(20, 6)), router.plain_experts(logits_TE)
            assert serving.plain == (bias is None) and (not serving.plain or torch.equal(routes.experts, plain_TK))
    assert make("ssr-bias", {"serve_with": "plain"}).serving().plain
    assert make("ssr-l", {"inference": "noise"}).serving() is None


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("softmax", {}, (True, True)),
        ("load-balance", {}, (False, True)),
        ("ssr-l", {"probability": 0, "noise": 0}, (True, True)),
        ("ssr-l", {"probability": 1, "noise": 0}, (False, True)),
        ("ssr-l", {"probability": 0, "noise": 0.3}, (False, True)),
        ("ssr-l", {"probability": 0, "noise": 0, "inference": "sinkhorn"}, (True, False)),
        ("ssr-bias", {"probability": 0, "noise": 0}, (False, False)),
        ("ssr-bias", {"probability": 0, "noise": 0, "serve_with": "plain"}, (False, True)),
        ("loss-free", {}, (False, False)),
    ],
)
def test_a_router_says_where_it_does_no_more_than_plain_topk(name, options, plain):
    router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    assert (router.train().is_plain(), router.eval().is_plain()) == plain


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_logits_of_8_bits_are_routed_as_what_they_hold(dtype):
    router = sinkroute.create_router("softmax", num_experts=4, top_k=2)
    logits_TE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(router(logits_TE).weights, router(logits_TE.float()).weights)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no such dtype")
def test_logits_of_4_bits_are_refused_by_name():
    logits_TE = torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match=r"logits_TE is torch\.float4_e2m1fn_x2.*as torch\.bfloat16"):
        sinkroute.create_router("softmax", num_experts=4, top_k=2)(logits_TE)
