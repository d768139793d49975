"""The one entrance to the attacks."""

import numpy as np
import pytest

from sinkroute.lab.attacks import ATTACKS, WORD_ATTACKS, attack_text, list_attacks
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


def test_a_registered_attack_runs_with_its_options_and_a_generator_of_the_seed(monkeypatch):
    def shift(data, generator, *, by=1):
        return data + np.uint8(by) + np.uint8(generator.integers(100))

    monkeypatch.setitem(ATTACKS, "shift", shift)
    draw = int(np.random.default_rng(7).integers(100))
    assert "shift" in list_attacks()
    assert attack_text("shift", b"\x00\x01", seed=7, by=2).tolist() == [draw + 2, draw + 3]


WORDS = Vocabulary(("to", "be", "<eos>", "AAA"))


def test_every_attack_on_words_is_one_on_bytes_too():
    assert WORD_ATTACKS.keys() <= ATTACKS.keys()


def test_an_attack_on_words_gets_the_vocabulary_its_options_and_a_generator_of_the_seed(monkeypatch):
    def shift(data, generator, vocabulary, *, by=1):
        return (data + by + generator.integers(100)) % len(vocabulary)

    monkeypatch.setitem(ATTACKS, "shift", lambda data, generator, *, other=0: data)
    monkeypatch.setitem(WORD_ATTACKS, "shift", shift)
    draw = int(np.random.default_rng(7).integers(100))
    found = attack_text("shift", np.array([0, 1]), seed=7, vocabulary=WORDS, by=2)
    assert found.tolist() == [(draw + 2) % 4, (draw + 3) % 4]
    with pytest.raises(ValueError, match="unknown shift option 'other'"):
        attack_text("shift", np.array([0, 1]), seed=7, vocabulary=WORDS, other=2)


def test_an_attack_on_bytes_alone_is_refused_on_words(monkeypatch):
    monkeypatch.setitem(ATTACKS, "typos", lambda data, generator: data)
    with pytest.raises(ValueError, match=r"attack 'typos' works on bytes, .* on words there are: word-swap"):
        attack_text("typos", np.array([0]), seed=0, vocabulary=WORDS)


def test_an_attack_on_bytes_alone_runs_on_symbols_that_are_bytes(monkeypatch):
    monkeypatch.setitem(ATTACKS, "reverse", lambda data, generator: data[::-1])
    symbols = Vocabulary(("99", "97"), b"ca")
    assert attack_text("reverse", np.array([0, 1, 1]), seed=0, vocabulary=symbols).tolist() == [1, 1, 0]


@pytest.mark.parametrize("data", [b"bytes", np.zeros(3)])
def test_words_that_are_no_ids_are_refused(data):
    with pytest.raises(TypeError, match="data: expected a 1-d array of integers, got"):
        attack_text("word-swap", data, seed=0, vocabulary=WORDS)
