"""Jobs of a cluster, with an executor that keeps what it is given, and with submitit's own where it is installed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.cluster import CellJob, submit
from sinkroute.lab.study.state import read_state

from .conftest import SMALL


class Keeper:
    """Takes jobs as submitit's executors do."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.jobs: list[tuple[Any, dict[str, Any]]] = []

    def update_parameters(self, **parameters: Any) -> None:
        if "gpus" in parameters:
            raise NameError("Unknown argument 'gpus'")
        self.parameters |= parameters

    def map_array(self, function: Any, orders: Sequence[dict[str, Any]]) -> list[Any]:
        self.jobs += [(function, order) for order in orders]
        return [type("Job", (), {"job_id": f"7_{number}"}) for number in range(len(orders))]


@pytest.fixture
def tiny(plan: Callable[..., Plan], text: Path) -> Plan:
    return plan(config={**SMALL, "data": {**SMALL["data"], "path": str(text)}}, seeds=[0])


def test_each_run_is_a_job_that_runs_it(tiny: Plan) -> None:
    keeper = Keeper()
    options = {"timeout_min": 60}
    ids = submit(tiny.cells, tiny.out, "gpu", options, fresh=False, about={"commit": "x"}, executor=keeper)
    assert ids == ["7_0", "7_1"]
    assert keeper.parameters == {"slurm_partition": "gpu", "timeout_min": 60}
    job, order = pickle.loads(pickle.dumps(keeper.jobs[0]))
    assert job(order) == "done"
    assert read_state(tiny.cells[0], tiny.out).kind == "done"


def test_a_job_whose_run_fails_has_failed(tiny: Plan) -> None:
    keeper = Keeper()
    submit(tiny.cells, tiny.out, "gpu", {}, fresh=False, about={}, executor=keeper)
    job, order = keeper.jobs[0]
    order["config"]["data"]["path"] = "/nowhere"
    with pytest.raises(RuntimeError, match=r"failed; see failed.json"):
        job(order)


def test_an_option_that_submitit_refuses_is_named(tiny: Plan) -> None:
    with pytest.raises(ValueError, match=r"--submit-options: submitit refuses .*Unknown argument 'gpus'"):
        submit(tiny.cells, tiny.out, "gpu", {"gpus": 1}, fresh=False, about={}, executor=Keeper())


def test_without_submitit_the_cure_is_told(tiny: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sinkroute\[sweep\]"'):
        submit(tiny.cells, tiny.out, "gpu", {}, fresh=False, about={})


def test_a_preempted_job_is_put_back_and_deletes_nothing() -> None:
    pytest.importorskip("submitit")
    again = CellJob().checkpoint({"name": "x", "fresh": True})
    assert isinstance(again.function, CellJob)
    assert again.args == ({"name": "x", "fresh": False},)


def test_submitit_runs_a_job_in_a_process_of_its_own(tiny: Plan) -> None:
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tiny.out / "cluster", cluster="local")
    jobs: list[Any] = []
    submitting = executor.map_array
    executor.map_array = lambda *words: jobs.extend(submitting(*words)) or jobs
    options = {"timeout_min": 5}
    submit(tiny.cells[:1], tiny.out, "any", options, fresh=False, about={}, executor=executor)
    assert jobs[0].result() == "done"
    assert read_state(tiny.cells[0], tiny.out).kind == "done"
