"""The corpora by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sinkroute._errors import unknown_name
from sinkroute.lab.data.corpus import Corpus
from sinkroute.lab.data.enwik8 import load_enwik8
from sinkroute.lab.data.enwik8_symbols import load_enwik8_symbols
from sinkroute.lab.data.stdlib import load_stdlib
from sinkroute.lab.data.text import load_text
from sinkroute.lab.data.wikipedia import load_wikipedia
from sinkroute.lab.data.wikipedia_words import load_wikipedia_words
from sinkroute.lab.data.wikitext103 import load_wikitext103

__all__ = ["BYTE_CORPORA", "CORPORA", "list_corpora", "load_corpus"]

CORPORA: dict[str, Callable[[str | Path | None], Corpus]] = {
    "enwik8": load_enwik8,
    "enwik8-symbols": load_enwik8_symbols,
    "stdlib": load_stdlib,
    "text": load_text,
    "wikipedia": load_wikipedia,
    "wikipedia-words": load_wikipedia_words,
    "wikitext-103": load_wikitext103,
}
"""Name -> loader; a loader takes the `path` of `load_corpus` and returns a `Corpus`."""

BYTE_CORPORA = ("enwik8", "stdlib", "text", "wikipedia")
"""Those whose symbols are the bytes themselves."""


def list_corpora() -> list[str]:
    """The names that `load_corpus` knows, sorted.

    >>> list_corpora()
    ['enwik8', 'enwik8-symbols', 'stdlib', 'text', 'wikipedia', 'wikipedia-words', 'wikitext-103']
    """
    return sorted(CORPORA)


def load_corpus(name: str, path: str | Path | None = None) -> Corpus:
    """Load a corpus by name.

    Args:
        name: Bytes: "wikipedia" (ships inside gensim, needs no path), "stdlib" (source code of the running Python,
            needs no path), "text" (any text file or folder), "enwik8".
            Other symbols: "wikipedia-words" (words of the same dump, needs no path), "wikitext-103" (words),
            "enwik8-symbols" (enwik8's 205 different bytes, renumbered).
        path: Where the text is: a file or folder for "text"; `enwik8.zip`, or the file in it, for "enwik8" and
            "enwik8-symbols"; the folder of the release, or its zip, for "wikitext-103".

    Raises:
        ValueError: `name` is unknown; `path` is missing, or given where none is taken; the content is too small, or
            is not what the name promises (sizes, counts or hash differ).
        FileNotFoundError: nothing is at `path`.
        ModuleNotFoundError: "wikipedia" or "wikipedia-words" without gensim installed.

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
