"""Schedules: by hand at both ends and between, as text, and what is said about wrong ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sinkroute
from sinkroute.routing.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    make_schedule,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(2.0, 1.0, 10), {0: 2.0, 5: 1.5, 10: 1.0, 1000: 1.0}),
        (Cosine(2.0, 1.0, 12), {0: 2.0, 4: 1.75, 6: 1.5, 8: 1.25, 12: 1.0, 99: 1.0}),  # cos 60° = 1/2
        (Exponential(0.1, 0.001, 10), {0: 0.1, 5: 0.01, 10: 0.001, 11: 0.001}),
        (Piecewise({3: 0.3, 7: 0.7}), {0: 0.3, 2: 0.3, 3: 0.3, 6: 0.3, 7: 0.7, 100: 0.7}),
        (Constant(0.25), {0: 0.25, 10**9: 0.25}),
    ],
)
def test_a_schedule_has_these_values(schedule, expected):
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@given(
    start=st.floats(1e-4, 1),
    end=st.floats(1e-4, 1),
    steps=st.integers(1, 1000),
    at=st.lists(st.integers(0, 1500), min_size=2, max_size=2),
)
def test_a_ramp_runs_from_start_to_end_and_never_back(kind, start, end, steps, at):
    schedule = SCHEDULES[kind](start, end, steps)
    early, late = (schedule(step) for step in sorted(at))
    assert schedule(0) == pytest.approx(start) and schedule(steps) == pytest.approx(end)
    assert (late - early) * (end - start) >= -1e-12
    assert min(start, end) * (1 - 1e-9) <= early <= max(start, end) * (1 + 1e-9)


def test_a_ramp_without_steps_spans_the_training():
    assert [Linear(1.0, 0.0)(step, total_steps=8) for step in (0, 2, 8)] == [1.0, 0.75, 0.0]


def test_a_ramp_without_steps_says_how_to_tell_it():
    with pytest.raises(ValueError, match=r"does not say its steps; write linear\(1, 0, STEPS\).*total_steps="):
        Linear(1.0, 0.0)(3)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant(0.5)", Constant(0.5)),
        ("linear(0.1, 1e-3, 1000)", Linear(0.1, 1e-3, 1000)),
        (" cosine( 0.1,0 ) ", Cosine(0.1, 0.0)),
        ("exponential(1, 0.1)", Exponential(1.0, 0.1)),
        ("piecewise(0: 0.1, 500: 0)", Piecewise({0: 0.1, 500: 0.0})),
    ],
)
def test_text_is_read(text, schedule):
    assert make_schedule("probability", text) == schedule


def test_a_function_of_the_step_is_a_schedule():
    assert make_schedule("noise", lambda step: step / 2)(3) == 1.5


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "0.1",
            ValueError,
            r"probability must be a number or a schedule such as linear\(0\.1, 0\.001, 1000\), got '0\.1'",
        ),
        ("cosin(1, 0)", ValueError, r"unknown schedule of probability: 'cosin'; did you mean 'cosine'"),
        ("linear(1)", ValueError, r"probability: cannot read 'linear\(1\)'"),
        ("linear(1, x)", ValueError, r"probability: cannot read .*could not convert"),
        ("linear(1, 0, 0)", ValueError, r"steps of a schedule must be an integer of 1 or more, got 0"),
        ("linear(1, 0, 1.5)", ValueError, r"cannot read"),
        ("exponential(1, 0)", ValueError, r"above 0, got 1\.0, 0\.0"),
        ("piecewise()", ValueError, r"at least one step"),
        ("linear(0, 2)", ValueError, r"probability must be between 0 and 1, got 2\.0; it is a share"),
        ("linear(nan, 1)", ValueError, r"probability must be between 0 and 1, got nan"),
        (None, TypeError, r"probability must be a number, got None"),
        ([0.1], TypeError, r"probability must be a number, got \[0\.1\]"),
    ],
)
def test_what_is_no_schedule_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        make_schedule("probability", value, most=1)


# -- in routers ------------------------------------------------------------------------------------------------------


def ssr(**options):
    return sinkroute.create_router("ssr-l", num_experts=4, top_k=2, **options)


def test_a_router_follows_its_schedules():
    router = ssr(probability="linear(1, 0, 10)", noise=lambda step: 0.1 * step)
    found = []
    for step in range(11):
        sinkroute.set_step(router, step)
        found.append((router.probability_now, router.noise_now))
    assert found == [pytest.approx((1 - step / 10, 0.1 * step)) for step in range(11)]


def test_the_share_of_sinkhorn_steps_is_that_of_the_schedule():
    router = ssr(probability="piecewise(0: 0.5, 1000: 0.05)")
    fired = []
    for step in range(4000):
        sinkroute.set_step(router, step)
        fired.append(router.sinkhorn_now)
    # Standard deviations: √(1000 · 0.25) = 15.8 and √(3000 · 0.0475) = 11.9; five of each.
    assert abs(sum(fired[:1000]) - 500) < 79 and abs(sum(fired[1000:]) - 150) < 60


def test_a_schedule_over_the_training_is_told_its_length_once():
    router = ssr(probability="cosine(1, 0)")
    sinkroute.set_step(router, 0, total_steps=4)
    assert router.probability_now == 1
    sinkroute.set_step(router, 2)
    assert router.probability_now == pytest.approx(0.5)


def test_a_schedule_over_the_training_that_is_not_told_its_length_says_so():
    with pytest.raises(ValueError, match="set_step"):
        sinkroute.set_step(ssr(probability="cosine(1, 0)"), 0)


def test_a_function_that_leaves_the_bounds_is_told_at_its_step():
    router = ssr(probability=lambda step: 0.4 * step)
    sinkroute.set_step(router, 2)
    with pytest.raises(ValueError, match=r"probability must be between 0 and 1, got 1\.2"):
        sinkroute.set_step(router, 3)
    with pytest.raises(ValueError, match=r"noise must be a finite number of 0 or more, got nan"):
        sinkroute.set_step(ssr(noise=lambda step: math.nan), 1)


def test_the_description_shows_schedules():
    assert "probability=linear(1, 0, 5), noise=0.3" in repr(ssr(probability="linear(1, 0, 5)"))
