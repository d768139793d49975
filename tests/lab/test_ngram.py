"""Witten-Bell n-grams over bytes, against hand-worked numbers and a slow dictionary implementation."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from sinkroute.lab import ngram
from sinkroute.lab.ngram import ngram_bits_per_byte, ngram_probabilities

TEXT = (
    b"It was the best of times, it was the worst of times, it was the age of wisdom, \xe2\x80\x94 it was the age "
    b"of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, "
)


def as_array(raw):
    return np.frombuffer(raw, dtype=np.uint8)


def dictionary_bits_per_byte(train, test, order, before):
    """The formula, one byte at a time."""
    followers = defaultdict(Counter)
    for k in range(order):
        for i in range(k, len(train)):
            followers[train[i - k : i]][train[i]] += 1

    def probability(history, byte):
        lower = probability(history[1:], byte) if history else 1 / 256
        counts = followers.get(history)
        if not counts:
            return lower
        return (counts[byte] + len(counts) * lower) / (counts.total() + len(counts))

    text = before + test
    bits = 0.0
    for i in range(len(before), len(text)):
        bits -= math.log2(probability(text[max(i - order + 1, 0) : i], text[i]))
    return bits / len(test)


def test_unigram_by_hand():
    # "aab": n(a) = 2, n(b) = 1, n = 3, T = 2; p(a) = (2 + 2/256) / 5, p(c) = (0 + 2/256) / 5.
    found = ngram_probabilities(as_array(b"aab"), as_array(b"ac"), order=1)
    np.testing.assert_allclose(found, [(2 + 2 / 256) / 5, (2 / 256) / 5], rtol=1e-14)


def test_bigram_by_hand():
    # "aab": after a came a once and b once, n(a) = 2, T(a) = 2. p(b) = (1 + 2/256) / 5.
    # test "b" after "a": (1 + 2 p(b)) / 4. Then "a" after "b", which nothing followed: the unigram p(a).
    found = ngram_probabilities(as_array(b"aab"), as_array(b"ba"), order=2, before=b"a")
    np.testing.assert_allclose(found, [(1 + 2 * (1 + 2 / 256) / 5) / 4, (2 + 2 / 256) / 5], rtol=1e-14)


def test_trigram_by_hand():
    # "abac": unigram p(c) = (1 + 3/256) / 7; after a: b, c, so p(c|a) = (1 + 2 p(c)) / 4;
    # after "ba": c alone, so p(c|ba) = (1 + p(c|a)) / 2.
    unigram = (1 + 3 / 256) / 7
    expected = (1 + (1 + 2 * unigram) / 4) / 2
    found = ngram_probabilities(as_array(b"abac"), as_array(b"c"), order=3, before=b"ba")
    np.testing.assert_allclose(found, [expected], rtol=1e-14)


def test_bits_are_the_mean_of_minus_log2_of_the_probabilities():
    found = ngram_bits_per_byte(as_array(b"aab"), as_array(b"ac"), order=1)
    expected = -(math.log2((2 + 2 / 256) / 5) + math.log2((2 / 256) / 5)) / 2
    assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("before", [b"", b"\n", b"it was "])
def test_agrees_with_the_dictionary_implementation(order, before):
    train, test = TEXT[:150], TEXT[130:] + b"unseen \xff\x00"
    expected = dictionary_bits_per_byte(train, test, order, before)
    assert ngram_bits_per_byte(as_array(train), as_array(test), order, before) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_over_the_256_continuations(order):
    generator = np.random.default_rng(0)
    train = as_array(TEXT)
    # Histories that the text holds, and random ones that it mostly does not.
    places = generator.integers(len(train) - 2, size=20)
    histories = np.concatenate([train[places[:, None] + np.arange(2)], generator.integers(256, size=(20, 2))])
    # Every history before each of the 256 bytes; every third byte of the run is the continuation.
    test = np.empty((len(histories), 256, 3), dtype=np.uint8)
    test[:, :, :2] = histories[:, None]
    test[:, :, 2] = np.arange(256)
    found = ngram_probabilities(train, test.reshape(-1), order).reshape(len(histories), 256, 3)[:, :, 2]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)


def test_all_bytes_equally_often_cost_eight_bits_in_the_unigram():
    data = np.tile(np.arange(256, dtype=np.uint8), 10)
    assert ngram_bits_per_byte(data, data, order=1) == pytest.approx(8, abs=1e-12)


def test_all_pairs_equally_often_cost_eight_bits_in_the_bigram():
    # The round 0 0 1 0 2 ... 0 255 1 1 2 1 3 ... 255 holds each of the 65,536 pairs once when it is closed by a 0.
    ring = [byte for i in range(256) for byte in [i, *(b for j in range(i + 1, 256) for b in (i, j))]]
    data = np.array([*ring, 0], dtype=np.uint8)
    pairs = data[:-1].astype(int) * 256 + data[1:]
    assert np.array_equal(np.sort(pairs), np.arange(65536))
    # Not exact: the closing byte makes 0 once more frequent than the others.
    assert ngram_bits_per_byte(data, data, order=2, before=b"") == pytest.approx(8, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_order_beats_eight_bits_on_fresh_random_bytes(order):
    data = np.random.default_rng(0).integers(256, size=60_000, dtype=np.uint8)
    assert ngram_bits_per_byte(data[:30_000], data[30_000:], order) > 8


def test_a_longer_history_helps_on_text():
    train, test = as_array(TEXT * 3), as_array(TEXT)
    bits = [ngram_bits_per_byte(train, test, order) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counts_do_not_depend_on_the_chunks(monkeypatch, order):
    whole = ngram_probabilities(as_array(TEXT), as_array(TEXT), order)
    monkeypatch.setattr(ngram, "_CHUNK", 50)
    assert np.array_equal(ngram_probabilities(as_array(TEXT), as_array(TEXT), order), whole)


def test_training_text_shorter_than_the_order_falls_back_to_the_unigram():
    found = ngram_probabilities(as_array(b"a"), as_array(b"aa"), order=3)
    np.testing.assert_allclose(found, (1 + 1 / 256) / 2, rtol=1e-14)


@pytest.mark.parametrize("order", [0, 4, 2.5, "2"])
def test_an_order_outside_one_to_three_is_refused(order):
    with pytest.raises(ValueError, match=r"order: expected 1, 2 or 3 .*got "):
        ngram_bits_per_byte(as_array(TEXT), as_array(TEXT), order)


@pytest.mark.parametrize("argument", ["train", "test"])
def test_an_empty_array_is_refused(argument):
    arguments = {"train": as_array(TEXT), "test": as_array(TEXT), argument: as_array(b"")}
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1 byte, got none"):
        ngram_bits_per_byte(**arguments, order=2)


@pytest.mark.parametrize("argument", ["train", "test"])
def test_an_array_that_is_not_uint8_is_refused(argument):
    arguments = {"train": as_array(TEXT), "test": as_array(TEXT), argument: as_array(TEXT).astype(np.int64)}
    with pytest.raises(TypeError, match=f"{argument}: expected a 1-d uint8 array, got dtype int64"):
        ngram_bits_per_byte(**arguments, order=2)
