"""Which ranks hold the same tokens, from meshes of eight ranks that a process alone pretends to."""

import copy
import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import sinkroute
from sinkroute.adapters._mesh import MeshRanks
from sinkroute.adapters._ranks import Layout, UnknownLayout
from sinkroute.routing.attached import attached
from sinkroute.routing.clock import Clock
from sinkroute.routing.ranks import Ranks

RANK = 5
WORLD = list(range(8))


@pytest.fixture
def eight_ranks():
    """This process is rank 5 of 8, and nobody answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    yield
    dist.destroy_process_group()


def mesh_of(**sizes):
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def ranks_of(group):
    return [RANK] if group is None else dist.get_process_group_ranks(group)


def laid_out(look, option=None):
    return Layout(look, Clock(), Ranks(option)).ranks()


@pytest.mark.parametrize(
    ("sizes", "others"),
    [
        ({"dp": 8}, WORLD),
        ({"tp": 8}, [5]),
        ({"dp": 4, "tp": 2}, [1, 3, 5, 7]),
        ({"tp": 2, "dp": 4}, [4, 5, 6, 7]),
        ({"dp_replicate": 2, "dp_shard": 4}, WORLD),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, [1, 3, 5, 7]),
        ({"dp_shard": 2, "cp": 2, "tp": 2}, [1, 3, 5, 7]),
        ({"dp_shard": 4, "sp": 2}, WORLD),
        ({"pp": 1, "dp_replicate": 1, "fsdp": 2, "tp": 4}, [1, 5]),
    ],
)
def test_ranks_along_tp_hold_the_same_tokens_and_those_along_all_else_hold_others(eight_ranks, sizes, others):
    ranks = laid_out(lambda: MeshRanks(mesh_of(**sizes), "a model"), "world")
    assert ranks_of(ranks.load.group) == ranks_of(ranks.noise.group) == ranks_of(ranks.plan.group) == others
    assert ranks.noise.rank == others.index(RANK)


def test_without_an_option_a_plan_is_of_one_rank_and_loads_and_noise_are_as_the_mesh_says(eight_ranks):
    mesh = mesh_of(dp=4, tp=2)
    ranks = laid_out(lambda: MeshRanks(mesh, "a model"))
    assert ranks.plan.group is None and ranks_of(ranks.load.group) == ranks_of(ranks.noise.group) == [1, 3, 5, 7]


def test_the_option_names_a_dimension_or_several_that_were_joined(eight_ranks):
    mesh = mesh_of(dp_replicate=2, dp_shard=2, tp=2)
    mesh["dp_replicate", "dp_shard"]._flatten("dp")
    for name, members in {"dp_shard": [5, 7], "dp_replicate": [1, 5], "dp": [1, 3, 5, 7]}.items():
        ranks = laid_out(lambda: MeshRanks(mesh, "a model"), name)
        assert ranks_of(ranks.plan.group) == members and ranks_of(ranks.load.group) == [1, 3, 5, 7]
    unknown = laid_out(lambda: MeshRanks(mesh, "a model"), "data")
    with pytest.raises(ValueError, match=r"'data' is no dimension.*one of 'dp_replicate', 'dp_shard', 'dp', or"):
        _ = unknown.plan.group
    same = laid_out(lambda: MeshRanks(mesh, "a model"), "tp")
    with pytest.raises(ValueError, match=r"ranks \[4, 5\], which hold the same tokens.*take \"world\""):
        _ = same.plan.group


def test_a_group_that_was_given_is_the_plans_unless_tokens_would_count_twice(eight_ranks):
    mesh = mesh_of(dp=4, tp=2)
    ranks = laid_out(lambda: MeshRanks(mesh, "a model"), dist.new_group([1, 5]))
    assert ranks_of(ranks.plan.group) == [1, 5] and ranks_of(ranks.load.group) == [1, 3, 5, 7]
    with pytest.raises(ValueError, match=r"ranks \[4, 5\], which hold the same tokens"):
        _ = laid_out(lambda: MeshRanks(mesh, "a model"), dist.group.WORLD).plan.group


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dp": 4, "foo": 2}, "whether ranks along foo hold the same tokens is not known; give process_group="),
        ({"dp": 4, "ep": 2}, "whether ranks along ep hold the same tokens"),
        ({"pp": 2, "dp": 4}, "pipeline stage.*leave pp_size at 1"),
        ({"dp": 4}, "not all 8 ranks"),
    ],
)
def test_a_layout_that_nobody_knows_is_refused_unless_a_group_says_it(eight_ranks, sizes, words):
    def look():
        mesh = torch.arange(4) if sizes == {"dp": 4} else torch.arange(8).view(*sizes.values())
        return MeshRanks(types.SimpleNamespace(mesh=mesh, mesh_dim_names=tuple(sizes)), "a model")

    for option in (None, "world", "dp"):
        with pytest.raises(UnknownLayout, match=words):
            _ = laid_out(look, option).noise.rank
    told = laid_out(look, dist.new_group([4, 5]))
    assert ranks_of(told.plan.group) == ranks_of(told.load.group) == [4, 5] and told.noise.rank == 1


def test_without_a_mesh_all_ranks_have_other_tokens(eight_ranks):
    assert ranks_of(laid_out(lambda: None).load.group) == WORLD
    assert ranks_of(laid_out(lambda: None, dist.new_group([1, 5])).load.group) == [1, 5]
    with pytest.raises(ValueError, match="names a dimension of a device mesh, and no mesh is known"):
        _ = laid_out(lambda: None, "dp").plan.group


def test_it_is_looked_once_a_step_and_seen_when_it_comes_later(eight_ranks):
    looks, clock, found = [], Clock(), []
    layout = Layout(lambda: looks.append(clock.step) or (found[-1] if found else None), clock, Ranks(None))
    ranks = layout.ranks()
    assert ranks_of(ranks.load.group) == WORLD
    found.append(MeshRanks(mesh_of(dp=4, tp=2), "a model"))
    for step in range(3):
        clock.set(step, 0)
        for _ in range(5):
            assert ranks_of(ranks.load.group) == [1, 3, 5, 7] and ranks.noise.rank == 2
    assert looks == [0, 0, 1, 2]


def test_no_ranks_no_questions():
    ranks = laid_out(lambda: pytest.fail("asked"), "world")
    assert ranks.load.group is None and ranks.plan.group is None and ranks.noise.rank == 0


# -- where the mesh of a model is found ------------------------------------------------------------------------------


def a_model():
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def patched_ranks(model, **options):
    handle = sinkroute.patch(model, "ssr-l", **options)
    return next(iter(handle.routers.values())).ranks


def test_the_mesh_of_accelerate_is_asked(eight_ranks):
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    ranks = patched_ranks(model := a_model(), process_group="world")
    assert ranks_of(ranks.load.group) == WORLD
    config = ParallelismConfig(dp_shard_size=2, cp_size=2, tp_size=2)
    AcceleratorState._shared_state["device_mesh"] = config.build_device_mesh("cpu")
    sinkroute.set_step(model, 0)
    assert ranks_of(ranks.load.group) == ranks_of(ranks.plan.group) == [1, 3, 5, 7] and ranks.noise.rank == 2
    by_name = patched_ranks(a_model(), process_group="dp_cp")
    assert ranks_of(by_name.plan.group) == [1, 3, 5, 7]


def test_a_mesh_of_the_parameters_is_seen(eight_ranks):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh_of(dp=4, tp=2)
    model = a_model()
    ranks = patched_ranks(model)
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel()})
    sinkroute.set_step(model, 0)
    assert ranks_of(ranks.load.group) == [1, 3, 5, 7]
    fully_shard(model, mesh=mesh["dp"])
    sinkroute.set_step(model, 1)
    assert ranks_of(ranks.load.group) == [1, 3, 5, 7]

    for mesh in (None, mesh_of(anything=8), init_device_mesh("cpu", (8,))):
        sharded = fully_shard(a_model(), **({} if mesh is None else {"mesh": mesh}))
        assert ranks_of(patched_ranks(sharded).load.group) == WORLD
    unnamed = a_model()
    parallelize_module(unnamed, init_device_mesh("cpu", (8,)), {"lm_head": ColwiseParallel()})
    with pytest.raises(UnknownLayout, match=r"dimensions have no names.*make it with mesh_dim_names="):
        _ = patched_ranks(unnamed).load.group
    two = a_model()
    parallelize_module(two, mesh_of(tp=8), {"lm_head": ColwiseParallel()})
    parallelize_module(two, mesh_of(dp=2, tp=4)["tp"], {"model.layers.0.self_attn.q_proj": ColwiseParallel()})
    with pytest.raises(UnknownLayout, match="are on 2 device meshes"):
        _ = patched_ranks(two).load.group


def test_the_mesh_that_transformers_keeps_is_asked_first(eight_ranks):
    model = a_model()
    ranks = patched_ranks(model)
    model._device_mesh, model._tp_size = init_device_mesh("cpu", (8,)), 8  # transformers 5.20
    sinkroute.set_step(model, 0)
    assert ranks.load.group is None and ranks.noise.rank == 0
    model._device_mesh, model._tp_size = mesh_of(dp=4, tp=2)["tp"], 2
    sinkroute.set_step(model, 1)
    assert ranks_of(ranks.load.group) == [1, 3, 5, 7]
    model._tp_plan = {"layers.*.input_layernorm": "sequence_parallel"}
    with pytest.raises(UnknownLayout, match="sequence_parallel in its tp_plan"):
        sinkroute.set_step(model, 2)


def test_a_copy_and_a_file_of_a_patched_model_ask_for_their_own_ranks(eight_ranks, tmp_path):
    model = a_model()
    sinkroute.patch(model, "ssr-l", process_group="world")
    sinkroute.set_step(model, 0)
    torch.save(model, tmp_path / "model.pt")
    others = copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)
    model._device_mesh, model._tp_size = mesh_of(dp=4, tp=2)["tp"], 2
    for other, members in zip((model, *others), ([1, 3, 5, 7], WORLD, WORLD), strict=True):
        sinkroute.set_step(other, 1)
        ranks = attached(other.model.layers[0].mlp.gate).ranks
        assert ranks_of(ranks.load.group) == members and ranks.plan is ranks.load is ranks.noise
