"""Which ranks of DeepSpeed hold the same tokens: tensor, data, expert and sequence parallelism on four processes."""

import functools
import importlib
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sinkroute

os.environ.setdefault("DS_ACCELERATOR", "cpu")
layer = pytest.importorskip("deepspeed.moe.layer")

import deepspeed  # noqa: E402
from deepspeed.runtime.sequence_parallel import parallel_state_sp  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

from sinkroute.adapters import deepspeed as adapter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*of the model's gates is off.*")
EXPERTS, WIDTH, STEPS = 8, 16, 3


class TensorParallel:
    """An `mpu` of 2 × 2 ranks: pairs of neighbours hold the same tokens."""

    def __init__(self):
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        self.tensor, self.data = pairs[dist.get_rank() // 2], columns[dist.get_rank() % 2]

    def get_tensor_model_parallel_world_size(self):
        return 2

    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_tensor_model_parallel_rank(self):
        return dist.get_rank(self.tensor)

    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_tensor_model_parallel_group(self):
        return self.tensor

    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_world_size(self):
        return 2

    def get_data_parallel_rank(self):
        return dist.get_rank(self.data)

    def get_data_parallel_group_ranks(self):
        return dist.get_process_group_ranks(self.data)


class Residual(nn.Module):
    def __init__(self, ep_size):
        super().__init__()
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.moe = layer.MoE(
            WIDTH, expert, EXPERTS, ep_size=ep_size, k=2, top2_2nd_expert_sampling=False, drop_tokens=False
        )
        torch.manual_seed(1)  # gates are alike, whichever experts a rank has
        nn.init.normal_(self.moe.deepspeed_moe.gate.wg.weight, std=0.3)

    def forward(self, x):
        y, l_aux, _ = self.moe(x)
        return (y - x).square().mean() + l_aux


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(64, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)


def trained(method, share, shares, *, parts=1, mpu=None, ep_size=1, stage=1, **options):
    """What a process learns of its share of the tokens, in so many micro-batches. Weights stay: the rate is 0."""
    model = Residual(ep_size)
    handle = adapter.patch(model, method, **options)
    parameters = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "Adam", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config, mpu=mpu)[0]
    router = next(iter(handle.routers.values()))
    routes = []
    router.register_forward_hook(lambda router, inputs, output: routes.append(output.experts))
    with sinkroute.LoadMonitor(engine.module) as monitor:
        for step in range(STEPS):
            *first, last = tokens(step).chunk(shares)[share].chunk(parts)
            for part, x in enumerate(first):
                sinkroute.set_step(engine.module, step, part)
                engine.module(x)
            sinkroute.set_step(engine.module, step, len(first))
            engine.backward(engine(last))
            engine.step()
        sinkroute.end_step(engine.module)
    rows = monitor.metrics(process_group=router.ranks.load.group)
    return {
        "share": share,
        "routes": torch.stack(routes).reshape(STEPS, -1, 2),
        "load": torch.tensor(next(iter(rows.values()))["load"]),
        "gate": model.moe.deepspeed_moe.gate.wg.weight.detach().clone(),
    }


METHODS = {
    "noise": ("ssr-l", {"probability": 0.0, "noise": 1.0}),
    "plan": ("ssr-s", {"probability": 1.0, "noise": 0.0, "process_group": "world"}),
    "dual": ("ssr-dual", {"process_group": "world"}),
}


def joined():
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # nothing is compiled: gloo alone
    deepspeed.init_distributed("gloo", dist_init_required=False, auto_mpi_discovery=False)


