"""ssr-dual: potentials that are kept, corrected after every step, and served with their average."""

import math

import numpy as np
import pytest
import torch

import sinkroute
from sinkroute.routing.metrics import max_violation
from sinkroute.routing.routers import ssr_dual

EXACT = {"exact": True}
FORMS = pytest.mark.parametrize("options", [{}, EXACT], ids=["online", "exact"])


def make(options=None, experts=8, top_k=2):
    return sinkroute.create_router("ssr-dual", num_experts=experts, top_k=top_k, **(options or {}))


def batch(seed, tokens=512, experts=8, skew=1.5):
    generator = torch.Generator().manual_seed(seed)
    popularity_E = skew * torch.randn(experts, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, experts, generator=generator) + popularity_E


def train(router, batches, start=0):
    """MaxVio of every step, one batch a step."""
    found = []
    for step, logits_TE in enumerate(batches, start):
        sinkroute.set_step(router, step)
        found.append(max_violation(router.train()(logits_TE).load).item())
    sinkroute.end_step(router)
    return found


def test_the_gradient_of_the_dual_is_the_load_minus_its_share():
    logits_TE, bias_E = batch(0).double(), torch.randn(8, dtype=torch.float64, requires_grad=True)
    cap = 2 * len(logits_TE) / 8
    dual = (logits_TE + bias_E).topk(2).values.sum() - cap * bias_E.sum()
    dual.backward()
    load_E = (logits_TE + bias_E).topk(2).indices.flatten().bincount(minlength=8)
    assert torch.equal(bias_E.grad, load_E - cap)


def test_the_first_step_finds_potentials_and_the_second_is_balanced():
    first, second, *_ = train(make(), [batch(0)] * 3)
    assert first > 1 and second <= 0.02


def test_the_exact_form_is_balanced_on_every_step_from_the_first():
    assert max(train(make(EXACT), [batch(seed) for seed in range(10)])) <= ssr_dual.TOL


@FORMS
def test_what_is_served_is_balanced_on_batches_that_were_never_seen(options):
    router = make(options)
    train(router, [batch(seed) for seed in range(60)])
    unseen_TE = torch.cat([batch(seed) for seed in range(100, 120)])
    assert max_violation(router.eval()(unseen_TE).load) < 0.1 < 1 < max_violation(make().eval()(unseen_TE).load)


@FORMS
def test_after_a_shift_it_begins_anew_within_ten_steps(options):
    router, moved_E = make(options), torch.tensor([3.0, -3, 2, -2, 1, -1, 0, 0])
    train(router, [batch(seed) for seed in range(40)])
    train(router, [batch(seed) + moved_E for seed in range(40, 50)], start=40)
    unseen_TE = torch.cat([batch(seed) + moved_E for seed in range(100, 110)])
    assert max_violation(router.eval()(unseen_TE).load) < 0.5 and router.state.moves <= 10


def test_where_nothing_shifts_there_is_one_plan():
    router, plans = make(), 0
    for step in range(100):
        sinkroute.set_step(router, step)
        plans += router.plans_now()
        router(batch(step))
    assert plans == 1


def test_online_no_token_depends_on_another():
    router = make()
    train(router, [batch(seed) for seed in range(5)])
    sinkroute.set_step(router, 5)
    together_TK = router.train()(batch(7)).experts
    assert torch.equal(router(batch(7)[100:110]).experts, together_TK[100:110])


@FORMS
def test_weights_are_the_scores_of_the_chosen_whatever_the_potentials(options):
    router = make(options)
    train(router, [batch(seed) for seed in range(3)])
    for mode in (True, False):
        sinkroute.set_step(router, 4)
        routes, logits_TE = router.train(mode)(batch(9)), batch(9)
        torch.testing.assert_close(routes.weights, logits_TE.gather(1, routes.experts).softmax(1))


def by_the_rule(batches, router):
    """The online form in NumPy, float64: a list of batches a step."""
    experts, k, state = 8, 2, router.state
    b, average, d = (getattr(state, name).double().numpy().copy() for name in ("bias_E", "average_E", "density_E"))
    smooth, last = state.smooth_E.double().numpy().copy(), state.last_E.double().numpy().copy()
    gain, noise, n = state.gain_now.item(), state.noise.item(), state.moves.item()
    for parts in batches:
        load, near, widths, tokens = np.zeros(experts), np.zeros(experts), 0.0, 0
        for z in parts:
            values = z.numpy() + b.astype(np.float32)
            order = np.argsort(-values, axis=1, kind="stable")
            load += np.bincount(order[:, :k].ravel(), minlength=experts)
            margins = np.array([float(v[o[k - 1]]) - float(v[o[k]]) for v, o in zip(values, order, strict=True)])
            h = np.sort(margins)[int(ssr_dual.NEAR * len(z))]
            edge = order[margins < h][:, k - 1 : k + 1]
            near += np.bincount(edge.ravel(), minlength=experts) / (2 * h)
            widths, tokens = widths + h * len(z), tokens + len(z)
        h, cap = widths / tokens, load.sum() / experts
        fresh = near + 0.5 / h
        d = 0.9 * d + 0.1 * fresh if d.any() else fresh
        move = max(gain, 1 / n) * (cap - load) / np.maximum(d, 0.2 * d.mean())
        b = b + np.clip(move, -4 * h, 4 * h)
        b = (b - b.mean()).astype(np.float32).astype(np.float64)
        r = load / cap - 1
        size = math.sqrt((r**2).mean())
        cosine = r @ last / (np.linalg.norm(r) * np.linalg.norm(last)) if last.any() else 0.0
        gain = float(np.clip(gain * math.exp(0.05 * cosine), 0.02, 0.5))
        average = average + max(gain / 5, 0.01, 1 / (n + 1)) * (b - average)
        smooth = 0.5 * smooth + 0.5 * r
        far = noise > 0 and math.sqrt((smooth**2).mean()) > 1.5 * noise
        noise = noise + 0.1 * (min(size, 1.5 * noise) - noise) if noise > 0 else size
        last, n = r, 0.0 if far and n >= 4 else n + 1
    return b, average, gain, n


