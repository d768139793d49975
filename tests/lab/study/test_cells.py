"""From a comparison to its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sinkroute.lab.config import Config, EvalConfig, TrainConfig
from sinkroute.lab.study.cells import Plan, configuration_hash, expand, parse_overrides, select
from sinkroute.lab.study.config import read_study

Planner = Callable[..., Plan]

TWO = {"vanilla": {"router": {"name": "softmax"}}, "ssr-l": {"router": {"name": "ssr-l"}}}


def test_seeds_are_outside_and_sizes_in_the_middle(plan: Planner) -> None:
    sizes = {"small": {"model": {"d_model": 16}}, "large": {"model": {"d_model": 64}}}
    found = plan(sizes=sizes, methods=TWO, seeds=[3, 4])
    assert [cell.name for cell in found.cells] == [
        f"{size}-{method}-seed{seed}"
        for seed in (3, 4)
        for size in ("small", "large")
        for method in ("vanilla", "ssr-l")
    ]
    assert {(cell.size, cell.config.model.d_model) for cell in found.cells} == {("small", 16), ("large", 64)}
    assert {(cell.seed, cell.config.seed) for cell in found.cells} == {(3, 3), (4, 4)}


def test_a_method_overrides_any_section_and_its_router_stands_alone(plan: Planner) -> None:
    found = plan(
        config={"router": {"name": "ssr-l", "options": {"noise": 1}}, "train": {"steps": 5, "lr": 0.1}},
        methods={"a": {"router": {"name": "ssr-l", "options": {"reg": 2}}, "train": {"lr": 0.2}}, "b": {}},
        seeds=[0],
    )
    a, b = found.cells
    assert (a.config.router.options, a.config.train.steps, a.config.train.lr) == ({"reg": 2}, 5, 0.2)
    assert (b.config.router.options, b.config.train.lr) == ({"noise": 1}, 0.1)


def test_a_grid_is_a_method_for_each_combination(plan: Planner) -> None:
    grid = {"router.options.noise": [0.1, "3e-1"], "train.lr": [0.5]}
    found = plan(methods={"ssr-l": {"router": {"name": "ssr-l", "options": {"reg": 1}}, "grid": grid}}, seeds=[0])
    assert found.methods == ["ssr-l noise=0.1 lr=0.5", "ssr-l noise=0.3 lr=0.5"]
    assert [cell.config.router.options for cell in found.cells] == [{"reg": 1, "noise": 0.1}, {"reg": 1, "noise": 0.3}]
    assert [cell.config.train.lr for cell in found.cells] == [0.5, 0.5]
    assert dict(found.cells[1].point) == {"router.options.noise": 0.3, "train.lr": 0.5}
    assert found.cells[0].name == "ssr-l_noise=0.1_lr=0.5-seed0"


def test_keys_of_a_grid_that_end_alike_are_told_apart(plan: Planner) -> None:
    grid = {"train.batch": [4], "eval.batch": [8]}
    assert plan(methods={"m": {"grid": grid}}, seeds=[0]).methods == ["m train.batch=4 eval.batch=8"]


def test_a_size_may_have_a_base_of_its_own(plan: Planner, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("train: {steps: 77, batch: 32}")
    found = plan(config={"train": {"batch": 8}}, sizes={"s": {"base": "own.yaml", "train": {"lr": 0.3}}}, seeds=[0])
    train = found.cells[0].config.train
    assert (train.steps, train.batch, train.lr) == (77, 8, 0.3)


def test_the_hash_is_of_what_decides_the_numbers() -> None:
    config = Config()
    for same in (
        replace(config, label="x"),
        replace(config, eval=EvalConfig(batch=3, attacks={})),
        replace(config, train=TrainConfig(log_every=3, checkpoint_every=7)),
    ):
        assert configuration_hash(same) == configuration_hash(config)
    for other in (replace(config, seed=1), replace(config, train=TrainConfig(steps=601))):
        assert configuration_hash(other) != configuration_hash(config)


def test_overrides_go_over_everything(write: Callable[..., Path]) -> None:
    method = {"train": {"steps": 6, "lr": 0.1}, "grid": {"train.steps": [8]}}
    path = write(config={"train": {"steps": 5}}, methods={"a": method})
    found = expand(
        path, read_study(path), overrides=parse_overrides(["train.steps=7", "eval.attacks.word-swap.rate=0.5"])
    )
    assert (found.cells[0].config.train.steps, found.cells[0].config.train.lr) == (7, 0.1)
    assert found.cells[0].config.eval.attacks == {"word-swap": {"rate": 0.5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepps=7", "did you mean 'steps'"),
        ("trian.steps=7", "unknown section in --set.*did you mean 'train'"),
        ("train.steps", "--set train.steps must be KEY=VALUE"),
        ("train=7", "'train' is a section; give a key in it"),
        ("router.options.noise=0", "routers are what is compared"),
    ],
)
def test_a_wrong_override_is_refused(write: Callable[..., Path], override: str, message: str) -> None:
    path = write(methods=TWO)
    with pytest.raises(ValueError, match=message):
        expand(path, read_study(path), overrides=parse_overrides([override]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": {"a": {"trian": {}}}}, r"unknown section in methods.a 'trian'; did you mean 'train'"),
        ({"methods": {"a": {"seed": 1}}}, r"methods.a.seed cannot be given"),
        ({"config": {"label": "x"}}, r"config.label cannot be given"),
        ({"sizes": {"s": {"modle": {}}}}, r"unknown section in sizes.s 'modle'"),
        ({"methods": {"a": {"train": {"stepps": 1}}}}, r"methods.a: unknown key in train 'stepps'"),
        ({"methods": {"a": {"grid": {"train.lr": 0.1}}}}, r"methods.a.grid must map dotted keys to lists"),
        ({"methods": {"a": {"grid": {"lr": [0.1]}}}}, r"unknown section in methods.a.grid 'lr'"),
        ({"methods": {"a b": {}, "a_b": {}}}, r"would share the folder a_b-seed0"),
        ({"reference": "vanila"}, r"reference 'vanila'; did you mean 'vanilla'"),
        ({"primary": {"method": "ssr-l", "against": "vanila"}}, r"primary.against 'vanila'; did you mean 'vanilla'"),
    ],
)
def test_a_wrong_comparison_is_refused_by_name(plan: Planner, content: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**content)


def test_a_selection_takes_methods_by_their_name_or_with_their_point(plan: Planner) -> None:
    methods = {"vanilla": {}, "ssr-l": {"router": {"name": "ssr-l"}, "grid": {"router.options.noise": [0, 1]}}}
    found = plan(methods=methods, sizes={"s": {}, "t": {}}, seeds=[0])
    assert {cell.method for cell in select(found, only=["ssr-l"])} == {"ssr-l noise=0", "ssr-l noise=1"}
    assert [cell.name for cell in select(found, only=["ssr-l noise=1"], sizes=["t"])] == ["t-ssr-l_noise=1-seed0"]
    with pytest.raises(ValueError, match="unknown method in --only 'ssr-k'; did you mean"):
        select(found, only=["ssr-k"])
    with pytest.raises(ValueError, match="unknown size in --sizes-only 'u'"):
        select(found, sizes=["u"])


def test_a_very_long_label_still_has_a_folder_of_its_own(plan: Planner) -> None:
    methods = {"m" * 150 + "a": {}, "m" * 150 + "b": {}}
    names = {cell.name for cell in plan(methods=methods, seeds=[0]).cells}
    assert len(names) == 2
    assert max(map(len, names)) < 120
