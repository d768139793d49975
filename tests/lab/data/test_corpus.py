"""The 90/5/5 split, corpora of ids and the registry."""

import hashlib

import numpy as np
import pytest

from sinkroute.lab.data import (
    CORPORA,
    MIN_SPLIT_BYTES,
    Vocabulary,
    encoded_corpus,
    list_corpora,
    load_corpus,
    split_corpus,
)

SMALLEST = 20 * MIN_SPLIT_BYTES


def test_splits_are_90_5_5_percent_in_order():
    content = np.random.default_rng(0).integers(256, size=100_007, dtype=np.uint8).tobytes()
    corpus = split_corpus("text", "random bytes", content)
    # 0.90 * 100,007 = 90,006.3 and 0.95 * 100,007 = 95,006.65, both rounded down.
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (90_006, 5_000, 5_001)
    assert corpus.train.tobytes() + corpus.valid.tobytes() + corpus.test.tobytes() == content


def test_digest_is_that_of_the_whole_content():
    content = b"abc" * 10_000
    assert split_corpus("text", "abc", content).sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_splits_are_one_dimensional_uint8_and_read_only(split):
    array = getattr(split_corpus("text", "zeros", bytes(SMALLEST)), split)
    assert array.dtype == np.uint8
    assert array.ndim == 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_smallest_corpus_holds_the_minimum_in_valid_and_test():
    corpus = split_corpus("text", "zeros", bytes(SMALLEST))
    assert len(corpus.valid) == len(corpus.test) == MIN_SPLIT_BYTES


def test_one_byte_less_than_the_smallest_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="found 20,479 bytes, needed at least 20,480"):
        split_corpus("text", "zeros", bytes(SMALLEST - 1))


def test_corpora_are_equal_when_their_content_is():
    one, same, other = (split_corpus("text", "a file", bytes([byte]) * SMALLEST) for byte in (1, 1, 2))
    assert one == same
    assert one != other
    assert hash(one) == hash(same)


def test_unknown_corpus_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="unknown corpus 'wikpedia'; did you mean 'wikipedia'"):
        load_corpus("wikpedia")


def test_a_registered_loader_gets_the_path(monkeypatch):
    monkeypatch.setitem(CORPORA, "echo", lambda path: split_corpus("echo", str(path), bytes(SMALLEST)))
    assert load_corpus("echo", "here").source == "here"
    assert "echo" in list_corpora()


def test_bytes_are_256_symbols_without_a_vocabulary():
    corpus = split_corpus("text", "zeros", bytes(SMALLEST))
    assert corpus.symbols == 256
    assert corpus.vocabulary is None


WORDS = Vocabulary(tuple(f"word{number}" for number in range(300)))


def encoded(train=(0, 299), valid=(1,), test=(2,), vocabulary=WORDS):
    return encoded_corpus("words", "a list", vocabulary, *map(np.array, (train, valid, test)))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_splits_of_ids_are_of_the_smallest_type_and_read_only(split):
    array = getattr(encoded(), split)
    assert array.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_the_given_array_stays_writable():
    train = np.array([0, 1], dtype=np.uint16)
    encoded_corpus("words", "a list", WORDS, train, train, train)
    train[0] = 2


def test_symbols_are_the_words_of_the_vocabulary():
    assert encoded().symbols == 300
    assert encoded().vocabulary is WORDS


@pytest.mark.parametrize(
    "other",
    [
        {"train": (0, 298)},
        {"valid": (3,)},
        {"test": (3,)},
        {"train": (0,), "valid": (299, 1)},
        {"vocabulary": Vocabulary((*WORDS.words[:-1], "moss"))},
        {"vocabulary": Vocabulary((*WORDS.words, "moss"))},
    ],
)
def test_another_content_split_or_vocabulary_is_another_corpus(other):
    assert encoded(**other) != encoded()
    assert encoded() == encoded()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("ids", [(0, 300), (-1, 0)])
def test_an_id_that_the_vocabulary_lacks_is_refused(split, ids):
    with pytest.raises(ValueError, match=f"{split}: found ids from {ids[0]} to {ids[1]}, expected 0 to 299"):
        encoded(**{split: ids})


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match=r"valid: corpus 'words' \(a list\) has no symbols in this split"):
        encoded(valid=np.array([], dtype=int))
