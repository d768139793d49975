"""The recipe of examples/many_ranks in Megatron-Core: the small mixture trains here, the large ones are built."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core.models.gpt")

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def recipe():
    """The example, on a CPU."""
    here = Path(__file__)
    sys.path[:0] = [str(here.parent), str(here.parents[2] / "examples" / "many_ranks")]
    importlib.import_module("megatron_on_the_cpu").stand_in()
    return importlib.import_module("megatron_gpt")


def trained(*arguments):
    lines = recipe().main(["small", "--steps", "12", "--report-every", "4", "--global-batch", "4", *arguments])
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def on_two_replicas():
    return trained("--ep", "2")


def with_tensor_parallelism():
    return trained("--tp", "2", "--ep", "2")


def with_stages():
    return trained("--pp", "2", "--ep", "2")


@pytest.mark.parametrize(
    ("layout", "ranks", "layers"), [(on_two_replicas, 2, 4), (with_tensor_parallelism, 4, 4), (with_stages, 4, 2)]
)
def test_the_small_mixture_trains_balanced_on_these_ranks(layout, ranks, layers, run_ranks):
    found = run_ranks(layout, ranks)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in found]
    seen = [each for each in losses if each]  # the last stage knows it
    assert seen and all(each[-1] < each[0] < math.log(256) + 0.2 for each in seen)
    for lines in found:
        assert [line["step"] for line in lines] == [3, 7, 11]
        last = lines[-1]
        assert len(last["max_vio_global"]) == layers
        assert last["dead"] == 0 and max(last["max_vio_global"]) < 1
    # The ranks of a stage say the same of its layers.
    assert len({str(lines[-1]["max_vio_global"]) for lines in found}) == (2 if layout is with_stages else 1)


def of_512_ranks():
    """Parameters on the first of so many ranks, whose groups are fakes."""
    made, found = recipe(), {}
    dist.destroy_process_group()
    from megatron.core import parallel_state
    from mixtures import LAYOUTS, MIXTURES
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name in ("7b-a1b", "30b-a3b"):
        layout = LAYOUTS["megatron"][name]
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.ranks)
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        config = made.transformer_config(
            MIXTURES[name], layout, perform_initialization=False, init_model_with_meta_device=True
        )
        with torch.device("meta"):
            model = made.build_model(MIXTURES[name], config)
        found[name] = sum(parameter.numel() for parameter in model.parameters())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def test_the_large_mixtures_are_built_on_their_ranks_with_as_many_parameters_as_the_budget_says(run_ranks):
    # tests/examples/test_many_ranks.py has the same numbers of the budget.
    assert run_ranks(of_512_ranks, 1) == [{"7b-a1b": 1_281_955_840, "30b-a3b": 2_200_410_112}]
