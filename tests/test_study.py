"""The study: its pages say what its results say, and its results are those of its presets."""

import importlib
import importlib.util
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sinkroute.lab.config import VisionConfig
from sinkroute.lab.study.cells import expand
from sinkroute.lab.study.config import StudyConfig, read_study
from sinkroute.lab.study.keep import read_kept

ROOT = Path(__file__).parents[1]
REGISTERED = sorted((ROOT / "experiments" / "study").glob("*.yaml"))
# A preset is committed before its first run; until then a page says that it is to come.
RUN = {path.stem for path in (ROOT / "benchmarks" / "results" / "study").glob("*.json")}
PRESETS = [path for path in REGISTERED if path.stem in RUN]


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("study")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_each_preset_has_results_and_they_are_its_own(study, preset):
    found = study.read(preset.stem)
    compare = read_study(preset)
    wanted = json.loads(json.dumps(asdict(compare)))
    older = asdict(StudyConfig(methods=compare.methods))  # a key that came after the run has its default
    assert {**study._short(older), **found["compare"]} == study._short(wanted)
    assert not found["overrides"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_each_run_of_a_preset_is_done(study, preset):
    found = study.read(preset.stem)
    assert [cell for cell in found["cells"] if cell["state"] != "done"] == []
    assert {cell["seed"] for cell in found["cells"]} == set(read_study(preset).seeds)


def test_the_pages_hold_the_tables_of_the_results(study):
    for path in study.PAGES:
        text = path.read_text(encoding="utf-8")
        assert "<!-- study: " in text
        assert study.page(text) == text, f"run: python scripts/study.py pages ({path.name} is not what it writes)"


def test_on_the_leaderboard_what_is_not_told_apart_has_the_same_place(study):
    places = study.study_leaderboard.places
    noise = np.random.default_rng(0).normal(scale=0.01, size=(4, 10))
    seeds = {
        name: {str(seed): float(value) for seed, value in enumerate(mean + row)}
        for (name, mean), row in zip({"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}.items(), noise, strict=True)
    }
    assert places(seeds) == {"a": 1, "b": 1, "c": 3, "d": 4}
    assert places(seeds, lower_is_better=False) == {"a": 3, "b": 3, "c": 2, "d": 1}
    assert places({name: {"0": own["0"]} for name, own in seeds.items()}) == dict.fromkeys(seeds, 1)  # one seed


def test_only_comparisons_with_enough_seeds_give_places(study):
    taken = study.study_leaderboard.boards(study.read, RUN)
    assert ("dual", "") in taken and ("rates", "0.006") in taken
    for name, size in taken:
        rows = [row for row in study.read(name)["statistics"] if row["size"] == size]
        assert min(len(row["seeds"]) for row in rows) >= 8, name
    assert not {name for name, _ in taken} & {"paper-lm-words", "longer", "scale"}
    page = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert {name for name, _ in taken} == set(re.findall(r"<!-- study: board-([\w-]+) -->", page))


def test_the_results_are_computed_anew_from_the_seeds_and_a_wrong_one_is_named(study, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    recomputed = importlib.import_module("study_check").recomputed
    found = study.read("paper-lm")
    count, wrong = recomputed(found)
    assert (count > 400, wrong) == (True, [])
    row = next(row for row in found["statistics"] if row["against"])
    row["against"]["p_corrected"] *= 1.01
    row["estimate"]["half"] *= 1.01
    assert [each.split(" is ")[0].rpartition(":")[0].split()[-1] for each in recomputed(found)[1]] == ["half", "p"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results/study/kept").glob("*.jsonl")), ids=lambda p: p.stem)
def test_cells_that_are_kept_are_those_of_the_preset(path):
    preset = ROOT / "experiments" / "study" / f"{path.stem}.yaml"
    plan = expand(preset, read_study(preset))
    assert set(read_kept(plan, path)) <= {cell.name for cell in plan.cells}


def test_every_comparison_stands_on_a_page(study):
    shown = "".join(path.read_text(encoding="utf-8") for path in study.PAGES)
    assert [preset.stem for preset in PRESETS if f"<!-- study: {preset.stem} -->" not in shown] == []


def test_every_comparison_has_all_its_tests_on_their_page(study):
    shown = (ROOT / "docs" / "study-tests.md").read_text(encoding="utf-8")
    assert [preset.stem for preset in PRESETS if f"<!-- study: tests-{preset.stem} -->" not in shown] == []


def test_a_registered_comparison_has_the_chances_that_scipy_gives(study):
    values = {
        row["method"]: np.array(list(row["seeds"].values()))
        for row in study.read("rates")["statistics"]
        if (row["size"], row["metric"]) == ("0.006", "valid.bits_per_byte")
    }
    pairs, margin = values["ssr-dual"] - values["vanilla"], study.study_tests.MARGIN
    p = stats.ttest_1samp(pairs, 0.0).pvalue
    alike = max(
        stats.ttest_1samp(pairs, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(pairs, margin, alternative="less").pvalue,
    )
    (row,) = [line for line in study.table("registered").splitlines() if "`study/rates`, 0.006" in line]
    half = stats.t.ppf(0.975, 7) * pairs.std(ddof=1) / math.sqrt(8)
    assert f"| 8 | **{pairs.mean():+.4f} ± {half:.4f}** |" in row and p < 0.001
    # All eight differences have one sign, so that of 2^8 choices two are as far from 0.
    assert f"| {2 / 2**8:.3f} | {alike:.3f} |" in row


def test_seeds_that_were_added_are_told_apart_and_together(study):
    found = study.read("words")

    def read(name):  # twelve of the seeds as if they were the added ones
        lower, upper = (100, 112) if name == "words" else (112, 124)
        return found | {
            "statistics": [
                row | {"seeds": {seed: value for seed, value in row["seeds"].items() if lower <= int(seed) < upper}}
                for row in found["statistics"]
            ]
        }

    first, more, both = study.study_tests.together(read, ["words", "words-more"]).splitlines()[2:]
    (whole,) = [line for line in study.table("tests-words").splitlines() if line.startswith("| `ssr-l` |")]
    assert first.startswith("| `study/words` | 12 |") and more.startswith("| `study/words-more` | 12 |")
    assert both.startswith("| together | 24 |") and both.split(" | ")[2] == whole.split(" | ")[2]
    assert both.split(" | ")[3] == "-0.02 ± 0.71"  # of the perplexity: 2^-0.0003 - 1, and ln 2 of 0.0103


def test_what_follows_a_primary_comparison_is_tested_only_where_that_is_told(study):
    """At one capacity the shares that are dropped differ in every seed alike, at the other one way and the other."""
    seeds = [str(seed) for seed in range(150, 160)]
    shifts = {"1.0": [0.1 + 0.001 * place for place in range(10)], "1.25": [0.1, -0.1] * 5}
    metrics = [{"key": key, "title": key, "digits": 3} for key in ("train.dropped", "valid.bits_per_byte")]
    found = {
        "reference": "load-balance",
        "metrics": metrics,
        "statistics": [
            {
                "size": size,
                "method": method,
                "metric": metric["key"],
                "seeds": {
                    seed: 1.0 + (method == "ssr-dual") * own for seed, own in zip(seeds, shifts[size], strict=True)
                },
            }
            for metric in metrics
            for size in shifts
            for method in ("load-balance", "ssr-dual")
        ],
    }
    rows = study.study_tests.registered(lambda name: found, {"capacity"}).splitlines()[2:]
    shown = [(row.split(" | ")[0], row.split(" | ")[2]) for row in rows]
    assert shown == [
        ("| `study/capacity`, 1.0", "train.dropped"),
        ("| `study/capacity`, 1.25", "train.dropped"),
        ("| `study/capacity`, 1.0", "valid.bits_per_byte"),
    ]
    # One test is left of the second kind: nothing to correct.
    _, _, _, _, _, p, holm, *_ = rows[2].split(" | ")
    assert p == holm == "< 0.001"


def test_primary_comparisons_named_in_presets_are_taken_from_them(study):
    assert study.study_tests._primary("shift", {"reference": "x"}) == [
        ("ssr-dual", "load-balance", "switch.steps_to_balance", ())
    ]
    assert study.study_tests._primary("paper-lm", {"reference": "vanilla"}) == []
    (words,) = [path for path in REGISTERED if path.stem == "words"]
    assert read_study(words).primary.equivalence == study.study_tests.MARGIN


def test_to_restore_what_was_not_kept_says_what_is_there(study):
    with pytest.raises(SystemExit, match=r"nothing is kept of 'details'; kept: .*rates.*compare study/details"):
        study.main(["restore", "details"])


def test_what_is_registered_and_not_run_is_said(study):
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert [path.stem for path in REGISTERED if path.stem not in RUN and f"`study/{path.stem}`" not in text] == []


def test_the_headline_has_five_seeds_or_more_and_everything_else_three(study):
    for preset in PRESETS:
        seeds = {cell["seed"] for cell in study.read(preset.stem)["cells"]}
        assert len(seeds) >= (5 if preset.stem == "paper-lm" else 3), preset.stem


def test_a_difference_in_a_table_is_the_mean_over_the_seeds_of_both(study):
    found = study.read("paper-lm")
    rows = {row["method"]: row for row in found["statistics"] if row["metric"] == "valid.bits_per_byte"}
    ours, theirs = rows["ssr-bias"]["seeds"], rows["vanilla"]["seeds"]
    mean = sum(ours[seed] - theirs[seed] for seed in ours) / len(ours)
    assert rows["ssr-bias"]["against"]["paired"]["difference"]["mean"] == pytest.approx(mean, abs=1e-5)


def test_a_cell_of_a_pair_table_has_its_p_corrected_for_all_of_the_table(study):
    rows, columns = study.PAIRS["rivals"][1:]
    values = {
        row["method"]: np.array([row["seeds"][str(seed)] for seed in range(10)])
        for row in study.read("paper-lm")["statistics"]
        if row["metric"] == "valid.bits_per_byte"
    }
    chances = {(row, other): stats.ttest_rel(values[row], values[other]).pvalue for row in rows for other in columns}
    lower = [p for p in chances.values() if p < chances["ssr-s", "load-balance"]]
    # Holm: 7 of the 16 are lower, and (16 - 7) times this p is more than any of those becomes.
    assert len(lower) == 7
    ours = 9 * chances["ssr-s", "load-balance"]
    assert f"| `ssr-s` | +0.022 ± 0.017, {ours:.3f} |" in study.table("rivals")
    assert ours == pytest.approx(0.126, abs=0.001)


def test_the_floor_of_max_vio_is_that_of_tokens_that_choose_by_chance(study):
    # Two tokens, two experts: 2 and 0 in half of the cases (MaxVio 1), else 1 and 1 (MaxVio 0).
    mean, error = study.floor(2, 2, 1)
    assert mean == pytest.approx(0.5, abs=4 * error)
    assert error == pytest.approx(0.5 / math.sqrt(1000), rel=0.01)
    assert study.floor(5, 3, 3, draws=2) == (0.0, 0.0)  # every token takes every expert


@pytest.mark.parametrize("preset", REGISTERED, ids=lambda path: path.stem)
def test_each_size_of_a_step_has_its_floor(study, preset):
    for config in {cell.size + cell.family: cell.config for cell in expand(preset, read_study(preset)).cells}.values():
        model = config.model
        if isinstance(model, VisionConfig):  # patches and the class token
            tokens = config.train.batch * ((model.image_size // model.patch) ** 2 + 1)
        else:
            tokens = config.train.batch * config.data.length * model.sub_tokens
        assert (tokens, model.experts, model.top_k) in study.COUNTED.values()


def test_the_pictures_are_those_of_the_results(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("study_pictures", ROOT / "scripts" / "study_pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study_pictures", pictures)
    spec.loader.exec_module(pictures)
    monkeypatch.setattr(pictures, "PICTURES", tmp_path)
    for name, make in pictures.ALL.items():
        drawn = make()
        committed = ROOT / "docs" / "pictures" / f"study-{name}.svg"
        # Other versions of matplotlib draw other curves, of the same words and numbers.
        words = re.compile(r"<text [^>]*>([^<]*)</text>")
        assert words.findall(drawn.read_text(encoding="utf-8")) == words.findall(committed.read_text(encoding="utf-8"))
        assert committed.stat().st_size < 60_000
