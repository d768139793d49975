"""The ledger of collective calls: the published numbers, an independent count, and what is said when a rank is lost."""

import datetime
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute._errors import RankLost
from sinkroute.routing.fold import GateFold
from sinkroute.routing.ranks import Ranks, distribute, undistributed
from sinkroute.transport import solve
from sinkroute.transport.collectives import sent

E, K, D, TOKENS, LAYERS, STEPS = 6, 2, 5, 40, 2, 3
PLAN = {"process_group": "world", "probability": 1.0, "noise": 0}
# The router, and how many float64 numbers a layer has to say at the end of a step: docs/costs.md.
AT_STEP_ENDS = {
    "loss-free": ({}, E),
    "smebu": ({}, E),
    "bip": ({}, 2 * E + 1),
    "quantile": ({}, 2 * E + 1),
    "quantile of batches": ({"scope": "batch", "score": "sigmoid"}, 1001 * E),
    "ssr-dual": ({}, 2 * E + 2),
}
# After steps with a plan each layer finds the potentials for all ranks, beside that one call.
FINDING = {"ssr-bias": PLAN, "ssr-dual exact": {"exact": True}}
SILENT = {"softmax": {}, "load-balance": {}, "ssr-l": {"probability": 1.0}, "sinkhorn": {}}


def logits(step, layer=0):
    return torch.randn(TOKENS, E, generator=torch.Generator().manual_seed(10 * step + layer + 1000 * dist.get_rank()))


def model(name, options):
    return nn.ModuleList(
        sinkroute.create_router(name.split()[0], num_experts=E, top_k=K, **options) for _ in range(LAYERS)
    )


