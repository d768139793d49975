"""Averages of models (EMA, SWA), which take every buffer for a number: equal models give an equal one."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sinkroute
from sinkroute.routing.registry import router_options
from sinkroute.routing.state import KeepsDtypes, RouterState

D, EXPERTS, VOCAB = 6, 12, 40
ADAPTIVE = {"probability": "adaptive(high=0.2, low=0.1, decay=0.5)"}
ROUTERS = {name: {} for name in sinkroute.list_routers()} | {
    f"{name}, adaptive": ADAPTIVE for name in sinkroute.list_routers() if "probability" in router_options(name)
}
ROUTERS["stable-moe"] = {"freeze_step": 2, "vocab_size": VOCAB}
ROUTERS["hash"] = {"vocab_size": VOCAB}


def make(way):
    torch.manual_seed(0)
    return sinkroute.MoE(D, 4, EXPERTS, 2, way.partition(",")[0], router_options=ROUTERS[way])


def train(layer, steps):
    for step in range(*steps):
        sinkroute.set_step(layer, step, total_steps=30)
        layer(torch.randn(30, D, generator=torch.Generator().manual_seed(step)) + 1, token_ids=torch.arange(30) % VOCAB)
    return layer


def by_hand(average, model, decay=0.99):
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(decay * mine + (1 - decay) * theirs)


def by_buffers(average, model, decay=0.999):
    with torch.no_grad():
        for mine, theirs in zip(
            (*average.parameters(), *average.buffers()), (*model.parameters(), *model.buffers()), strict=True
        ):
            mine.copy_(decay * mine + (1 - decay) * theirs)


def served(layer, seed=7):
    with torch.no_grad():
        x_TD = torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(seed))
        layer.eval()(x_TD, token_ids=torch.arange(VOCAB))
    return layer.routes


def assert_equal(average, model):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(served(average).experts, served(model).experts)


def floats_only(layer):
    return all(buffer.is_floating_point() for buffer in layer.buffers())


@pytest.mark.parametrize("way", ROUTERS)
def test_no_buffer_is_a_flag_or_an_integer(way):
    assert floats_only(make(way))


@pytest.mark.parametrize("update", [by_hand, by_buffers])
@pytest.mark.parametrize("way", ROUTERS)
def test_the_average_of_equal_models_is_the_model(way, update):
    model = train(make(way), (5,))
    average = copy.deepcopy(model)
    for _ in range(120):
        update(average, model)
    assert_equal(average, model)


@pytest.mark.parametrize(
    "average",
    [
        {},
        {"multi_avg_fn": get_swa_multi_avg_fn()},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": lambda mine, theirs, count: 0.9 * mine + 0.1 * theirs},
    ],
    ids=["mean", "mean at once", "moving", "moving, by a function"],
)
@pytest.mark.parametrize("way", ROUTERS)
def test_torch_averages_buffers_too(way, average):
    model = train(make(way), (5,))
    averaged = AveragedModel(model, use_buffers=True, **average)
    for _ in range(15):
        averaged.update_parameters(model)
    assert_equal(averaged.module, model)


def test_an_average_of_before_and_after_the_freeze_serves_by_main_logits_and_then_by_the_frozen_table():
    model = train(make("stable-moe"), (1,))
    average = copy.deepcopy(model)
    train(model, (1, 4))
    kept, main = served(model).experts, served(copy.deepcopy(average)).experts
    assert not torch.equal(kept, main)
    for _ in range(150):
        by_hand(average, model, decay=0.95)
        found = served(average).experts
        assert torch.equal(found, main) or torch.equal(found, kept)
    assert torch.equal(found, kept)


def test_an_average_that_is_saved_and_loaded_serves_the_same():
    model = train(make("stable-moe"), (5,))
    average = copy.deepcopy(model)
    for _ in range(20):
        by_hand(average, model)
    other = make("stable-moe")
    other.load_state_dict(average.state_dict())
    assert other.gate.is_frozen and other.router.state.is_frozen
    assert torch.equal(served(other).experts, served(model).experts)


def test_a_step_that_is_read_from_an_average_is_whole():
    states = [RouterState(2, bias_E=torch.zeros(2)) for _ in range(2)]
    for step in (100_003, 100_004):
        for state in states:
            state.begin(step)
            state.note(torch.tensor([50_001, 3]), {})
    saved = {name: 0.999 * value + (1 - 0.999) * value for name, value in states[0].state_dict().items()}
    states[1].load_state_dict(saved)
    assert (states[1].current, states[1].load_E.tolist()) == (100_004, [50_001, 3])


# -- checkpoints of other kinds --------------------------------------------------------------------------------------


def test_a_checkpoint_that_has_integers_and_flags_is_loaded():
    # As those of earlier versions had.
    for way in ("stable-moe", "ssr-l, adaptive", "hash"):
        model = train(make(way), (5,))
        saved = {
            name: value.long() if "saved_steps" in name or "load" in name or name.endswith("_VK") else value
            for name, value in model.state_dict().items()
        }
        saved = {name: value.bool() if name.endswith(("frozen", "firing")) else value for name, value in saved.items()}
        for assign in (False, True):
            other = make(way)
            other.load_state_dict(saved, assign=assign)
            assert floats_only(other)
            assert_equal(other, model)


def test_counts_that_a_narrow_dtype_made_infinite_are_dropped():
    state = RouterState(2, bias_E=torch.zeros(2))
    state.begin(3)
    state.note(torch.tensor([100_000, 1]), {})
    other = RouterState(2, bias_E=torch.zeros(2))
    other.load_state_dict({name: value.half() for name, value in state.state_dict().items()})
    assert (other.current, other.ended, other.load_E.tolist()) == (-1, -1, [0, 0])


@pytest.mark.parametrize("way", ["hash", "stable-moe"])
@pytest.mark.parametrize("cast", [lambda layer: layer.bfloat16(), lambda layer: layer.to(torch.float16).double()])
def test_a_cast_of_the_model_keeps_its_table(way, cast):
    layer = train(make(way), (5,))
    name = "table_VK" if way == "hash" else "frozen_VK"
    table_VK = getattr(layer.gate, name)
    table_VK += 2**20 + 1 - table_VK[0]
    before = table_VK.clone()
    cast(layer)
    assert torch.equal(getattr(layer.gate, name), before)


@pytest.mark.parametrize("name", ["hash", "stable-moe"])
def test_a_table_in_a_dtype_that_cannot_hold_it_is_refused(name):
    layer = sinkroute.MoE(4, 4, 258, 1, name, router_options={"vocab_size": 300})
    saved = {key: value.bfloat16() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"_VK is torch.bfloat16, which holds whole numbers up to 256 only.* 258 exp"):
        layer.load_state_dict(saved)


def test_buffers_that_keep_their_dtype_go_to_the_meta_device_and_back():
    module = KeepsDtypes()
    module.register_buffer("table", torch.tensor([257.0]))
    module.to("meta").bfloat16().to_empty(device="cpu")
    assert (module.table.dtype, module.table.shape, module.table.device.type) == (torch.float32, (1,), "cpu")
