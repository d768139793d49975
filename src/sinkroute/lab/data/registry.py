"""The corpora by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sinkroute._errors import unknown_name
from sinkroute.lab.data.corpus import Corpus
from sinkroute.lab.data.enwik8 import load_enwik8
from sinkroute.lab.data.text import load_text
from sinkroute.lab.data.wikipedia import load_wikipedia

__all__ = ["CORPORA", "list_corpora", "load_corpus"]

CORPORA: dict[str, Callable[[str | Path | None], Corpus]] = {
    "enwik8": load_enwik8,
    "text": load_text,
    "wikipedia": load_wikipedia,
}
"""Name -> loader; a loader takes the `path` of `load_corpus` and returns a `Corpus`."""


def list_corpora() -> list[str]:
    """The names that `load_corpus` knows, sorted.

    >>> list_corpora()
    ['enwik8', 'text', 'wikipedia']
    """
    return sorted(CORPORA)


def load_corpus(name: str, path: str | Path | None = None) -> Corpus:
    """Load a corpus by name.

    Args:
        name: "wikipedia" (ships inside gensim, needs no path), "text" (any text file or folder), or "enwik8".
        path: Where the bytes are: a file or folder for "text"; `enwik8.zip`, or the file in it, for "enwik8".

    Raises:
        ValueError: `name` is unknown; `path` is missing, or given where none is taken; the content is too small, or
            is not what the name promises (size or hash differ).
        FileNotFoundError: nothing is at `path`.
        ModuleNotFoundError: "wikipedia" without gensim installed.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "hamlet.txt")
    ...     _ = file.write_text("to be or not to be\\n" * 2000)
    ...     corpus = load_corpus("text", file)
    >>> len(corpus.train), corpus.sha256[:8]
    (34200, 'b1727905')
    """
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    return CORPORA[name](path)
