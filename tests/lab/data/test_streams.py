"""Contiguous streams: training blocks in order, and evaluation that scores every symbol once."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from sinkroute.lab.data import Streams, stream_evaluation

# Symbol i is i, so that a block's symbols are its places in the data; 300 is more than a byte holds.
COUNTING = np.arange(300, dtype=np.int32)


def steps_of(streams):
    """The batches of all steps: inputs, targets (B, L) and fresh (B,)."""
    return list(DataLoader(streams, batch_size=streams.batch))


def test_a_step_gives_each_row_the_block_after_that_of_the_step_before():
    # Rows of 100 symbols, at most 9 whole blocks of 10 with a target ahead at any offset.
    streams = Streams(COUNTING, length=10, batch=3, seed=0, steps=9)
    batches = steps_of(streams)
    offset = int(batches[0]["inputs"][0, 0])
    assert 0 <= offset < 10
    for step, batch in enumerate(batches):
        first = torch.tensor([0, 100, 200])[:, None] + offset + 10 * step
        assert torch.equal(batch["inputs"], first + torch.arange(10))
        assert torch.equal(batch["targets"], batch["inputs"] + 1)


def test_only_the_first_step_of_an_epoch_is_fresh_for_every_row():
    streams = Streams(COUNTING, length=10, batch=3, seed=0, steps=20)
    assert streams.steps_per_epoch == 9
    assert [batch["fresh"].tolist() for batch in steps_of(streams)] == [[step in (0, 9, 18)] * 3 for step in range(20)]


def test_items_have_the_types_promised():
    item = Streams(COUNTING, length=10, batch=3, seed=0, steps=1)[0]
    assert item["inputs"].dtype == item["targets"].dtype == torch.int64
    assert item["fresh"].dtype == torch.bool
    assert item["fresh"].ndim == 0


def test_writing_into_the_inputs_leaves_the_targets_alone():
    item = Streams(COUNTING, length=10, batch=3, seed=0, steps=1)[0]
    before = item["targets"].clone()
    item["inputs"].zero_()
    assert torch.equal(item["targets"], before)


@given(
    size=st.integers(4, 300),
    length=st.integers(1, 20),
    batch=st.integers(1, 8),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_stays_within_its_rows_and_reads_no_symbol_twice(size, length, batch, seed, epoch):
    batch = min(batch, size // 4)
    length = min(length, size // batch // 2)
    streams = Streams(COUNTING[:size], length, batch, seed, steps=10_000)
    first = epoch * streams.steps_per_epoch
    for row in range(batch):
        items = [streams[step * batch + row] for step in range(first, first + streams.steps_per_epoch)]
        read = torch.cat([item["inputs"] for item in items])
        assert torch.equal(read, read[0] + torch.arange(len(read)))
        assert row * (size // batch) <= read[0] < row * (size // batch) + length
        assert items[-1]["targets"][-1] < (row + 1) * (size // batch)


def test_an_epoch_leaves_less_than_two_blocks_of_a_row_unread():
    for size in range(40, 60):
        streams = Streams(COUNTING[:size], length=5, batch=2, seed=0, steps=1)
        assert size // 2 - 5 * streams.steps_per_epoch < 10


def test_the_offset_varies_over_its_whole_range_between_epochs():
    streams = Streams(COUNTING, length=4, batch=3, seed=0, steps=100_000)
    assert {int(streams[3 * epoch * streams.steps_per_epoch]["inputs"][0]) for epoch in range(50)} == {0, 1, 2, 3}


def test_another_seed_gives_other_offsets():
    one, two = (
        [int(streams[3 * epoch * streams.steps_per_epoch]["inputs"][0]) for epoch in range(20)]
        for streams in (Streams(COUNTING, 10, 3, seed, steps=1000) for seed in (0, 1))
    )
    assert one != two


def test_an_item_is_the_same_whatever_was_read_before():
    streams = Streams(COUNTING, length=10, batch=3, seed=5, steps=40)
    in_order = [streams[index]["inputs"].tolist() for index in range(120)]
    mixed = np.random.default_rng(0).permutation(120)
    other = Streams(COUNTING, length=10, batch=3, seed=5, steps=40)
    assert [other[index]["inputs"].tolist() for index in mixed] == [in_order[index] for index in mixed]


def test_a_batch_that_spans_epochs_holds_what_the_items_hold():
    streams = Streams(COUNTING, length=10, batch=3, seed=5, steps=40)
    indices = [0, 26, 27, 28, 119, 54]
    assert [item["inputs"].tolist() for item in streams.__getitems__(indices)] == [
        streams[index]["inputs"].tolist() for index in indices
    ]


def test_a_resumed_loader_yields_what_the_first_one_had_left():
    streams = Streams(COUNTING, length=10, batch=3, seed=1, steps=20)
    rest = DataLoader(Subset(streams, range(3 * 7, 3 * 20)), batch_size=3)
    for one, two in zip(steps_of(streams)[7:], rest, strict=True):
        assert torch.equal(one["inputs"], two["inputs"])
        assert torch.equal(one["fresh"], two["fresh"])


def test_the_smallest_data_is_two_blocks_for_every_row():
    assert Streams(COUNTING[:60], length=10, batch=3, seed=0, steps=1).steps_per_epoch == 1
    with pytest.raises(
        ValueError, match="data: found 59 symbols, needed at least 60 for 3 rows of blocks of length 10"
    ):
        Streams(COUNTING[:59], length=10, batch=3, seed=0, steps=1)


@pytest.mark.parametrize(
    ("argument", "value"), [("length", 0), ("batch", 0), ("batch", -1), ("seed", -1), ("steps", -1)]
)
def test_an_argument_out_of_range_is_named_with_its_value(argument, value):
    arguments = {"length": 8, "batch": 3, "seed": 0, "steps": 1, argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected at least .* got {value}$"):
        Streams(COUNTING, **arguments)


@pytest.mark.parametrize("index", [-1, 15])
def test_an_index_out_of_range_is_named_with_the_count(index):
    with pytest.raises(IndexError, match=rf"0 <= index < 15 \(steps \* batch\), got {index}"):
        Streams(COUNTING, 10, 3, 0, steps=5)[index]


def test_data_that_is_no_array_of_integers_is_refused():
    with pytest.raises(TypeError, match="data: expected a 1-d array of integers, got dtype float64"):
        Streams(np.zeros(300), 10, 3, 0, 1)
    with pytest.raises(TypeError, match="data: expected a 1-d array of integers, got list"):
        stream_evaluation([1, 2, 3], length=2, batch=1)


def scored(blocks):
    """(input, target) of everything that is scored, row by row."""
    blocks = list(blocks)
    rows = range(len(blocks[0]["mask"]))
    return [
        (block["inputs"][row][block["mask"][row]].tolist(), block["targets"][row][block["mask"][row]].tolist())
        for row in rows
        for block in blocks
    ]


@given(size=st.integers(1, 100), length=st.integers(1, 30), batch=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_exact_scores_every_symbol_once_after_the_one_that_stands_before_it(size, length, batch):
    data = COUNTING[1 : size + 1]
    pairs = scored(stream_evaluation(data, length, batch, before=0))
    assert [target for _, targets in pairs for target in targets] == data.tolist()
    assert [symbol for inputs, _ in pairs for symbol in inputs] == [0, *data[:-1].tolist()]


@given(size=st.integers(2, 100), length=st.integers(1, 30), batch=st.integers(1, 12), exact=st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_a_row_reads_in_a_block_follows_what_it_read_in_the_one_before(size, length, batch, exact):
    batch = min(batch, size // 2)
    length = min(length, size // batch - 1)
    blocks = list(stream_evaluation(COUNTING[:size], length, batch, exact=exact))
    for one, two in itertools.pairwise(blocks):
        real = two["mask"][:, 0]
        assert torch.equal(two["inputs"][real, 0], one["targets"][real, -1])


def test_only_the_last_block_is_masked_and_padded_with_zeros():
    blocks = list(stream_evaluation(COUNTING[1:24], length=4, batch=2, before=7))
    # Rows of 11 and 12 symbols.
    assert [int(block["mask"].sum()) for block in blocks] == [8, 8, 7]
    assert blocks[-1]["mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert blocks[-1]["inputs"][0].tolist() == [8, 9, 10, 0]
    assert blocks[-1]["targets"][0].tolist() == [9, 10, 11, 0]


def test_the_first_block_alone_is_fresh():
    blocks = list(stream_evaluation(COUNTING[:50], length=4, batch=3))
    assert [block["fresh"].tolist() for block in blocks] == [[number == 0] * 3 for number in range(len(blocks))]


def test_blocks_have_the_types_promised():
    block = next(iter(stream_evaluation(COUNTING[:50], length=4, batch=3)))
    assert block["inputs"].dtype == block["targets"].dtype == torch.int64
    assert block["mask"].dtype == block["fresh"].dtype == torch.bool
    assert block["inputs"].shape == block["targets"].shape == block["mask"].shape == (3, 4)


@given(size=st.integers(2, 100), length=st.integers(1, 30), batch=st.integers(1, 12), exact=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_number_of_blocks_and_of_scored_symbols_is_known_beforehand(size, length, batch, exact):
    batch = min(batch, size // 2)
    length = min(length, size // batch - 1)
    blocks = stream_evaluation(COUNTING[:size], length, batch, exact=exact)
    found = list(blocks)
    assert len(blocks) == len(found)
    assert blocks.count == sum(int(block["mask"].sum()) for block in found)


def test_more_rows_than_symbols_are_not_made():
    blocks = list(stream_evaluation(COUNTING[1:3], length=4, batch=5, before=9))
    assert len(blocks) == 1
    assert blocks[0]["inputs"].tolist() == [[9, 0, 0, 0], [1, 0, 0, 0]]


def lineage_loop(data, length, batch):
    """What the family's evaluation scores, step by step: rows, then blocks until none is left whole."""
    row_length = len(data) // batch
    rows = data[: row_length * batch].reshape(batch, row_length)
    place, targets = 0, []
    while True:
        targets.append(rows[:, place + 1 : place + 1 + length])
        place += length
        if place >= row_length - length:
            return targets


