"""The source code of Python as a corpus, and a corpus whose training changes its text on the way."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from sinkroute.lab.config import Config, from_mapping
from sinkroute.lab.data import Vocabulary, encoded_corpus, load_corpus, split_corpus, switched_corpus
from sinkroute.lab.tasks import load_data

LONG = b"def f(x):\n    return x\n" * 2000


@pytest.fixture
def library(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def whole(corpus):
    return b"".join(split.tobytes() for split in (corpus.train, corpus.valid, corpus.test))


def test_modules_are_joined_by_newlines_in_the_order_of_their_paths(library):
    for name in ("b.py", "a/z.py", "a/b/c.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(name.encode() + LONG)
    expected = b"\n".join(name + LONG for name in (b"a/b/c.py", b"a/z.py", b"b.py"))
    assert whole(load_corpus("stdlib")) == expected


@pytest.mark.parametrize(
    "stranger",
    ["site-packages/x.py", "test/x.py", "a/tests/x.py", "encodings/x.py", "_sysconfigdata__linux.py", "x.so", "x.txt"],
)
def test_what_is_no_source_of_the_library_is_left_out(library, stranger):
    (library / "a.py").write_bytes(LONG)
    (library / stranger).parent.mkdir(parents=True, exist_ok=True)
    (library / stranger).write_bytes(b"left out" + LONG)
    assert whole(load_corpus("stdlib")) == LONG


def test_the_source_names_the_version_and_no_path_of_the_machine():
    source = load_corpus("stdlib").source
    assert source.startswith("Python 3.") and source.endswith(" modules") and "/" not in source


def test_a_path_is_refused():
    with pytest.raises(ValueError, match="'stdlib' is part of Python and takes no path, got 'lib'"):
        load_corpus("stdlib", "lib")


def test_a_python_without_source_code_is_told(library):
    with pytest.raises(FileNotFoundError, match="holds no source code; take a Python that is installed whole"):
        load_corpus("stdlib")


def test_a_switched_corpus_is_evaluated_on_its_second_text_and_known_by_both():
    first, then = (split_corpus(name, f"of {name}", name.encode() * 9000) for name in ("one", "two"))
    corpus = switched_corpus(first, then)
    assert corpus.first is first.train and corpus.train is then.train and corpus.test is then.test
    assert (corpus.name, corpus.source) == ("one, then two", "of one; then of two")
    assert len({corpus.sha256, first.sha256, then.sha256, switched_corpus(then, first).sha256}) == 4


def test_texts_of_other_symbols_are_refused():
    words = encoded_corpus("words", "drawn", Vocabulary(("a", "b")), *np.zeros((3, 9), dtype=int))
    with pytest.raises(ValueError, match=r"data\.switch_to='words' has other symbols than 'bytes': 2 and 256"):
        switched_corpus(split_corpus("bytes", "drawn", LONG), words)


def test_a_second_text_that_needs_a_path_is_refused(library):
    (library / "a.py").write_bytes(LONG)
    config = from_mapping(Config, {"data": {"name": "stdlib", "switch_to": "text", "switch_at": 5}})
    with pytest.raises(ValueError, match=r"data\.switch_to must name a text that needs no path: "):
        load_data(config)