def test_the_update_is_the_rule_over_micro_batches():
    router = make()
    train(router, [batch(0)])
    batches = [[batch(10 * step, 400), batch(10 * step + 1, 300)] for step in range(1, 8)]
    b_E, average_E, gain, moves = by_the_rule(batches, router)
    for step, parts in enumerate(batches, 1):
        for number, part in enumerate(parts):
            sinkroute.set_step(router, step, number)
            router(part)
    sinkroute.end_step(router)
    np.testing.assert_allclose(router.state.bias_E, b_E, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(router.state.average_E, average_E, rtol=1e-4, atol=1e-5)
    assert router.state.gain_now.item() == pytest.approx(gain, rel=1e-4) and router.state.moves.item() == moves


@FORMS
def test_ranks_talk_of_twice_the_experts_and_two_numbers_more(options):
    assert make(options, experts=64, top_k=8).state.pending().shape == (2 * 64 + 2,)


@FORMS
def test_a_resumed_run_goes_on_bit_for_bit(options):
    whole, first, second = make(options), make(options), make(options)
    train(whole, [batch(seed) for seed in range(12)])
    train(first, [batch(seed) for seed in range(5)])
    second.load_state_dict(first.state_dict())
    train(second, [batch(seed) for seed in range(5, 12)], start=5)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


@FORMS
def test_padding_is_in_no_load_density_or_plan(options):
    padded, short = make(options), make(options)
    for step in range(6):
        logits_TE, mask = batch(step, 300), torch.ones(300, dtype=torch.bool)
        mask[::3] = False
        sinkroute.set_step(padded, step)
        sinkroute.set_step(short, step)
        padded(torch.where(mask[:, None], logits_TE, torch.nan), mask)
        short(logits_TE[mask])
    sinkroute.end_step(padded), sinkroute.end_step(short)
    torch.testing.assert_close(padded.state.average_E, short.state.average_E, rtol=1e-5, atol=1e-6)


@FORMS
@pytest.mark.parametrize(
    ("logits_TE", "mask"),
    [
        (torch.zeros(0, 8), None),
        (torch.zeros(5, 8), torch.zeros(5, dtype=torch.bool)),
    ],
    ids=["no token", "no real token"],
)
def test_a_step_without_real_tokens_changes_nothing(options, logits_TE, mask):
    router = make(options)
    train(router, [batch(0), batch(1)])
    before = {name: value.clone() for name, value in router.state.state_dict().items() if "saved" not in name}
    sinkroute.set_step(router, 2)
    router(logits_TE, mask)
    sinkroute.end_step(router)
    assert all(torch.equal(value, router.state.state_dict()[name]) for name, value in before.items())


@FORMS
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_or_identical_tokens_leave_potentials_finite(options, tokens, top_k):
    router = make(options, top_k=top_k)
    train(router, [torch.full((tokens, 8), 0.5)] * 4 + [batch(seed, tokens) for seed in range(4)])
    assert router.state.bias_E.isfinite().all() and router.state.average_E.isfinite().all()
    assert top_k < 8 or not router.state.average_E.any()  # every token has every expert: nothing to move


def test_online_potentials_balance_within_groups():
    router = make({"groups": 4, "top_groups": 2})
    before, *_, after = train(router, [batch(seed) for seed in range(40)])
    assert after < before / 3


def test_exact_is_refused_for_some_groups():
    with pytest.raises(ValueError, match=r"exact=True with top_groups=2 of groups=4: .*leave exact out"):
        make({"groups": 4, "top_groups": 2, **EXACT})


@FORMS
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_potentials_of_scores_balance_them(options, score):
    router = make({**options, "bias_on": "scores", "score": score})
    train(router, [batch(seed) for seed in range(40)])
    unseen_TE = torch.cat([batch(seed) for seed in range(100, 110)])
    serving = router.serving()
    assert serving.on == "scores" and serving.bias_E is router.state.average_E
    assert max_violation(router.eval()(unseen_TE).load) < 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, r"gain must be a finite number above 0 and at most 1, got 0\.0"),
        ({"average": 2.0}, r"average must be a finite number above 0 and at most 1, got 2\.0"),
        ({"bias_on": "weights"}, r"unknown bias_on 'weights'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(options)


def test_a_gain_that_is_told_stays():
    router = make({"gain": 0.25, "average": 0.5})
    train(router, [batch(seed) for seed in range(10)])
    assert router.state.gain_now == 0.25
