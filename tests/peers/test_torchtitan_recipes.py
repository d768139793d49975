"""The recipes of examples/many_ranks in torchtitan: the small mixture trains here, the large ones are laid out."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Not imported here: on a CPU `torchtitan_on_the_cpu` comes first.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")


def recipes():
    """The example, on a CPU."""
    here = Path(__file__)
    sys.path[:0] = [str(here.parent), str(here.parents[2] / "examples" / "many_ranks")]
    on_the_cpu = importlib.import_module("torchtitan_on_the_cpu")
    return importlib.import_module("torchtitan_qwen3"), on_the_cpu


def trained(**parallelism):
    """What the routers of the small mixture did, on this rank."""
    made, on_the_cpu = recipes()
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group
    config = made.small()
    on_the_cpu.dense_attention(config.model_spec.model)
    config.training.mixed_precision_param = "float32"
    config.training.steps = 6
    for name, degree in parallelism.items():
        setattr(config.parallelism, name, degree)
    trainer = config.build()
    losses = []
    log = trainer.metrics_processor.log

    def noting(step, loss, *more, **named):
        losses.append(loss)
        log(step, loss, *more, **named)

    trainer.metrics_processor.log = noting
    trainer.train()
    weights = [weight for part in trainer.model_parts for weight in part.parameters()]
    return {
        "losses": losses,
        "layers": [sorted(line["layers"]) for line in trainer.balance],
        "max_vio_global": [line["max_vio_global"] for line in trainer.balance],
        "tokens": [next(iter(line["layers"].values()))["tokens"] for line in trainer.balance],
        "dead": [line["dead"] for line in trainer.balance],
        "held": sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in weights),
    }


def with_experts_on_two_ranks():
    return trained(expert_parallel_degree=2)


def with_tensor_parallelism():
    return trained(tensor_parallel_degree=2, expert_parallel_degree=2)


def with_stages():
    return trained(pipeline_parallel_degree=2, expert_parallel_degree=2)


@pytest.mark.parametrize(
    ("layout", "ranks", "layers", "held"),
    [
        (with_experts_on_two_ranks, 2, 4, {436_576}),
        (with_tensor_parallelism, 4, 4, {219_488}),
        (with_stages, 4, 2, {218_272, 218_304}),
    ],
)
def test_the_small_mixture_trains_balanced_on_these_ranks(layout, ranks, layers, held, run_ranks):
    found = run_ranks(layout, ranks)
    for rank in found:
        assert [len(names) for names in rank["layers"]] == [layers] * 6
        # 4 sequences of 128 tokens a replica, each token once, whichever ranks have parts of it.
        assert set(rank["tokens"]) == {4 * 128 * 2}
        assert rank["dead"][-1] == 0 and rank["max_vio_global"][-1] < 1
    assert {rank["held"] for rank in found} == held  # tests/examples/test_many_ranks.py: the budget says so, too
    losses = [rank["losses"] for rank in found if rank["losses"][0] > 0]  # torchtitan logs -1 where there is none
    assert losses and all(each[-1] < each[0] for each in losses)
    names = {name for rank in found for name in rank["layers"][0]}
    assert len(names) == 4, "each layer has its number, on whichever stage"


def laid_out(name, ranks):
    """Weights on the first of so many ranks, whose groups are fakes, of a model on the meta device."""
    made, _ = recipes()
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torchtitan.config.override import apply_overrides
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    config = getattr(made, name)()
    dims = ParallelDims.from_config(config.parallelism, ranks)
    set_spmd_backend(config.parallelism.spmd_backend)
    config.model_spec.model.update_from_config(config=config)
    apply_overrides(config.override, config)
    with torch.device("meta"):
        model = config.model_spec.model.build()
    model = config.model_spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
    routers = {type(layer.moe.router).__name__ for layer in model.layers.values()}
    held = sum(weight.to_local().numel() for weight in model.parameters())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return sorted(routers), held


def olmoe_on_64_ranks():
    return laid_out("olmoe_7b_a1b", 64)


def qwen3_on_512_ranks():
    return laid_out("qwen3_30b_a3b", 512)


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        (olmoe_on_64_ranks, 6_919_100_416 / 64),
        pytest.param(qwen3_on_512_ranks, 30_532_122_624 / 512, marks=pytest.mark.slow),
    ],
)
def test_the_large_mixtures_are_laid_out_with_as_many_weights_as_the_budget_says(layout, weights, run_ranks):
    ((routers, held),) = run_ranks(layout, 1)
    assert routers == ["SinkrouteRouter"]
    # The first rank has one number more of what does not divide by so many.
    assert held == pytest.approx(weights, rel=0.002)
