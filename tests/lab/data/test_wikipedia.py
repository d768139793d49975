"""The Wikipedia dump head inside gensim."""

import bz2
import importlib.util
import sys

import pytest

from sinkroute.lab.data import load_corpus
from sinkroute.lab.data.wikipedia import WIKIPEDIA_FILE, WIKIPEDIA_SHA256

needs_gensim = pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="gensim is not installed")


@pytest.fixture
def fake_gensim(monkeypatch, tmp_path):
    """A package `gensim` that holds what a test puts into its data folder, in place of the real one."""
    folder = tmp_path / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    (tmp_path / "gensim" / "__init__.py").write_text("raise AssertionError('gensim was imported')")
    monkeypatch.delitem(sys.modules, "gensim", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    return folder


@needs_gensim
def test_the_dump_is_the_known_one_and_splits_90_5_5():
    corpus = load_corpus("wikipedia")
    assert corpus.sha256 == WIKIPEDIA_SHA256
    # 0.90 * 6,089,746 = 5,480,771.4 and 0.95 * 6,089,746 = 5,785,258.7, both rounded down.
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (5_480_771, 304_487, 304_488)
    assert corpus.train[:10].tobytes() == b"<mediawiki"
    assert corpus.test[-13:].tobytes() == b"</mediawiki>\n"


@needs_gensim
def test_the_source_names_gensim_and_the_file():
    source = load_corpus("wikipedia").source
    assert source.startswith("gensim 4.")
    assert source.endswith(WIKIPEDIA_FILE)


def test_a_path_is_refused():
    with pytest.raises(ValueError, match=r"path: 'wikipedia' ships inside gensim and takes no path, got 'dump\.xml'"):
        load_corpus("wikipedia", "dump.xml")


def test_without_gensim_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sinkroute\[lab\]"'):
        load_corpus("wikipedia")


def test_gensim_without_its_test_data_is_told_apart(fake_gensim):
    with pytest.raises(FileNotFoundError, match="without its test data"):
        load_corpus("wikipedia")


def test_another_content_is_refused_with_both_sizes(fake_gensim):
    (fake_gensim / WIKIPEDIA_FILE).write_bytes(bz2.compress(b"another dump"))
    with pytest.raises(ValueError, match=r"gensim 9\.9 .*Expected 6,089,746 bytes with sha256 34c1.*found 12 bytes"):
        load_corpus("wikipedia")
