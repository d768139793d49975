"""Steps of methods, timed in turn."""

from dataclasses import replace

import pytest

from sinkroute.lab.bench import measure_steps
from sinkroute.lab.bench.timing import Comparison
from sinkroute.lab.config import Config, DataConfig, ModelConfig, RouterConfig, TrainConfig

SMALL = Config(
    data=DataConfig(length=8),
    model=ModelConfig(layers=1, d_model=16, heads=2, d_hidden=16, experts=4, top_k=2),
    train=TrainConfig(batch=2),
)


def test_every_method_has_a_time_relative_to_the_first_and_that_is_1_for_itself():
    configs = {name: replace(SMALL, router=RouterConfig(name)) for name in ("softmax", "ssr-dual")}
    found = measure_steps(configs, "softmax", repeats=3, seconds=0.1)
    assert list(found.ratios) == ["softmax", "ssr-dual"]
    assert found.ratios["softmax"] == [1.0, 1.0, 1.0]
    assert found.milliseconds > 0 and min(found.ratios["ssr-dual"]) > 0


def test_a_step_of_a_method_that_plans_now_and_then_is_the_mean_of_both_kinds_by_their_share(monkeypatch):
    def compare(calls, baseline, device, **settings):
        times = {"softmax": [1.0], "ssr-l, steps without a plan": [1.1], "ssr-l, steps with a plan": [3.1]}
        assert list(calls) == list(times)
        return Comparison(3, 10.0, times)

    monkeypatch.setattr("sinkroute.lab.bench.steps.compare", compare)
    configs = {
        "softmax": SMALL,
        "ssr-l": replace(SMALL, router=RouterConfig("ssr-l", {"probability": 0.25})),
    }
    assert measure_steps(configs, "softmax").ratios["ssr-l"] == [pytest.approx(0.75 * 1.1 + 0.25 * 3.1)]


def test_what_pause_raises_ends_the_measurement():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_steps({"softmax": SMALL}, "softmax", pause=stop)
