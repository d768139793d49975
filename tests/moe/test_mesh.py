"""`sinkroute.MoE` on a device mesh: what a user gives as `process_group`, with replicas that hold the same tokens."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sinkroute

METHODS = {
    "noise": ("ssr-l", {"probability": 0.0, "noise": 1.0}),
    "plan": ("ssr-l", {"probability": 1.0, "noise": 0.0}),
    "dual": ("ssr-dual", {}),
    "loss-free": ("loss-free", {"update_rate": 0.1}),
}
STEPS, WIDTH, EXPERTS = 3, 16, 8


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(64, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)


def trained(method, share=0, shares=1, wrap=lambda model: model, group=None):
    torch.manual_seed(0)
    name, options = METHODS[method]
    router = sinkroute.create_router(name, num_experts=EXPERTS, top_k=2, process_group=group, **options)
    model = nn.Sequential(sinkroute.MoE(d_model=WIDTH, d_hidden=32, num_experts=EXPERTS, top_k=2, router=router))
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    routes = []
    model[0].router.register_forward_hook(lambda router, inputs, output: routes.append(output.experts))
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(STEPS):
            sinkroute.set_step(wrapped, step)
            wrapped(tokens(step).chunk(shares)[share]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sinkroute.end_step(wrapped)
    metrics = next(iter(monitor.metrics(process_group=model[0].router.ranks.load.group).values()))
    gate = next(value for key, value in model.named_parameters() if "gate" in key).detach()
    gate = gate.full_tensor() if hasattr(gate, "full_tensor") else gate
    return {"share": share, "routes": torch.stack(routes), "load": torch.tensor(metrics["load"]), "gate": gate.clone()}


def _replicas():
    """Two ranks that hold other tokens, each twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    share = mesh.get_local_rank("dp")
    wraps = {
        "DDP": lambda model: DistributedDataParallel(model, process_group=mesh.get_group("dp")),
        "FSDP2": lambda model: fully_shard(model, mesh=mesh["dp"]),
    }
    return {
        f"{wrapper} {method}": trained(method, share, 2, wrap, mesh["dp"])
        for wrapper, wrap in wraps.items()
        for method in METHODS
    }


@pytest.fixture(scope="module")
def replicas(run_ranks):
    return run_ranks(_replicas, 4)


@pytest.mark.ranks
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("method", METHODS)
def test_replicas_route_alike_and_all_learn_as_one_process(replicas, wrapper, method):
    found = [rank[f"{wrapper} {method}"] for rank in replicas]
    for each in found:
        assert torch.equal(each["routes"], found[2 * each["share"]]["routes"])
        assert torch.equal(each["load"], found[0]["load"]) and torch.equal(each["gate"], found[0]["gate"])
    assert found[0]["load"].sum() == STEPS * 64 * 2
    if method == "noise":
        assert (found[0]["routes"] != found[2]["routes"]).any(-1).float().mean() > 0.1
        return
    one = trained(method)
    routes = torch.cat([found[0]["routes"], found[2]["routes"]], dim=1)
    # Equal but for sums in another order.
    assert (routes == one["routes"]).all(-1).float().mean() > 0.98
    torch.testing.assert_close(found[0]["gate"], one["gate"], rtol=0, atol=1e-3)
