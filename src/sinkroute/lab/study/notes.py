"""How to read a comparison, what is missing from it, and in what its runs differ beside what is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute.lab.study.metric import dig
from sinkroute.lab.study.statistics import LEVEL

if TYPE_CHECKING:
    from sinkroute.lab.study.results import Results

__all__ = ["notes_of"]


def notes_of(found: Results) -> list[str]:
    """What a reader has to know; see the module."""
    if not any(run.finished for run in found.runs):
        return ["No run is done yet, so there is nothing to compare.", *_failed(found)]
    against = [
        entry.against for (_, _, key), entry in found.entries.items() if key == found.headline.key and entry.against
    ]
    pairs = [each.paired.difference.n for each in against]
    out = []
    if any(entry.estimate is not None and entry.estimate.n > 1 for entry in found.entries.values()):
        out.append(
            f"± is half of the 95 % t-interval over the seeds that are done. Differences to {found.reference} are of "
            "runs that share a seed (data order, initial weights)."
        )
    if found.family:
        sizes = " at all sizes" if len(found.sizes) > 1 else ""
        out.append(
            f"p is of the paired t-test, two-sided, corrected by Holm for the {found.family} "
            f"comparison{'s' * (found.family > 1)} of a metric (all methods{sizes}); better or worse: p < {LEVEL}. "
            "Intervals of differences are not corrected."
        )
        out.append(
            "Detectable is the true difference that one such test, uncorrected, finds in four of five studies with as "
            "many seeds and as much scatter: a smaller one is missed more often."
        )
    if found.margin is not None and found.family:
        out.append(
            f"Equivalent: two one-sided t-tests place the difference within ±{found.margin:g}, p < {LEVEL} corrected "
            "by Holm."
        )
    for size in found.sizes:
        if found.family and (model := found.blocks(size)) is not None:
            digits = found.headline.digits
            out.append(
                f"{f'{size}: a' if size else 'A'} two-way model, method + seed, with one scatter for all methods: "
                f"residual {model.residual:.{digits}f} with {model.freedom} degrees of freedom, so that a difference "
                f"of two methods is known within ± {model.half:.{digits}f}; seeds explain {model.of_seeds:.0%} of the "
                f"rest's variance; that all methods are alike has p {_chance(model.p)}."
            )
    if few := sorted({n for n in pairs if 2 <= n <= 5}):
        least = ", ".join(f"{2 / 2**n:g} with {n} seeds" for n in few)
        out.append(
            f"The exact sign-flip test, which assumes no normal distribution, cannot get below p = {least}: with so "
            "few seeds what is told apart rests on the t-test's assumption."
        )
    if 1 in pairs:
        out.append("With one seed there is neither interval nor test: differences may be chance.")
    return [*out, *_missing(found), *_mixed(found)]


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _failed(found: Results) -> list[str]:
    failed = [run for run in found.runs if run.state.kind == "failed"]
    return [f"{run.name} failed and is not in the numbers: {run.state.note}" for run in failed]


def _missing(found: Results) -> list[str]:
    """Which runs are not in the numbers, and why."""
    out = _failed(found)
    waiting = sum(not run.finished and run.state.kind != "failed" for run in found.runs)
    if waiting:
        out.append(f"{waiting} of {len(found.runs)} runs are not done yet; n counts those that are.")
    for (size, method, key), entry in found.entries.items():
        done, _ = found.counts(size, method)
        if key == found.headline.key and len(entry.values) < done:
            who, gone = f"{size} {method}".strip(), done - len(entry.values)
            out.append(f"{who}: {gone} of {done} runs have no finite {entry.metric.title}.")
    return out


def _mixed(found: Results) -> list[str]:
    """In what the runs differ beside what is compared."""
    out = []
    done = [{**run.record, **(dig(run.result, "machine") or {})} for run in found.runs if run.finished]

    def several(*keys: str) -> list[str]:
        told = {tuple(str(record.get(key)) for key in keys) for record in done if any(key in record for key in keys)}
        return sorted(map(" ".join, told))

    if len(versions := several("sinkroute", "commit")) > 1:
        out.append(f"The runs come from different versions of the code: {', '.join(versions)}.")
    if len(machines := several("cpu", "gpu", "torch")) > 1:
        out.append(f"The runs come from different machines or versions of torch: {', '.join(machines)}.")
    if not any(metric.timed for metric in found.metrics) or found.baselines.get("step_times"):
        return out
    loads = several("jobs", "threads")
    if len(loads) > 1 or any(record.get("jobs", 1) != 1 for record in done):
        told = ", ".join("{} at a time with {} threads".format(*load.split()) for load in loads)
        out.append(f"Times per step were measured while other runs shared the machine ({told}): they say little.")
    busy = [load for run in found.runs if (load := run.load_average) is not None]
    if busy:
        low, high = min(map(min, busy)), max(map(max, busy))
        cores = sorted({str(record["cores"]) for record in done if record.get("cores")})
        told = f"{low:.1f} to {high:.1f} processes wanted one of its {' or '.join(cores) or 'several'} cores"
        out.append(f"Times per step are wall times, and are not compared: while the runs began and ended {told}.")
    return out
