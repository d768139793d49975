"""The budget of many ranks: it counts what is published, and its formulas are those of draws."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "examples" / "many_ranks"


@pytest.fixture(scope="module")
def parts():
    """The modules of the folder, which import each other by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("mixtures", "balance", "budget")}
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("mixtures", "balance", "budget"):
            sys.modules.pop(name, None)


@pytest.fixture
def budget(parts):
    return parts["budget"]


@pytest.fixture
def balance(parts):
    return parts["balance"]


@pytest.fixture
def mixtures(parts):
    return parts["mixtures"]


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "total"), [("7b-a1b", 6_919_161_856), ("30b-a3b", 30_532_122_624)])
def test_the_mixtures_have_as_many_parameters_as_the_published_checkpoints(name, total, budget, mixtures):
    found = budget.count_parameters(mixtures.MIXTURES[name])
    published, active = mixtures.PUBLISHED[name]
    assert found.total == total
    assert round(found.total / 1e9, 1) == published
    # Qwen says 3.3 of what is 3.35.
    assert found.active(mixtures.MIXTURES[name]) / 1e9 == pytest.approx(active, rel=0.02)


def test_active_parameters_are_those_that_one_token_needs(budget, mixtures):
    small = mixtures.MIXTURES["small"]
    expert = 3 * small.dim * small.expert_dim
    found = budget.count_parameters(small)
    assert found.experts == small.layers * small.experts * expert
    assert found.total - found.active(small) == small.layers * (small.experts - small.top_k) * expert


# -- layouts and memory ----------------------------------------------------------------------------------------------


def test_a_layout_that_cannot_be_is_refused(mixtures):
    with pytest.raises(ValueError, match="ep=3 does not divide the dp · cp · tp = 8 ranks"):
        mixtures.Layout(dp=4, tp=2, ep=3)
    with pytest.raises(ValueError, match="tp=0: a degree of parallelism is 1 or more"):
        mixtures.Layout(tp=0)


@pytest.mark.parametrize("engine", ["torchtitan", "megatron"])
@pytest.mark.parametrize("name", ["small", "7b-a1b", "30b-a3b"])
def test_the_ranks_of_a_stage_hold_each_parameter_once_where_it_is_sharded(name, engine, budget, mixtures):
    mixture = mixtures.MIXTURES[name]
    found = budget.count_parameters(mixture)
    layout = mixtures.Layout(dp=8, ep=4)
    kept = budget.memory(mixture, layout, engine)
    if engine == "torchtitan":
        assert kept.weights * layout.ranks == pytest.approx(4 * found.total, rel=1e-6)
        assert kept.adam == pytest.approx(2 * kept.weights, rel=1e-6)
    else:
        assert kept.weights == pytest.approx(2 * (found.total - found.experts * 3 / 4), rel=1e-6)
        assert kept.adam * layout.ranks == pytest.approx(12 * found.total, rel=1e-6)


def test_what_one_rank_holds_alone_is_all(budget, mixtures):
    mixture = mixtures.MIXTURES["small"]
    total = budget.count_parameters(mixture).total
    for engine, bytes_a_parameter in (("torchtitan", 16), ("megatron", 18)):
        kept = budget.memory(mixture, mixtures.Layout(), engine)
        assert kept.weights + kept.gradients + kept.adam == bytes_a_parameter * total


def test_the_budget_says_what_the_engines_were_found_to_hold(budget, mixtures):
    # The numbers of tests/peers/test_torchtitan_recipes.py and test_megatron_recipes.py.
    small, layout = mixtures.MIXTURES["small"], mixtures.Layout
    for spread, held in ((layout(dp=2, ep=2), 436_576), (layout(dp=2, tp=2, ep=2), 219_488)):
        assert budget.memory(small, spread, "torchtitan").weights == 4 * held
    narrow = 16 * 2 * (2048 - 128)  # norms of queries and keys: OLMoE's are over all heads
    for name, held in (("7b-a1b", 1_281_955_840 + narrow), ("30b-a3b", 2_200_410_112)):
        found = budget.memory(mixtures.MIXTURES[name], mixtures.LAYOUTS["megatron"][name], "megatron")
        # A first stage is without the norm at the end, which the budget counts in parts.
        assert found.weights == pytest.approx(2 * held, abs=2 * 2048)


# -- messages --------------------------------------------------------------------------------------------------------


def test_the_recommended_router_sends_2e_plus_2_numbers_a_layer_and_d_plus_2_more_where_it_is_folded(budget, mixtures):
    mixture = mixtures.MIXTURES["30b-a3b"]
    bias, folded, *_ = budget.messages(mixture, mixtures.Layout(dp=64, pp=2, ep=8))
    assert bias.messages == folded.messages == 1
    assert bias.numbers == 24 * (2 * 128 + 2)
    assert folded.numbers == 24 * (2 * 128 + 2 + 2048 + 2)
    assert bias.sent == 8 * bias.numbers


