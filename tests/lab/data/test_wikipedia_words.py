"""The articles of the Wikipedia dump head as words."""

import bz2
import importlib.util
import itertools
import sys
from collections import Counter

import numpy as np
import pytest

from sinkroute.lab.data import load_corpus
from sinkroute.lab.data.wikipedia import WIKIPEDIA_FILE
from sinkroute.lab.data.wikipedia_words import split_words, train_vocabulary

needs_gensim = pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="gensim is not installed")

SIZES = (510_662, 24_476, 33_308, 13_564)
DIGEST = "b268572520f3dcbfa750f018da53279b910b314d6c63ebb2d677ede1f082809f"


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("wikipedia-words")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Moss grows, slowly.", "Moss grows , slowly ."),
        ("state-of-the-art", "state @-@ of @-@ the @-@ art"),
        ("1,024,000 or 3.14", "1 @,@ 024 @,@ 000 or 3 @.@ 14"),
        ("in 1990, 12 men", "in 1990 , 12 men"),
        ("a - b, -5, x-", "a - b , - 5 , x -"),
        ("Plato's don't ’tis the dogs'", "Plato 's don 't ’ tis the dogs '"),
        ("U.S. (e.g. 5%)", "U . S . ( e . g . 5 % )"),
        ("naïve 東京 Ἀθῆναι", "naïve 東京 Ἀθῆναι"),
        ("", ""),
    ],
)
def test_words_are_split_wikitexts_way(text, words):
    assert split_words(text) == words.split()


def test_words_seen_less_than_three_times_share_unk_in_first_seen_order():
    vocabulary = train_vocabulary(["a", "b", "a", "c", "b", "a", "b", "AAA", "d"])
    # c, AAA and d are rare: the place of c is that of <unk>.
    assert vocabulary.words == ("a", "b", "<unk>", "AAA")


def test_unk_is_there_where_no_word_is_rare():
    assert train_vocabulary(["AAA"] * 3 + ["a"] * 3).words == ("AAA", "a", "<unk>")


@needs_gensim
def test_sizes_and_digest_are_the_known_ones(corpus):
    assert (len(corpus.train), len(corpus.valid), len(corpus.test), corpus.symbols) == SIZES
    assert corpus.sha256 == DIGEST
    assert corpus.train.dtype == np.uint16


@needs_gensim
def test_the_text_reads_as_wikitext_does(corpus):
    text = " ".join(corpus.vocabulary.words[place] for place in corpus.train[:60])
    assert text.startswith("= Anarchism = <eos> Anarchism is a political philosophy that advocates self @-@ governed")


@needs_gensim
def test_every_split_begins_with_a_title_and_ends_with_a_line(corpus):
    marks = [corpus.vocabulary.id(word) for word in ("=", "<eos>")]
    for split in (corpus.train, corpus.valid, corpus.test):
        assert [split[0], split[-1]] == marks


@needs_gensim
def test_a_word_is_in_the_vocabulary_from_three_times_in_train_on(corpus):
    counts = np.bincount(corpus.train, minlength=corpus.symbols)
    rare = [word for word, count in zip(corpus.vocabulary.words, counts, strict=True) if count < 3]
    assert rare in ([], ["AAA"])


@needs_gensim
def test_the_word_that_attacks_write_has_an_id(corpus):
    assert corpus.vocabulary.id("AAA") is not None


@needs_gensim
def test_no_markup_is_left(corpus):
    words = [corpus.vocabulary.words[place] for place in corpus.train]
    pairs = Counter(itertools.pairwise(words))
    # One link of the dump is closed by a wrong bracket.
    assert pairs["[", "["] <= 1
    assert not [
        pair for pair in (("]", "]"), ("{", "{"), ("}", "}"), ("{", "|"), ("|", "}"), ("<", "/")) if pairs[pair]
    ]
    assert not {"http", "ref", "nbsp", "px", "wikitable", "colspan"} & set(words)


def test_a_path_is_refused():
    with pytest.raises(ValueError, match=r"path: 'wikipedia-words' ships .* takes no path, got 'a\.xml'"):
        load_corpus("wikipedia-words", "a.xml")


def test_another_content_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    (tmp_path / "gensim" / "__init__.py").write_text("raise AssertionError('gensim was imported')")
    monkeypatch.delitem(sys.modules, "gensim", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    (folder / WIKIPEDIA_FILE).write_bytes(bz2.compress(b"another dump"))
    with pytest.raises(ValueError, match=r"corpus 'wikipedia-words': gensim 9\.9 holds another text"):
        load_corpus("wikipedia-words")
