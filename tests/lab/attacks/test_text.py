"""The one entrance to the attacks."""

import numpy as np
import pytest

from sinkroute.lab.attacks import attack_text
from sinkroute.lab.data import Vocabulary

TEXT = b"The attack concerns input and target alike."


def test_bytes_and_arrays_give_the_same():
    array = np.frombuffer(TEXT, dtype=np.uint8)
    assert np.array_equal(
        attack_text("word-swap", TEXT, seed=1, rate=0.5), attack_text("word-swap", array, seed=1, rate=0.5)
    )


def test_the_result_is_a_1d_uint8_array():
    found = attack_text("word-swap", TEXT, seed=1)
    assert found.dtype == np.uint8
    assert found.ndim == 1


def test_the_given_array_is_not_changed():
    array = np.frombuffer(TEXT, dtype=np.uint8).copy()
    attack_text("word-swap", array, seed=1, rate=1.0)
    assert array.tobytes() == TEXT


def test_an_unknown_attack_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown attack 'word_swap'; did you mean 'word-swap'"):
        attack_text("word_swap", TEXT, seed=0)


def test_an_unknown_option_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown word-swap option 'rates'; did you mean 'rate'"):
        attack_text("word-swap", TEXT, seed=0, rates=0.1)


def test_the_generator_is_no_option():
    with pytest.raises(ValueError, match="unknown word-swap option 'generator'"):
        attack_text("word-swap", TEXT, seed=0, generator=None)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        attack_text("word-swap", TEXT, seed=-1)


@pytest.mark.parametrize("data", ["a str", np.zeros(3)])
def test_data_that_is_neither_bytes_nor_uint8_is_refused(data):
    with pytest.raises(TypeError, match="data: expected a 1-d uint8 array, got"):
        attack_text("word-swap", data, seed=0)


WORDS = Vocabulary(("to", "be", "<eos>", "AAA"))


def test_symbols_that_are_bytes_are_attacked_as_bytes():
    symbols = Vocabulary(("97", "32", "65"), b"a A")
    assert attack_text("word-swap", np.array([0, 0, 1, 0]), seed=0, vocabulary=symbols, rate=1.0).tolist() == [
        *(2, 2, 2),
        1,
        *(2, 2, 2),
    ]


@pytest.mark.parametrize("data", [b"bytes", np.zeros(3)])
def test_words_that_are_no_ids_are_refused(data):
    with pytest.raises(TypeError, match="data: expected a 1-d array of integers, got"):
        attack_text("word-swap", data, seed=0, vocabulary=WORDS)