@given(size=st.integers(2, 100), length=st.integers(1, 30), batch=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_lineage_scores_what_the_loop_of_the_family_scores(size, length, batch):
    batch = min(batch, size // 2)
    length = min(length, size // batch - 1)
    data = COUNTING[:size]
    blocks = list(stream_evaluation(data, length, batch, exact=False))
    assert [block["targets"].tolist() for block in blocks] == [
        targets.tolist() for targets in lineage_loop(data, length, batch)
    ]
    assert all(block["mask"].all() for block in blocks)


@pytest.mark.parametrize(("size", "count"), [(217_646, 48 * 8 * 512), (245_569, 48 * 9 * 512)])
def test_lineage_drops_a_tenth_of_wikitext_103(size, count):
    # Rows of 4534 and 5116: 8 and 9 whole blocks of 512 with a target ahead.
    blocks = stream_evaluation(np.zeros(size, dtype=np.int32), length=512, batch=48, exact=False)
    assert blocks.count == count
    assert 0.09 < 1 - count / size < 0.1


def test_lineage_refuses_data_without_a_whole_block():
    assert stream_evaluation(COUNTING[:33], length=10, batch=3, exact=False).count == 30
    with pytest.raises(ValueError, match="data: found 32 symbols, needed at least 33 for one whole block of length 10"):
        stream_evaluation(COUNTING[:32], length=10, batch=3, exact=False)


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="data: expected at least 1 symbol to evaluate, got none"):
        stream_evaluation(COUNTING[:0], length=3, batch=1)


@pytest.mark.parametrize(("argument", "value"), [("length", 0), ("batch", 0), ("before", -1)])
def test_an_evaluation_argument_out_of_range_is_named_when_it_is_given(argument, value):
    arguments = {"length": 8, "batch": 3, "before": 0, argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected at least .* got {value}$"):
        stream_evaluation(COUNTING, **arguments)