class Counted:
    """Every call of `torch.distributed` in it, and the bytes that are handed to it: by nothing of ours."""

    NAMES = (
        *("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter", "scatter"),
        *("all_gather_object", "broadcast_object_list", "barrier", "all_to_all", "all_to_all_single", "send", "isend"),
    )

    def __enter__(self):
        self.calls, self.bytes, self.known = 0, 0, {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.known.items():
            setattr(dist, name, self.counting(name, function))
        return self

    def counting(self, name, function):
        def call(*args, **kwargs):
            own = args[1] if name == "all_gather" else args[0]
            self.calls, self.bytes = self.calls + 1, self.bytes + own.numel() * own.element_size()
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, function in self.known.items():
            setattr(dist, name, function)


# -- what runs on a rank -----------------------------------------------------------------------------------------------


def of_a_plan():
    with Counted() as counted:
        before = sent()
        plan = solve(logits(0), 0.1, process_group=dist.group.WORLD)
        found = sent() - before
    return plan.pass_count, tuple(found), (counted.calls, counted.bytes)


def trained(routers, passes=1):
    """What a monitor says of some steps, of the passes and of the ends, and of one more window without any."""

    def train(first):
        for step in range(first, first + STEPS):
            for part in range(passes):
                sinkroute.set_step(routers, step, part)
                for layer, router in enumerate(routers):
                    router(logits(step, layer))
        sinkroute.end_step(routers)

    train(0)  # before the first end of a step the ranks ask each other whether they are alike
    with sinkroute.LoadMonitor(routers) as monitor, Counted() as counted:
        before = sent()
        train(STEPS)
        found = {"ends": monitor.step_ends(), "passes": monitor.metrics(), "table": monitor.table()}
        monitor.metrics(process_group="world")  # a call, but of no pass and of no end of a step
        assert monitor.step_ends() == found["ends"] and monitor.metrics(reset=True) == found["passes"]
        every = sent() - before
    assert (every.collectives, every.bytes) == (counted.calls, counted.bytes)
    return found | {"plans": [of["plan_passes"] for of in found["passes"].values()], "after": monitor.step_ends()}


def of_steps():
    found = {name: trained(model(name, options)) for name, (options, _) in AT_STEP_ENDS.items()}
    found |= {name: trained(model(name, options)) for name, options in (SILENT | FINDING).items()}
    found["global-load-balance"] = trained(model("global-load-balance", {}), passes=2)
    found["plans"] = trained(model("ssr-l", PLAN))
    return found


def of_a_plain_gate():
    """Potentials that go into the weight of a gate: the mean token is summed, too."""
    router, gate = sinkroute.create_router("ssr-dual", num_experts=E, top_k=K), nn.Linear(D, E, bias=False)
    router.links.append(GateFold(router, gate, "weight"))
    with sinkroute.LoadMonitor(router) as monitor:
        for step in range(3):
            sinkroute.set_step(router, step)
            if step == 2:
                monitor.reset()
            x_TD = torch.randn(TOKENS, D)
            router.links[0].see(x_TD)
            router(gate(x_TD))
        sinkroute.end_step(router)
        return monitor.step_ends()


def of_a_repetition():
    router = sinkroute.create_router("ssr-l", num_experts=E, top_k=K, plan_gradient="weights", **PLAN)
    sinkroute.set_step(router, 0)
    with sinkroute.LoadMonitor(router) as monitor:
        logits_TE = logits(0).requires_grad_()
        weights_TK = checkpoint(lambda x: router(x).weights, logits_TE, use_reentrant=False)
        once = monitor.metrics()["router"]
        weights_TK.square().sum().backward()
        return once, monitor.metrics()["router"]


def of_serving():
    router = sinkroute.create_router("ssr-l", num_experts=E, top_k=K, inference="sinkhorn", **PLAN).eval()
    with sinkroute.LoadMonitor(router) as monitor:
        router(logits(0))
        monitor.probe(logits(0))  # a pass that is counted nowhere
        return monitor.metrics("train")["router"], monitor.metrics("eval")["router"]


def of_sharded():
    """A tensor that is cut over the ranks: putting together is a call, cutting is not."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(21.0).view(7, 3)
    cut = distribute_tensor(whole, mesh, [Shard(0)])
    before, found = sent(), []
    with CommDebugMode() as calls:
        again = distribute(whole, cut)
    found.append((calls.get_total_counts(), tuple(sent() - before)))
    assert torch.equal(again.to_local(), cut.to_local()) and again.placements == cut.placements
    for tensor in (cut, distribute_tensor(whole, mesh, [Replicate()]), whole):
        before = sent()
        with CommDebugMode() as calls:
            assert torch.equal(undistributed(tensor), whole)
        found.append((calls.get_total_counts(), tuple(sent() - before)))
    return found, len(cut.to_local())


def lost():
    """Rank 1 leaves a group of three, and does not come to another."""
    rank, said = dist.get_rank(), {}
    group = dist.new_group([0, 1, 2])
    router = sinkroute.create_router("ssr-l", num_experts=E, top_k=K, layer=7, **{**PLAN, "process_group": group})
    kept = sinkroute.create_router("ssr-dual", num_experts=E, top_k=K, process_group=group)
    monitor = sinkroute.LoadMonitor(kept)
    for step in range(2):
        sinkroute.set_step(nn.ModuleList([router, kept]), 12 + step)
        router(logits(step)), kept(logits(step))
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group(group)
        del group, router, kept, monitor
        gc.collect()
    else:
        for what, call in {
            "pass": lambda: router(logits(0)),
            "end": lambda: sinkroute.end_step(kept),
            "metrics": lambda: monitor.metrics(process_group=group),
        }.items():
            with pytest.raises(RankLost) as error:
                call()
            said[what] = str(error.value)
            assert type(error.value.__cause__) is RuntimeError
    dist.barrier()
    late = dist.new_group([0, 1, 2], timeout=datetime.timedelta(seconds=2))
    if rank != 1:
        with pytest.raises(RankLost) as error:
            Ranks(late).sum(torch.ones(3))
        said["late"] = str(error.value)
    dist.barrier()
    return said


def on_a_rank():
    return {
        "plan": of_a_plan(),
        "steps": of_steps(),
        "gate": of_a_plain_gate(),
        "repetition": of_a_repetition(),
        "serving": of_serving(),
        "sharded": of_sharded(),
    }


@pytest.fixture(scope="module", params=[3])
def results(request, run_ranks):
    return run_ranks(on_a_rank, request.param)


@pytest.fixture(scope="module")
def farewells(run_ranks):
    return run_ranks(lost, 3)


# -- the published numbers ---------------------------------------------------------------------------------------------


def test_a_plan_of_all_ranks_is_passes_and_two_calls(results):
    for passes, found, counted in (result["plan"] for result in results):
        calls = passes + 2
        size = 8 * (1 + 3 * E + 2 * E * passes)
        assert found == (calls, calls * (len(results) - 1), size) and counted == (calls, size)


@pytest.mark.parametrize("name", AT_STEP_ENDS)
def test_the_end_of_a_step_is_one_call_for_all_layers(results, name):
    numbers = AT_STEP_ENDS[name][1]
    expected = {"steps": STEPS, "collectives": 1, "messages": 2 * (len(results) - 1), "bytes": 8 * LAYERS * numbers}
    for result in results:
        assert result["steps"][name]["ends"] == expected
        assert result["steps"][name]["after"] == dict.fromkeys(expected, 0)


def test_a_gate_without_a_bias_has_the_mean_token_summed_too(results):
    numbers = 2 * E + 2 + D + 2
    for result in results:
        assert result["gate"] == {
            "steps": 1,
            "collectives": 1,
            "messages": 2 * (len(results) - 1),
            "bytes": 8 * numbers,
        }


@pytest.mark.parametrize("name", SILENT)
def test_who_remembers_nothing_and_plans_alone_says_nothing(results, name):
    for result in results:
        found = result["steps"][name]
        assert found["ends"]["steps"] == 0 and "sent" not in found["table"]
        assert all(of[key] == 0 for of in found["passes"].values() for key in ("collectives", "messages", "bytes"))


@pytest.mark.parametrize("name", AT_STEP_ENDS)
def test_in_a_pass_nothing_is_sent_but_for_plans_of_all_ranks(results, name):
    for result in results:
        assert all(of["collectives"] == 0 for of in result["steps"][name]["passes"].values())


@pytest.mark.parametrize("name", FINDING)
def test_what_is_found_for_all_ranks_at_the_end_of_a_step_is_booked_there(results, name):
    for result in results:
        assert result["steps"][name]["ends"]["collectives"] >= 1


def test_the_loss_of_the_global_batch_is_one_call_in_each_pass(results):
    ring = 2 * (len(results) - 1)
    for result in results:
        found = result["steps"]["global-load-balance"]
        assert [(of["collectives"], of["messages"], of["bytes"]) for of in found["passes"].values()] == [
            (1, ring, 8 * E)
        ] * LAYERS
        assert found["table"].endswith(f"sent in a pass of all layers: 2 collectives, {8 * E * LAYERS} bytes")


def test_a_layer_with_plans_of_all_ranks_says_what_its_solver_does(results):
    for result in results:
        found = result["steps"]["plans"]
        for of, passes in zip(found["passes"].values(), found["plans"], strict=True):
            calls = passes + 2
            assert of["collectives"] == pytest.approx(calls)
            assert of["messages"] == pytest.approx(calls * (len(results) - 1))
            assert of["bytes"] == pytest.approx(8 * (1 + 3 * E + 2 * E * passes))


def test_a_pass_that_is_repeated_for_checkpointing_talks_twice(results):
    for once, twice in (result["repetition"] for result in results):
        assert once["passes"] == twice["passes"] == 1
        assert twice["collectives"] == 2 * once["collectives"] > 0 and twice["bytes"] == 2 * once["bytes"]


def test_what_is_sent_when_serving_is_counted_apart_and_a_probe_nowhere(results):
    for training, serving in (result["serving"] for result in results):
        assert training["collectives"] is None and serving["passes"] == 1
        assert serving["collectives"] == serving["plan_passes"] + 2


def test_a_sharded_tensor_is_put_together_in_one_call_and_cut_in_none(results):
    for result in results:
        (cutting, gathering, replica, whole), rows = result["sharded"]
        assert cutting == replica == whole == (0, (0, 0, 0))
        assert gathering == (1, (1, len(results) - 1, 4 * 3 * rows))


# -- a rank that is lost -----------------------------------------------------------------------------------------------

GONE = "rank 1 of [0, 1, 2] no longer answers in all_"
GO_ON = "restart the job: it continues from its last checkpoint"


@pytest.mark.parametrize(
    ("what", "during"),
    [
        ("pass", "during step 13 of layer 7, SSRLinearRouter: "),
        ("end", "during the end of step 13: "),
        ("metrics", "during LoadMonitor.metrics: "),
    ],
)
def test_a_collective_without_a_lost_rank_says_who_that_is_and_how_to_go_on(farewells, what, during):
    for rank in (0, 2):
        assert farewells[rank][what].startswith(f"{during}{GONE}") and farewells[rank][what].endswith(GO_ON)


def test_a_rank_that_does_not_come_is_an_error_after_the_time_limit_of_the_group(farewells):
    told = [farewells[rank]["late"] for rank in (0, 2)]
    assert any(
        text
        == f"a rank of [0, 1, 2] did not answer within the time limit, in all_reduce of 3 numbers (float32); {GO_ON}"
        for text in told
    )
    assert all(text.endswith(GO_ON) for text in told)
