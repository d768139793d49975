"""Under `torch.use_deterministic_algorithms` every layer works, and reads no memory that nobody wrote."""

import pytest
import torch

import sinkroute


@pytest.fixture(autouse=True)
def _deterministic():
    # Filled with NaN, what is read before it is written shows. PyTorch does so on its own when it is deterministic.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def train_and_serve(router):
    torch.manual_seed(0)
    layer = sinkroute.MoE(16, 16, 8, 2, router=router)
    x, ids = torch.randn(256, 16), torch.arange(256) % 50
    needs = {"token_ids": ids} if router in ("hash", "stable-moe") else {}
    for step in range(3):
        sinkroute.set_step(layer, step, total_steps=9)
        loss = layer(x, **needs).square().mean()
        (loss if layer.routes.aux_loss is None else loss + layer.routes.aux_loss).backward()
    sinkroute.end_step(layer)
    served = layer.eval()(x, **needs)
    return [served.detach(), *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_a_layer_trains_and_serves_twice_alike(router):
    first, second = train_and_serve(router), train_and_serve(router)
    assert all(bool(x.isfinite().all()) for x in first)
    assert len(first) > 1 and all(map(torch.equal, first, second))
