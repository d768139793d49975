"""What routers remember: dtypes, devices, checkpoints, copies, and what is counted."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.routing.registry import router_options
from sinkroute.routing.state import RouterState, recomputing


def make_state():
    return RouterState(
        3, sums={"mass": 2}, bias_E=torch.tensor([0.1, 0.2, 0.3]), firing=torch.tensor(1.0), level=torch.tensor(-1.0)
    )


def counted_state():
    """Step 7 is under way, step 6 is over, and every number is another."""
    state = make_state()
    state.begin(6)
    state.end()
    state.begin(7)
    state.note(torch.tensor([4, 5, 6]), {"mass": torch.tensor([0.25, 0.5], dtype=torch.float64)})
    state.bias_E.copy_(torch.tensor([1.1, 1.2, 1.3]))
    state.firing.fill_(0.0)
    state.level.fill_(0.75)
    return state


def facts(state):
    """All that it remembers, as plain numbers."""
    values = {name: getattr(state, name).tolist() for name in ("bias_E", "firing", "level", "load_E", "mass")}
    return values | {"current": state.current, "ended": state.ended}


COUNTED, FRESH = facts(counted_state()), facts(make_state())


def routers_with_state():
    for name in sinkroute.list_routers():
        for options in ({}, {"probability": "adaptive"}) if "probability" in router_options(name) else ({},):
            router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
            if router.state is not None:
                yield pytest.param(name, options, id=f"{name} {options.get('probability', '')}".strip())


every_stateful_router = pytest.mark.parametrize(("name", "options"), list(routers_with_state()))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.bfloat16().float(),
    ],
)
def test_a_cast_of_the_model_leaves_dtypes_and_values_alone(cast):
    state = counted_state()
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "state": state})
    cast(model)
    assert facts(state) == COUNTED  # 1.1 in bfloat16 and back would be 1.1015625
    assert state.bias_E.dtype == state.level.dtype == state.firing.dtype == torch.float32
    assert state.load_E.dtype == torch.int64 and state.mass.dtype == torch.float64


def test_a_bias_of_a_bfloat16_model_still_moves_by_a_thousandth():
    router = sinkroute.create_router("loss-free", num_experts=2, top_k=1).bfloat16()
    router.state.bias_E.copy_(torch.tensor([1.0, -1.0]))  # where bfloat16 has steps of 0.0078
    sinkroute.set_step(router, 0)
    router(torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16))
    sinkroute.end_step(router)
    assert router.state.bias_E.tolist() == pytest.approx([0.999, -0.999], abs=1e-6)


def test_what_was_counted_and_remembered_survives_to_empty():
    state = counted_state()
    state.to_empty(device="cpu")
    assert facts(state) == COUNTED


def test_on_the_meta_device_there_are_no_values_and_back_from_it_the_first_ones():
    state = counted_state().to("meta")
    assert state.bias_E.is_meta and state.firing.is_meta and state.bias_E.dtype == torch.float32
    state.to_empty(device="cpu")
    assert [state.bias_E.tolist(), state.firing.item(), state.level.item()] == [FRESH["bias_E"], 1.0, -1.0]


@every_stateful_router
def test_a_router_made_on_the_meta_device_starts_like_any_other(name, options):
    with torch.device("meta"):
        router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    router.to_empty(device="cpu")
    fresh = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    assert router.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in router.state_dict().items())
    assert all(buffer.device.type == "cpu" for buffer in router.buffers())


def test_a_router_made_on_the_meta_device_takes_the_tensors_of_a_checkpoint_as_they_are():
    with torch.device("meta"):
        state = RouterState(3, sums={"mass": 2}, **_values_on_the_cpu())
    state.load_state_dict(counted_state().state_dict(), assign=True)
    assert facts(state) == COUNTED


def _values_on_the_cpu():
    return {
        "bias_E": torch.zeros(3, device="cpu"),
        "firing": torch.tensor(1.0, device="cpu"),
        "level": torch.tensor(0.0, device="cpu"),
    }


def test_an_initial_value_that_is_none_is_refused():
    with pytest.raises(ValueError, match='bias_E is on the meta device and has no value; make it with device="cpu"'):
        RouterState(3, bias_E=torch.zeros(3, device="meta"))


def test_what_came_from_the_meta_device_is_reset_to_its_first_values_too():
    state = make_state().to("meta").to_empty(device="cpu")
    state.bias_E += 1
    state.reset_parameters()
    assert facts(state) == FRESH


def test_an_initial_value_that_averages_would_spoil_is_refused():
    with pytest.raises(TypeError, match=r"on must be a float tensor, got torch.bool; keep a flag as 0.0 or 1.0"):
        RouterState(3, on=torch.tensor(True))


def test_reset_parameters_forgets_everything():
    state = counted_state()
    state.reset_parameters()
    assert facts(state) == FRESH


def test_a_changed_value_does_not_change_what_it_is_reset_to():
    start = torch.zeros(3)
    state = RouterState(3, bias_E=start)
    state.bias_E += 1
    assert start.tolist() == [0, 0, 0]
    start += 2
    state.note(torch.tensor([1, 2, 3]), {})
    state.reset_parameters()
    assert state.bias_E.tolist() == [0, 0, 0] and state.saved_load_E.tolist() == [0, 0, 0]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def by_state_dict(state, other, folder):
    assert other.load_state_dict(state.state_dict(), strict=True) == ([], [])


def by_assigned_state_dict(state, other, folder):
    other.load_state_dict(copy.deepcopy(state.state_dict()), assign=True)


def by_torch_save(state, other, folder):
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))


def by_safetensors(state, other, folder):
    save_file(state.state_dict(), folder / "state.safetensors")
    other.load_state_dict(load_file(folder / "state.safetensors"))


def by_safetensors_model(state, other, folder):
    save_model(state, str(folder / "model.safetensors"))
    assert load_model(other, str(folder / "model.safetensors"), strict=True) == (set(), [])


def by_distributed_checkpoint(state, other, folder):
    dcp.save({"model": get_model_state_dict(state)}, checkpoint_id=folder, no_dist=True)
    found = {"model": get_model_state_dict(other)}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(other, found["model"], options=StateDictOptions(strict=True))


@pytest.mark.parametrize(
    "way",
    [
        by_state_dict,
        by_assigned_state_dict,
        by_torch_save,
        by_safetensors,
        by_safetensors_model,
        pytest.param(by_distributed_checkpoint, marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_a_checkpoint_holds_all_of_it_in_the_middle_of_a_step(way, tmp_path):
    other = make_state()
    way(counted_state(), other, tmp_path)
    assert facts(other) == COUNTED
    assert other.load_E.dtype == torch.int64 and other.mass.dtype == torch.float64


def test_a_checkpoint_of_a_later_step_is_not_changed_by_what_is_counted_then():
    state = counted_state()
    saved = copy.deepcopy(state.state_dict())
    state.note(torch.tensor([1, 1, 1]), {})
    state.load_state_dict(saved)
    assert facts(state) == COUNTED


def test_tools_that_look_for_buffers_find_every_key():
    state = make_state()
    assert set(state.state_dict()) == set(dict(state.named_buffers()))


def test_a_checkpoint_in_low_precision_is_loaded_in_full():
    saved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in counted_state().state_dict().items()}
    state = make_state()
    state.load_state_dict(saved, assign=True)
    assert state.bias_E.dtype == torch.float32 and state.bias_E.tolist() == [1.1015625, 1.203125, 1.296875]
    assert (state.current, state.ended, state.load_E.tolist()) == (7, 6, [4, 5, 6])


def test_keys_that_are_missing_or_unknown_or_of_another_size_are_errors():
    saved = counted_state().state_dict()
    without = {name: value for name, value in saved.items() if name != "saved_load_E"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "saved_load_E"'):
        make_state().load_state_dict(without)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weights"'):
        make_state().load_state_dict(saved | {"weights": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for saved_load_E"):
        make_state().load_state_dict(saved | {"saved_load_E": torch.zeros(4, dtype=torch.int64)})


def test_a_checkpoint_without_state_leaves_it_alone_where_that_is_allowed():
    state = counted_state()
    state.load_state_dict({}, strict=False)
    assert facts(state) == COUNTED


@pytest.mark.parametrize("way", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_are_alike_and_independent(way):
    state = counted_state()
    other = way(state)
    assert facts(other) == COUNTED
    other.begin(8)
    other.note(torch.tensor([1, 1, 1]), {"mass": torch.ones(2, dtype=torch.float64)})
    other.bias_E.zero_()
    assert facts(state) == COUNTED and other.load_E.tolist() == [1, 1, 1]


def train(layer, first=(0, 0), stop=None):
    """Four steps of two micro-batches, from `first` on, up to but without `stop`. Only what routers remember moves."""
    for step, part in [(step, part) for step in range(4) for part in range(2)]:
        if (step, part) < first:
            continue
        if (step, part) == stop:
            return layer
        sinkroute.set_step(layer, step, part, total_steps=4)
        x, token_ids = random(12, 5, seed=100 * step + part), torch.arange(12) % 7
        layer(x + torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]), token_ids=token_ids)
    sinkroute.end_step(layer)
    return layer


@every_stateful_router
@pytest.mark.parametrize("stop", [(2, 1), (2, 0)], ids=["within a step", "between steps"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(name, options, stop):
    options = options | ({"probability": 0.5} if "probability" in router_options(name) and not options else {})
    whole = sinkroute.MoE(5, 8, 4, 2, router=name, router_options=options)
    stopped = copy.deepcopy(whole)
    resumed = sinkroute.MoE(5, 8, 4, 2, router=name, router_options=options)
    resumed.load_state_dict(train(stopped, stop=stop).state_dict())
    train(whole)
    train(resumed, first=stop)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert not all(torch.equal(value, whole.state_dict()[key]) for key, value in stopped.state_dict().items())


# -- what is counted -------------------------------------------------------------------------------------------------


def test_counts_add_up_over_the_micro_batches_of_a_step_and_start_anew_with_the_next():
    router = sinkroute.create_router("loss-free", num_experts=2, top_k=1)
    logits_TE = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    for part in range(4):
        sinkroute.set_step(router, 0, part)
        router(logits_TE)
    assert router.state.load_E.tolist() == [8, 4]
    sinkroute.set_step(router, 1)
    router(logits_TE)
    assert router.state.load_E.tolist() == [2, 1]


@every_stateful_router
def test_evaluation_is_not_counted(name, options):
    router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    sinkroute.set_step(router, 0, total_steps=4)
    router.eval()(random(9, 4))
    assert not router.state.pending().any()
    router.train()(random(9, 4))
    assert router.state.load_E.sum() == 18


def test_padding_is_not_counted():
    router = sinkroute.create_router("loss-free", num_experts=2, top_k=1)
    sinkroute.set_step(router, 0)
    router(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([True, False, True]))
    assert router.state.load_E.tolist() == [1, 1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_pass_that_is_repeated_is_counted_once(use_reentrant):
    router = sinkroute.create_router("loss-free", num_experts=4, top_k=2)
    sinkroute.set_step(router, 0)
    logits_TE, repetitions = random(9, 4).requires_grad_(), []

    def weights(logits_TE):
        repetitions.append(recomputing())
        return router(logits_TE).weights ** 2

    checkpoint(weights, logits_TE, use_reentrant=use_reentrant).sum().backward()
    assert repetitions == [False, True]
    assert router.state.load_E.sum() == 18


def test_what_is_counted_before_training_or_after_the_end_of_a_step_is_of_no_step():
    router = sinkroute.create_router("loss-free", num_experts=2, top_k=1)
    router(torch.tensor([[0.0, 9.0]] * 5))  # a trial
    sinkroute.set_step(router, 0)
    router(torch.tensor([[9.0, 0.0]]))
    assert router.state.load_E.tolist() == [1, 0]
    sinkroute.end_step(router)
    bias_E = router.state.bias_E.clone()
    router(torch.tensor([[0.0, 9.0]] * 5))
    sinkroute.end_step(router)
    assert torch.equal(router.state.bias_E, bias_E)
    sinkroute.set_step(router, 1)
    assert router.state.load_E.tolist() == [0, 0]


def test_nothing_is_counted_any_more_when_a_step_has_ended():
    # So that checkpoints written after it are the same on all ranks.
    state = counted_state()
    state.end()
    assert not state.pending().any() and state.has_ended
    assert not state.state_dict()["saved_load_E"].any()


def test_large_counts_are_exact():
    state = RouterState(2)
    state.begin(0)
    state.note(torch.tensor([2**52 + 1, 3]), {})
    load_E, sums = state.split(state.pending() * 2)
    assert load_E.tolist() == [2**53 + 2, 6] and sums == {}


def test_values_are_float32_whatever_the_default_dtype_was():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = sinkroute.create_router("loss-free", num_experts=4, top_k=1)
    finally:
        torch.set_default_dtype(before)
    assert router.state.bias_E.dtype == torch.float32


def test_sums_that_come_later_keep_their_order_which_is_that_of_the_ranks():
    # A set of these names has another order in each process.
    names = [f"sum{number}" for number in range(20)]
    state = RouterState(2, sums={"first": 1})
    state.add_sums(**dict.fromkeys(names, 1))
    state.add_sums(first=1, sum3=1)
    assert list(state.sums) == ["first", *names]
