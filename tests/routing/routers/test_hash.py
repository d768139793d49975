"""Hash routing: balanced over ids, or over text."""

import itertools

import pytest
import torch

import sinkroute


def make(experts=4, top_k=1, **options):
    return sinkroute.create_router("hash", num_experts=experts, top_k=top_k, **options)


def route(router, ids, gate=None):
    gate = router.make_gate(3) if gate is None else gate
    return router(gate(torch.zeros(len(ids), 3), ids))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (5, 3), (4, 4), (1, 1)])
def test_every_block_of_e_ids_fills_all_experts_alike(experts, top_k):
    router = make(experts, top_k)
    for block in (0, 1, 7, 1000):
        routes = route(router, experts * block + torch.arange(experts))
        assert routes.load.tolist() == [top_k] * experts
        assert all(len(set(row)) == top_k for row in routes.experts.tolist())


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (6, 3), (5, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_one_over_k(experts, top_k, training):
    routes = route(make(experts, top_k).train(training), torch.arange(40))
    assert torch.equal(routes.weights, torch.full((40, top_k), 1.0) / top_k)


def test_the_same_id_always_goes_to_the_same_experts():
    routes = route(make(8, 2), torch.tensor([5, 9, 5, 9, 5]))
    sets = [frozenset(row) for row in routes.experts.tolist()]
    assert len(set(sets[::2])) == len(set(sets[1::2])) == 1


def test_blocks_are_shuffled_each_by_itself():
    table = make(8).make_gate(3).experts_VK.view(-1, 8)
    assert len({tuple(block) for block in table.tolist()}) > 1000
    # The pairs of neighbouring ids that share an expert would be none if blocks were alike.
    assert len(set((table[:-1] == table[1:]).sum(1).tolist())) > 1


def test_the_table_follows_seed_and_layer_and_is_the_same_for_all_layers_that_are_not_told():
    tables = [make(seed=s, layer=y).make_gate(3).experts_VK for s, y in ((0, None), (1, None), (0, 0), (0, 1))]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(tables, 2))
    assert torch.equal(make().make_gate(3).experts_VK, tables[0])
    layer = sinkroute.MoE(4, 4, 4, 1, "hash")
    sinkroute.set_step(layer, 0)  # numbers the router: too late to matter
    assert torch.equal(layer.gate.experts_VK, tables[0])


def test_ids_beyond_the_table_and_below_0_take_a_row_of_it():
    router = make(4, vocab_size=10)
    gate = router.make_gate(3)
    assert gate.experts_VK.shape == (12, 1)  # rounded up to whole blocks
    routes = route(router, torch.tensor([3, 15, -9, 1_000_000_011]), gate)
    assert len(set(routes.experts.flatten().tolist())) == 1


@pytest.mark.parametrize("top_k", [1, 2])
def test_balancing_is_greedy_by_frequency(top_k):
    gate = make(3, top_k, vocab_size=50).make_gate(3)
    counts = torch.randint(0, 1000, (50,), generator=torch.Generator().manual_seed(0)) ** 2
    gate.balance(counts)
    load = [0] * 3
    for token in sorted(range(50), key=lambda token: -counts[token].item()):
        chosen = gate.experts_VK[token].tolist()
        others = [load[expert] for expert in range(3) if expert not in chosen]
        assert len(set(chosen)) == top_k and max(load[expert] for expert in chosen) <= min(others)
        for expert in chosen:
            load[expert] += counts[token].item()
    assert max(load) / (sum(load) / 3) < 1.02


def test_words_that_never_occur_are_spread_over_the_experts():
    gate = make(4, vocab_size=100).make_gate(3)
    gate.balance(torch.zeros(100))
    assert torch.bincount(gate.experts_VK.flatten()).tolist() == [25] * 4


def test_rows_beyond_the_counts_stay():
    gate = make(4, vocab_size=100).make_gate(3)
    before = gate.experts_VK.clone()
    gate.balance(torch.arange(20.0))
    assert torch.equal(gate.experts_VK[20:], before[20:]) and not torch.equal(gate.experts_VK[:20], before[:20])


def test_a_balanced_table_is_saved_with_the_model():
    layer, other = (sinkroute.MoE(4, 4, 4, 2, "hash", router_options={"vocab_size": 20}) for _ in range(2))
    layer.gate.balance(torch.arange(20.0))
    assert not torch.equal(other.gate.experts_VK, layer.gate.experts_VK)
    other.load_state_dict(layer.bfloat16().state_dict())
    assert torch.equal(other.gate.experts_VK, layer.gate.experts_VK) and layer.gate.experts_VK.dtype == torch.int64


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(13), r"token_counts must have shape \(n,\) with n <= 12, got \(13,\); give the router vocab_size"),
        (torch.zeros(2, 2), r"token_counts must have shape \(n,\) with n <= 12, got \(2, 2\)"),
        (torch.tensor([1.0, -1.0]), r"token_counts must be finite numbers of 0 or more"),
        (torch.tensor([1.0, float("inf")]), r"token_counts must be finite numbers of 0 or more"),
    ],
)
def test_counts_that_are_none_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        make(4, vocab_size=10).make_gate(3).balance(counts)


@pytest.mark.parametrize("vocab_size", [0, -1])
def test_a_size_that_is_none_is_refused(vocab_size):
    with pytest.raises(ValueError, match=r"vocab_size must be an integer of 1 or more, got"):
        make(vocab_size=vocab_size)


def test_the_layer_asks_for_ids():
    layer = sinkroute.MoE(4, 4, 4, 1, "hash")
    with pytest.raises(ValueError, match=r"HashRouter routes by what a token is: call the layer with token_ids="):
        layer(torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type_go_to_the_experts_of_those_of_int64(dtype):
    layer, ids = sinkroute.MoE(4, 4, 4, 1, "hash"), torch.arange(120)
    for of in (ids, ids.to(dtype)):
        layer(torch.zeros(120, 4), token_ids=of)
        assert torch.equal(layer.routes.experts, layer.gate.experts_VK[ids])


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"top_groups=1 of groups=2: HashRouter cannot keep a token's experts"):
        make(groups=2, top_groups=1)


def test_resetting_the_gate_gives_it_its_random_table_again():
    gate = make(4, 2, vocab_size=20).make_gate(3)
    before = gate.experts_VK.clone()
    gate.balance(torch.arange(20.0))
    gate.reset_parameters()
    assert torch.equal(gate.experts_VK, before)
