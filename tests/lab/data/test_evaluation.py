"""Evaluation windows: each byte predicted exactly once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.lab.data import evaluation_windows


def as_array(raw):
    return np.frombuffer(raw, dtype=np.uint8)


@given(raw=st.binary(min_size=1, max_size=200), length=st.integers(1, 50), before=st.integers(0, 255))
def test_the_real_targets_are_the_data_and_their_inputs_the_byte_before(raw, length, before):
    inputs, targets, mask = evaluation_windows(as_array(raw), length, before)
    assert targets[mask].tobytes() == raw
    assert inputs[mask].tobytes() == bytes([before]) + raw[:-1]


@given(raw=st.binary(min_size=1, max_size=200), length=st.integers(1, 50))
def test_only_the_end_of_the_last_row_is_padding(raw, length):
    inputs, targets, mask = evaluation_windows(as_array(raw), length)
    assert mask[:-1].all()
    assert mask[-1, 0]
    assert not inputs[~mask].any()
    assert not targets[~mask].any()


def test_shapes_and_types_are_those_promised():
    inputs, targets, mask = evaluation_windows(as_array(b"abcdefghij"), length=4)
    assert inputs.shape == targets.shape == mask.shape == (3, 4)
    assert (inputs.dtype, targets.dtype, mask.dtype) == (np.uint8, np.uint8, np.bool_)


def test_a_newline_stands_before_the_data_by_default():
    inputs, _, _ = evaluation_windows(as_array(b"abc"), length=3)
    assert inputs[0].tobytes() == b"\nab"


def test_data_that_fills_its_rows_gets_no_extra_row():
    _, targets, mask = evaluation_windows(as_array(b"abcdef"), length=3)
    assert [row.tobytes() for row in targets] == [b"abc", b"def"]
    assert mask.all()


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="data: expected at least 1 symbol to evaluate, got none"):
        evaluation_windows(as_array(b""), length=3)


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length: expected at least 1 symbol per row, got 0"):
        evaluation_windows(as_array(b"abc"), length=0)


@pytest.mark.parametrize("before", [-1, 256])
def test_a_symbol_before_that_the_data_cannot_hold_is_refused(before):
    with pytest.raises(ValueError, match=rf"before: expected a symbol from 0 to 255 \(uint8\), got {before}"):
        evaluation_windows(as_array(b"abc"), length=3, before=before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_windows_keep_the_type_of_the_data(dtype):
    data = np.array([1, 200, 3], dtype=dtype)
    inputs, targets, _ = evaluation_windows(data, length=2, before=255)
    assert inputs.dtype == targets.dtype == dtype
    assert inputs.tolist() == [[255, 1], [200, 0]]


def test_a_symbol_before_may_be_any_word_id():
    inputs, _, _ = evaluation_windows(np.array([5], dtype=np.int32), length=1, before=267_734)
    assert inputs.tolist() == [[267_734]]