def _four():
    joined()
    rank, found = dist.get_rank(), {}
    for ep_size, stage in ((1, 2), (2, 1), (4, 2)):
        for name, (method, options) in METHODS.items():
            found[f"dp4·ep{ep_size} {name}"] = trained(method, rank, 4, ep_size=ep_size, stage=stage, **options)
    gather = deepspeed.comm.all_gather_into_tensor  # of gloo takes flat tensors only
    deepspeed.comm.all_gather_into_tensor = lambda output, x, *rest, **named: gather(
        output, x.flatten(), *rest, **named
    )
    mpu = TensorParallel()
    for name, (method, options) in METHODS.items():
        found[f"dp2·tp2 {name}"] = trained(method, rank // 2, 2, mpu=mpu, **options)
    named = {"process_group": "data_parallel", "probability": 1.0, "noise": 0.0}
    found["dp2·tp2 plan by name"] = trained("ssr-s", rank // 2, 2, mpu=mpu, **named)
    return {"cells": found, "refused": _refused(mpu)} | _found_elsewhere()


def _refused(mpu):
    """What is said of groups in which tokens would count twice, and of a name that DeepSpeed has not."""
    said = []
    for group in (dist.group.WORLD, "nothing"):
        gate = Residual(1).moe.deepspeed_moe.gate
        adapter.patch(gate, "ssr-l", probability=1.0, process_group=group)
        try:
            gate(tokens(0))
        except ValueError as error:
            said.append(str(error))
    return said


def _found_elsewhere():
    """The ranks that AutoTP and sequence parallelism have."""
    groups.mpu = None
    handle = adapter.patch(Residual(1), "ssr-l", process_group="world")
    ranks = next(iter(handle.routers.values())).ranks
    parallel_state_sp.initialize_sequence_parallel(2)
    groups.mpu = parallel_state_sp
    sinkroute.set_step(handle.model, 0)
    sequence = dist.get_process_group_ranks(ranks.load.group)
    groups.mpu = None
    groups._init_tp_mesh_device(2)
    sinkroute.set_step(handle.model, 1)
    return {"sequence": sequence, "auto": dist.get_process_group_ranks(ranks.load.group)}


@pytest.fixture(scope="module")
def four(run_ranks):
    os.environ.setdefault("LOCAL_RANK", "0")
    return run_ranks(_four, 4)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    os.environ.setdefault("LOCAL_RANK", "0")
    store = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    joined()
    yield
    dist.destroy_process_group()


@functools.cache
def alone(name, parts):
    method, options = METHODS[name]
    return trained(method, 0, 1, parts=parts, **options)


CELLS = [f"{cell} {name}" for cell in ("dp4·ep1", "dp4·ep2", "dp4·ep4", "dp2·tp2") for name in METHODS]


@pytest.mark.ranks
@pytest.mark.parametrize("cell", [*CELLS, "dp2·tp2 plan by name"])
def test_four_ranks_route_as_one_process(four, cell):
    found = [rank["cells"][cell] for rank in four]
    by_share = {}
    for each in found:
        assert torch.equal(each["routes"], by_share.setdefault(each["share"], each)["routes"])
        assert torch.equal(each["load"], found[0]["load"]) and torch.equal(each["gate"], found[0]["gate"])
    assert found[0]["load"].sum() == STEPS * 64 * 2
    if cell.endswith("noise"):
        first, second = by_share[0]["routes"], by_share[1]["routes"]
        assert (first != second).any(-1).float().mean() > 0.5
        return
    # A gate is moved along the mean token of each pass: for ssr-dual the passes have to be the same.
    one = alone(cell.split()[1], len(by_share) if "dual" in cell else 1)
    routes = torch.cat([by_share[share]["routes"] for share in sorted(by_share)], dim=1)
    assert (routes == one["routes"]).all(-1).float().mean() > 0.98  # but for sums in another order
    torch.testing.assert_close(found[0]["gate"], one["gate"], rtol=0, atol=1e-3)


@pytest.mark.ranks
def test_groups_that_count_tokens_twice_and_unknown_names_are_refused(four):
    for rank in four:
        twice, unknown = rank["refused"]
        assert "hold the same tokens, as 2 tensor-parallel ranks of DeepSpeed do" in twice and '"world"' in twice
        assert unknown.startswith("process_group='nothing' is no group of DeepSpeed's; take one of 'data_parallel'")


@pytest.mark.ranks
def test_auto_tp_holds_the_same_tokens_and_parts_of_sequences_are_other_tokens(four):
    assert [rank["sequence"] for rank in four] == [[0, 1, 2, 3]] * 4
    assert [rank["auto"] for rank in four] == [[0, 2], [1, 3], [0, 2], [1, 3]]
