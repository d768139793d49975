"""The presets load strictly, expand into runs, and name routers and options that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkroute import create_router
from sinkroute.lab.study.cells import Plan, expand
from sinkroute.lab.study.config import read_study

FOLDER = Path(__file__).parents[3] / "experiments"
PRESETS = sorted([*(FOLDER / "compare").glob("*.yaml"), *(FOLDER / "study").glob("*.yaml")])


def read(path: Path) -> Plan:
    return expand(path, read_study(path))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_expands_into_runs_whose_routers_can_be_made(path: Path) -> None:
    plan = read(path)
    assert plan.title
    assert plan.study.question
    assert len(plan.cells) == len(plan.methods) * len(plan.sizes) * len({cell.seed for cell in plan.cells})
    for router, experts, top_k in {
        (repr(cell.config.router), cell.config.model.experts, cell.config.model.top_k): cell for cell in plan.cells
    }:
        config = next(cell.config.router for cell in plan.cells if repr(cell.config.router) == router)
        create_router(config.name, num_experts=experts, top_k=top_k, **config.options)


def test_every_experiment_of_the_paper_has_a_preset() -> None:
    there = {path.stem for path in (FOLDER / "compare").glob("*.yaml")}
    assert there >= {
        "paper-lm",
        "ablation-p",
        "ablation-noise",
        "ablation-reg",
        "inference-modes",
        "gradient-through-plan",
        "draw-scope",
        "overhead",
        "sensitivity",
        "vision",
        "robustness",
    }


def test_the_grids_are_those_of_the_paper() -> None:
    p = read(FOLDER / "compare" / "ablation-p.yaml")
    told = {cell.point["router.options.probability"] for cell in p.cells if cell.point}
    assert told == {1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5}
    noise = read(FOLDER / "compare" / "ablation-noise.yaml")
    assert len(noise.methods) == 2 + 5 * 2 * 3  # vanilla, quiet; α × scale × branch


def test_two_heads_have_the_plain_block_s_parameters() -> None:
    plan = read(FOLDER / "compare" / "paper-lm.yaml")
    heads = {cell.method: cell.config.model for cell in plan.cells}
    assert (heads["vanilla"].sub_tokens, heads["vanilla"].d_hidden) == (1, 352)
    assert (heads["2-head ssr-l"].sub_tokens, heads["2-head ssr-l"].d_hidden) == (2, 660)


def test_robustness_measures_the_models_of_vision() -> None:
    vision, robustness = (read(FOLDER / "compare" / f"{name}.yaml") for name in ("vision", "robustness"))
    assert [cell.hash for cell in vision.cells] == [cell.hash for cell in robustness.cells]
    assert len(robustness.cells[0].config.eval.attacks) > len(vision.cells[0].config.eval.attacks)


def test_the_sizes_of_the_sensitivity_are_presets_of_their_own() -> None:
    plan = read(FOLDER / "compare" / "sensitivity.yaml")
    widths = {cell.size: cell.config.model.d_model for cell in plan.cells}
    assert widths == {"small": 128, "medium": 352, "large": 512}