def test_messages_take_no_time_on_one_rank_and_more_on_more(budget, mixtures):
    mixture = mixtures.MIXTURES["7b-a1b"]
    layouts = [mixtures.Layout(dp=dp) for dp in (1, 2, 64, 512)]
    for found in zip(*(budget.messages(mixture, layout) for layout in layouts), strict=True):
        times = [part.seconds(20e-6, 25e9) for part in found]
        assert times[0] == 0 and times == sorted(times) and len(set(times)) == 4
    # By hand: 2 · 6 hops of 20 µs, and 2 · 63/64 of 16 layers of 130 numbers of 8 bytes at 25 GB/s.
    assert budget.messages(mixture, layouts[2])[0].seconds(20e-6, 25e9) == pytest.approx(240e-6 + 1.31e-6, rel=1e-3)


# -- balance ---------------------------------------------------------------------------------------------------------


def test_the_examples_of_its_docstrings_hold(balance):
    assert doctest.testmod(balance) == (0, 5)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(128, 16, 2), (512, 16, 1), (512, 16, 2), (512, 64, 8), (1024, 8, 2), (4096, 64, 8), (4096, 128, 8)],
)
def test_maxvio_by_chance_is_that_of_draws(tokens, experts, top_k, balance):
    mean, error = balance.simulated_max_vio(tokens, experts, top_k, batches=100)
    # 2 % for the formula, which is a series that ends after its second term.
    assert balance.chance_max_vio(tokens, experts, top_k) == pytest.approx(mean, abs=3 * error + 0.02 * mean)


def test_maxvio_by_chance_falls_with_the_root_of_the_tokens_and_is_0_where_nobody_chooses(balance):
    assert balance.chance_max_vio(100, 8, 8) == 0
    few, many = (balance.chance_max_vio(tokens, 64, 8) for tokens in (100_000, 400_000))
    assert many == pytest.approx(few / 2, rel=0.01)


def test_the_recommended_router_adds_little_to_chance_where_tokens_are_independent(balance):
    chance = balance.chance_max_vio(512, 16, 2)
    assert balance.routed_max_vio(512, 16, 2, 200, "softmax") > 5 * chance
    # 100 steps, each with a standard deviation of about a quarter.
    assert balance.routed_max_vio(512, 16, 2, 200) == pytest.approx(chance, rel=0.08)


def test_a_busy_rank_of_independent_loads_is_that_of_draws(balance):
    experts, ep = 64, 8
    loads = 1 + 0.1 * torch.randn(4000, experts, dtype=torch.float64)
    loads /= loads.mean(1, keepdim=True)
    max_vio = (loads.amax(1) - 1).mean().item()
    ranks = loads.view(-1, ep, experts // ep).mean(2).amax(1) - 1
    one, independent, most = balance.rank_excess(max_vio, experts, ep)
    assert independent == pytest.approx(ranks.mean().item(), rel=0.03)
    assert one < independent < most == max_vio


def test_one_busy_expert_makes_its_rank_as_busy_as_counted(balance):
    loads = torch.full((64,), 1 - 0.5 / 63, dtype=torch.float64)
    loads[3] = 1.5
    rank = loads.view(8, 8).mean(1).max().item() - 1
    assert balance.rank_excess(0.5, 64, 8)[0] == pytest.approx(rank)


def test_a_rank_is_never_busier_than_all_that_there_is(balance):
    assert balance.rank_excess(5.0, 16, 2)[2] == 1


def test_the_share_of_the_experts_is_that_of_their_products(budget, mixtures):
    mixture = mixtures.MIXTURES["small"]
    token = 2 * mixture.layers * mixture.top_k * 3 * mixture.dim * mixture.expert_dim
    heads = mixture.heads * mixture.head_dim
    attention = 2 * mixture.dim * (2 * heads + 2 * mixture.kv_heads * mixture.head_dim)
    scores = 2 * 2 * mixture.length / 2 * heads
    gate, head = 2 * mixture.dim * mixture.experts, 2 * mixture.dim * mixture.vocab
    rest = mixture.layers * (attention + scores + gate) + head
    assert budget.expert_share(mixture) == pytest.approx(token / (token + rest), rel=0.01)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_its_tables(budget, capsys):
    budget.main(["small", "--engine", "megatron", "--dp", "4", "--tokens", "512"])
    said = capsys.readouterr().out
    for words in ("873,152", "dp4·tp2·ep2", "ssr-dual, folded into the gate", "MaxVio by chance alone, 512 tokens"):
        assert words in said
