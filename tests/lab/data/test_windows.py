"""Training windows in a keyed order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from sinkroute.lab.data import Windows

# Byte i holds i, so that a window's first byte is its place in the data.
COUNTING = np.arange(250, dtype=np.uint8)


def starts(windows, indices):
    return [int(windows[index]["inputs"][0]) for index in indices]


def test_an_item_is_a_run_of_bytes_and_the_same_run_one_byte_later():
    item = Windows(COUNTING, length=16, seed=0, count=1)[0]
    first = int(item["inputs"][0])
    assert item["inputs"].tolist() == list(range(first, first + 16))
    assert item["targets"].tolist() == list(range(first + 1, first + 17))
    assert item["inputs"].dtype == item["targets"].dtype == torch.int64


def test_writing_into_the_inputs_leaves_the_targets_alone():
    item = Windows(COUNTING, length=16, seed=0, count=1)[0]
    before = item["targets"].clone()
    item["inputs"].zero_()
    assert torch.equal(item["targets"], before)


@given(size=st.integers(2, 250), length=st.integers(1, 60), seed=st.integers(0, 5), epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_epoch_reads_each_window_of_its_phase_once(size, length, seed, epoch):
    length = min(length, size // 2)
    windows = Windows(COUNTING[:size], length, seed, count=2000)
    per_epoch = windows.windows_per_epoch
    found = sorted(starts(windows, range(epoch * per_epoch, (epoch + 1) * per_epoch)))
    assert per_epoch == (size - 1 - (length - 1)) // length
    assert 0 <= found[0] < length
    assert found == [found[0] + length * i for i in range(per_epoch)]


def test_the_phase_varies_over_its_whole_range_between_epochs():
    windows = Windows(COUNTING, length=4, seed=0, count=100_000)
    phases = {starts(windows, [epoch * windows.windows_per_epoch])[0] % 4 for epoch in range(50)}
    assert phases == {0, 1, 2, 3}


def test_the_order_within_an_epoch_is_shuffled_and_differs_between_epochs():
    windows = Windows(COUNTING, length=4, seed=0, count=1000)
    per_epoch = windows.windows_per_epoch
    first, second = (np.array(starts(windows, range(e * per_epoch, (e + 1) * per_epoch))) // 4 for e in (0, 1))
    assert first.tolist() != sorted(first)
    assert first.tolist() != second.tolist()


def test_another_seed_gives_another_order():
    one, two = (starts(Windows(COUNTING, 4, seed, count=50), range(50)) for seed in (0, 1))
    assert one != two


def test_an_item_is_the_same_whatever_was_read_before():
    length, count = 8, 200
    in_order = starts(Windows(COUNTING, length, 3, count), range(count))
    mixed = np.random.default_rng(0).permutation(count)
    windows = Windows(COUNTING, length, 3, count)
    assert starts(windows, mixed) == [in_order[index] for index in mixed]


def test_the_loader_yields_the_items_in_order_across_epochs():
    windows = Windows(COUNTING, length=50, seed=1, count=10)  # 4 windows an epoch: batches of 3 straddle epochs
    assert windows.windows_per_epoch == 4
    batches = list(DataLoader(windows, batch_size=3))
    assert [batch["inputs"].shape for batch in batches] == [(3, 50), (3, 50), (3, 50), (1, 50)]
    assert torch.cat([batch["inputs"] for batch in batches])[:, 0].tolist() == starts(windows, range(10))


def test_a_resumed_loader_yields_what_the_first_one_had_left():
    whole = [batch["inputs"] for batch in DataLoader(Windows(COUNTING, 8, 1, 100), batch_size=10)]
    rest = DataLoader(Subset(Windows(COUNTING, 8, 1, 100), range(40, 100)), batch_size=10)
    assert all(torch.equal(one, two) for one, two in zip(whole[4:], (b["inputs"] for b in rest), strict=True))


def test_a_data_set_may_hold_no_window():
    assert len(Windows(COUNTING, 8, 0, count=0)) == 0


def test_the_smallest_data_is_two_windows_long():
    windows = Windows(COUNTING[:20], length=10, seed=0, count=50)
    assert all(0 <= start < 10 for start in starts(windows, range(50)))


def test_shorter_data_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="data: found 19 symbols, needed at least 20 for windows of length 10"):
        Windows(COUNTING[:19], length=10, seed=0, count=1)


@pytest.mark.parametrize(("argument", "value"), [("length", 0), ("length", -3), ("seed", -1), ("count", -1)])
def test_an_argument_out_of_range_is_named_with_its_value(argument, value):
    arguments = {"length": 8, "seed": 0, "count": 1, argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected at least .* got {value}$"):
        Windows(COUNTING, **arguments)


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_an_index_out_of_range_is_named_with_the_count(index):
    with pytest.raises(IndexError, match=rf"0 <= index < 5 \(count\), got {index}"):
        Windows(COUNTING, 8, 0, count=5)[index]


@pytest.mark.parametrize("data", [b"bytes" * 10, COUNTING.astype(np.float32)])
def test_data_that_is_no_array_of_integers_is_refused(data):
    with pytest.raises(TypeError, match="data: expected a 1-d array of integers, got"):
        Windows(data, 8, 0, 1)


def test_data_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"data: expected a 1-d array of integers, got shape \(25, 10\)"):
        Windows(COUNTING.reshape(25, 10), 8, 0, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_items_are_int64_whatever_integers_the_data_holds(dtype):
    item = Windows(COUNTING.astype(dtype), 8, 0, count=1)[0]
    expected = Windows(COUNTING, 8, 0, count=1)[0]
    for key in ("inputs", "targets"):
        assert item[key].dtype == torch.int64
        assert torch.equal(item[key], expected[key])
