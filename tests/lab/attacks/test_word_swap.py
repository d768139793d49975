"""Word swap: a share of the words becomes `AAA`, all else stays."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.lab.attacks import attack_text
from sinkroute.lab.data import Vocabulary

WORD = re.compile(rb"[A-Za-z\x80-\xff]+")
# Much of it words, digits, spaces and UTF-8, so that runs of letters meet their borders often.
TEXTS = st.one_of(st.binary(max_size=200), st.text(alphabet="aZ éß中 .1\n", max_size=200).map(str.encode))
RATES = st.floats(0, 1)
SEEDS = st.integers(0, 2**32)


def swap(text, seed=0, **options):
    return attack_text("word-swap", text, seed, **options).tobytes()


@given(TEXTS, RATES, SEEDS)
def test_everything_between_the_words_is_byte_identical(text, rate, seed):
    assert WORD.split(swap(text, seed, rate=rate)) == WORD.split(text)


@given(TEXTS, RATES, SEEDS)
def test_each_word_stays_or_becomes_the_replacement(text, rate, seed):
    after = WORD.findall(swap(text, seed, rate=rate))
    assert all(new in (old, b"AAA") for old, new in zip(WORD.findall(text), after, strict=True))


@given(st.lists(st.sampled_from([b"moss", "grün".encode(), b"x"]), max_size=60), RATES, SEEDS)
def test_exactly_the_rounded_share_of_the_words_is_replaced(words, rate, seed):
    after = swap(b" ".join(words), seed, rate=rate).split()
    assert after.count(b"AAA") == round(rate * len(words))


@given(TEXTS, SEEDS)
def test_rate_zero_changes_nothing(text, seed):
    assert swap(text, seed, rate=0.0) == text


@given(TEXTS)
def test_rate_one_replaces_every_word(text):
    assert swap(text, rate=1.0) == WORD.sub(b"AAA", text)


@given(TEXTS, RATES, SEEDS)
def test_the_same_seed_gives_the_same_bytes(text, rate, seed):
    assert swap(text, seed, rate=rate) == swap(text, seed, rate=rate)


def test_another_seed_chooses_other_words():
    text = b" ".join(b"word%d" % number for number in range(1000))
    assert swap(text, 0) != swap(text, 1)


def test_the_default_rate_replaces_25_of_1000_words():
    assert swap(b"word " * 1000).split().count(b"AAA") == 25


def test_chosen_words_lie_all_over_the_text():
    # 250 of 1000 words: about 62 in each quarter, standard deviation 6.
    after = swap(b"word " * 1000, rate=0.25).split()
    quarters = [after[start : start + 250].count(b"AAA") for start in range(0, 1000, 250)]
    assert all(35 < count < 90 for count in quarters)


def test_digits_and_underscores_end_a_word():
    assert swap(b"abc1def_ghi", rate=1.0) == b"AAA1AAA_AAA"


def test_a_word_of_non_ascii_letters_is_replaced_whole():
    assert swap("naïve 東京!".encode(), rate=1.0) == b"AAA AAA!"


def test_text_without_words_comes_back():
    assert swap(b"1 + 1 = 2", rate=1.0) == b"1 + 1 = 2"


def test_empty_text_comes_back():
    assert swap(b"", rate=1.0) == b""


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate: expected a share of the words from 0 to 1, got {rate}"):
        swap(b"some words", rate=rate)


WORDS = Vocabulary(("<unk>", "moss", ".", "<eos>", "AAA", "fern"))
AAA, EOS = 4, 3
IDS = st.lists(st.integers(0, 5), max_size=100).map(lambda ids: np.array(ids, dtype=np.uint8))


def swap_ids(ids, seed=0, vocabulary=WORDS, **options):
    return attack_text("word-swap", ids, seed, vocabulary, **options)


@given(IDS, RATES, SEEDS)
def test_each_id_stays_or_becomes_that_of_the_replacement_and_no_line_end_does(ids, rate, seed):
    after = swap_ids(ids, seed, rate=rate)
    assert after.dtype == ids.dtype
    assert ((after == ids) | (after == AAA)).all()
    assert np.array_equal(after == EOS, ids == EOS)


@pytest.mark.parametrize(("rate", "count"), [(0.01, 10), (0.025, 25), (0.05, 50), (0.1, 100), (0.0004, 0), (1, 1000)])
def test_exactly_the_rounded_share_of_the_word_ids_is_replaced(rate, count):
    # 1000 words, every third followed by the end of a line.
    ids = np.array([0, 1, 5, EOS] * 333 + [2], dtype=np.uint8)
    assert (swap_ids(ids, rate=rate) == AAA).sum() == count


def test_words_are_chosen_as_in_a_text_of_as_many_words():
    text = swap(b" ".join([b"moss"] * 1000), seed=3, rate=0.05).split()
    ids = swap_ids(np.full(1000, 1), seed=3, rate=0.05)
    assert [word == b"AAA" for word in text] == (ids == AAA).tolist()


def test_unknown_words_and_punctuation_are_words():
    assert swap_ids(np.array([0, 1, 2, EOS, 5]), rate=1.0).tolist() == [AAA, AAA, AAA, EOS, AAA]


def test_the_given_ids_are_not_changed():
    ids = np.array([0, 1, 2])
    swap_ids(ids, rate=1.0)
    assert ids.tolist() == [0, 1, 2]


def test_without_the_replacement_the_unknown_word_takes_its_place():
    assert swap_ids(np.array([1, 1]), vocabulary=Vocabulary(("<unk>", "moss")), rate=1.0).tolist() == [0, 0]


def test_without_either_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary: found neither 'AAA' nor '<unk>' among its 1 words"):
        swap_ids(np.array([0]), vocabulary=Vocabulary(("moss",)), rate=1.0)


def test_a_vocabulary_without_line_ends_has_words_only():
    assert swap_ids(np.array([1, 0]), vocabulary=Vocabulary(("AAA", "moss")), rate=1.0).tolist() == [0, 0]


@given(st.text(alphabet="aA .\n", max_size=200).map(str.encode), RATES, SEEDS)
def test_symbols_that_are_bytes_are_swapped_as_their_bytes_are(text, rate, seed):
    values = b"\n .Aa"
    vocabulary = Vocabulary(("<eos>", *map(str, values[1:])), values)
    ids = vocabulary.from_bytes(np.frombuffer(text, dtype=np.uint8))
    after = swap_ids(ids, seed, vocabulary, rate=rate)
    assert after.dtype == ids.dtype
    assert vocabulary.to_bytes(after).tobytes() == swap(text, seed, rate=rate)


def test_symbols_that_lack_the_letter_of_the_replacement_are_refused():
    vocabulary = Vocabulary(("97",), b"a")
    with pytest.raises(ValueError, match="data: byte 65 is not among the 1 symbols"):
        swap_ids(np.array([0, 0]), vocabulary=vocabulary, rate=1.0)


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused_on_ids_too(rate):
    with pytest.raises(ValueError, match=f"rate: expected a share of the words from 0 to 1, got {rate}"):
        swap_ids(np.array([0]), rate=rate)
