"""enwik8 as 205 symbols, on a small stand-in: the published size, hash and count are replaced by the stand-in's."""

import hashlib

import numpy as np
import pytest

from sinkroute.lab.data import load_corpus

CONTENT = b"".join(b"<page><id>%d</id>\xc3\xa9t\xc3\xa9</page>\n" % number for number in range(2000))
SYMBOLS = len(set(CONTENT))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("sinkroute.lab.data.enwik8.ENWIK8_BYTES", len(CONTENT))
    monkeypatch.setattr("sinkroute.lab.data.enwik8.ENWIK8_SHA1", hashlib.sha1(CONTENT).hexdigest())
    monkeypatch.setattr("sinkroute.lab.data.enwik8_symbols.ENWIK8_SYMBOLS", SYMBOLS)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "enwik8"
    file.write_bytes(CONTENT)
    return file


def prepared(split):
    """What the family reads from its prepared text: decimal codes split by spaces, `<eos>` for each line break."""
    lines = " ".join("\n" if byte == 10 else str(byte) for byte in split).split("\n")
    return [word for line in lines for word in [*line.split(), "<eos>"]][:-1]


def test_the_words_are_those_of_the_family_in_first_seen_order(file):
    corpus = load_corpus("enwik8-symbols", file)
    train, valid, test = (prepared(split.tobytes()) for split in plain(file))
    for found, words in ((corpus.train, train), (corpus.valid, valid), (corpus.test, test)):
        assert [corpus.vocabulary.words[place] for place in found] == words
    assert corpus.vocabulary.words == tuple(dict.fromkeys(train))
    assert corpus.symbols == SYMBOLS
    assert corpus.train.dtype == np.uint8


def test_the_bytes_come_back_split_as_enwik8_is(file):
    corpus = load_corpus("enwik8-symbols", file)
    for found, expected in zip((corpus.train, corpus.valid, corpus.test), plain(file), strict=True):
        assert corpus.vocabulary.to_bytes(found).tobytes() == expected.tobytes()


def plain(file):
    corpus = load_corpus("enwik8", file)
    return corpus.train, corpus.valid, corpus.test


def test_another_number_of_symbols_is_refused(file, monkeypatch):
    monkeypatch.setattr("sinkroute.lab.data.enwik8_symbols.ENWIK8_SYMBOLS", 205)
    with pytest.raises(ValueError, match=f"expected 205 different bytes, found {SYMBOLS}"):
        load_corpus("enwik8-symbols", file)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "enwik8").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match="is not enwik8: expected sha1"):
        load_corpus("enwik8-symbols", tmp_path / "enwik8")


def test_no_path_names_this_corpus():
    with pytest.raises(ValueError, match="path: corpus 'enwik8-symbols' needs a file, got None; download it from"):
        load_corpus("enwik8-symbols")
