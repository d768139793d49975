"""Which ranks a router of torchtitan's shares what with, for every layout: its real `ParallelDims`, no process."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

titan_dims = pytest.importorskip("torchtitan.distributed.parallel_dims")

from sinkroute.adapters._titan_ranks import ranks_in  # noqa: E402
from sinkroute.routing.ranks import Ranks  # noqa: E402

WORLD = 8


@pytest.fixture(params=["spmd_types", "partial_dtensor", "full_dtensor"])
def make(request, monkeypatch):
    monkeypatch.setattr(titan_dims, "device_type", "cpu")

    def made(rank, **degrees):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        sizes = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "pp": 1, "ep": 1} | degrees
        return titan_dims.ParallelDims(**sizes, world_size=WORLD, spmd_backend=request.param)

    yield made
    if dist.is_initialized():
        dist.destroy_process_group()


def members(ranks):
    return [dist.get_rank()] if ranks.group is None else dist.get_process_group_ranks(ranks.group)


# Rank 5's, of a world that is (pp, batch, cp, tp): those that have other tokens for the same layers, and its place.
LAYOUTS = [
    ({}, range(8), 5),
    ({"ep": 4}, range(8), 5),
    ({"dp_replicate": 2}, range(8), 5),
    ({"dp_replicate": 8, "dp_shard": 1}, range(8), 5),
    ({"cp": 2}, range(8), 5),
    ({"cp": 8}, range(8), 5),
    ({"tp": 2}, [1, 3, 5, 7], 2),
    ({"tp": 8}, [5], 0),
    ({"tp": 2, "ep": 2}, range(8), 5),
    ({"tp": 2, "ep": 8}, range(8), 5),
    ({"tp": 8, "ep": 8}, range(8), 5),
    ({"cp": 2, "tp": 2}, [1, 3, 5, 7], 2),
    ({"cp": 2, "tp": 2, "ep": 4}, range(8), 5),
    ({"pp": 2}, [4, 5, 6, 7], 1),
    ({"pp": 8}, [5], 0),
    ({"pp": 2, "cp": 2}, [4, 5, 6, 7], 1),
    ({"pp": 2, "ep": 2}, [4, 5, 6, 7], 1),
    ({"pp": 2, "tp": 2}, [5, 7], 0),
    ({"pp": 2, "tp": 2, "ep": 2}, [4, 5, 6, 7], 1),
    ({"pp": 2, "tp": 4}, [5], 0),
    ({"pp": 2, "tp": 4, "ep": 4}, [4, 5, 6, 7], 1),
    ({"pp": 2, "cp": 2, "tp": 2, "ep": 2}, [4, 5, 6, 7], 1),
    ({"pp": 4, "tp": 2}, [5], 0),
]


@pytest.mark.parametrize(("degrees", "others", "place"), LAYOUTS, ids=lambda value: str(value) if value else "dp")
def test_tokens_are_counted_once_and_noise_differs_where_tokens_do_within_a_stage(make, degrees, others, place):
    ranks = ranks_in(make(5, **degrees), Ranks(None))
    assert members(ranks.load) == members(ranks.noise) == list(others)
    assert ranks.noise.rank == place
    assert ranks.plan == Ranks(None)


@pytest.mark.parametrize(("degrees", "others", "place"), LAYOUTS, ids=lambda value: str(value) if value else "dp")
def test_a_plan_over_the_world_is_over_the_stage_each_token_once(make, degrees, others, place):
    assert members(ranks_in(make(5, **degrees), Ranks("world")).plan) == list(others)


def test_a_group_is_made_once(make):
    dims = make(5, pp=2, tp=2, ep=2)
    assert ranks_in(dims, Ranks("world")).plan == ranks_in(dims, Ranks(None)).load


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", [4, 5, 6, 7]),
        ("batch", [5, 7]),
        ("cp", [4, 5]),
        ("tp", [5]),
        ("dp_replicate", [5]),
    ],
)
def test_a_plan_takes_the_name_of_a_dimension(make, name, expected):
    assert members(ranks_in(make(5, pp=2, cp=2), Ranks(name)).plan) == expected


@pytest.mark.parametrize(("ep", "expected"), [(1, [5]), (2, [4, 5])])
def test_a_plan_over_tensor_parallel_ranks_is_of_other_tokens_only(make, ep, expected):
    assert members(ranks_in(make(5, tp=2, ep=ep), Ranks("tp")).plan) == expected


def test_a_dimension_that_is_unknown_or_has_other_layers_is_refused_with_those_there_are(make):
    dims = make(5, pp=2)
    with pytest.raises(
        ValueError, match=r"process_group='dp_cp': there is no such dimension; give one of \['batch', 'l"
    ):
        ranks_in(dims, Ranks("dp_cp"))
    with pytest.raises(ValueError, match="process_group='pp': its ranks have other layers"):
        ranks_in(dims, Ranks("pp"))


def test_a_group_with_ranks_of_another_stage_is_refused(make):
    dims = make(5, pp=2)
    with pytest.raises(ValueError, match=r"this pipeline stage are \[4, 5, 6, 7\]: the others have other layers"):
        ranks_in(dims, Ranks(dist.new_group([1, 5])))
    group = dist.new_group([5, 6])
    assert ranks_in(dims, Ranks(group)).plan == Ranks(group)


def test_a_mesh_that_is_laid_out_otherwise_is_refused(make, monkeypatch):
    dims = make(5, pp=2)
    monkeypatch.setattr(type(dims), "get_optional_mesh", lambda self, names, **more: None)
    with pytest.raises(RuntimeError, match=r"not known as \(batch, cp, tp\).*install torchtitan==0\.3\.0"):
        ranks_in(dims, Ranks(None))
