"""The head of an English Wikipedia dump that ships inside gensim: six megabytes of article XML, enwik8 in kind.

It needs no download beyond `pip install`, which makes it the default text. gensim is only located, never imported:
its import takes seconds and no code of it is needed.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from sinkroute.lab.data.corpus import Corpus, split_corpus

__all__ = ["WIKIPEDIA_BYTES", "WIKIPEDIA_SHA256", "load_wikipedia", "read_dump"]

WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKIPEDIA_BYTES = 6_089_746
WIKIPEDIA_SHA256 = "34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4"


def load_wikipedia(path: str | Path | None = None) -> Corpus:
    """Unpack the dump head inside the installed gensim: 6,089,746 bytes, split 90/5/5.

    Args:
        path: Must be None; the corpus is part of a package.

    Raises:
        As `read_dump`.

    Source: https://github.com/piskvorky/gensim, folder `gensim/test/test_data`.

    >>> load_wikipedia("dump.xml")
    Traceback (most recent call last):
    ...
    ValueError: path: 'wikipedia' ships inside gensim and takes no path, got 'dump.xml'; use load_corpus('text', path)
    """
    content, source = read_dump("wikipedia", path)
    return split_corpus("wikipedia", source, content)


def read_dump(name: str, path: str | Path | None = None) -> tuple[bytes, str]:
    """The XML of the dump head, and where it came from in human words, for the corpus `name`.

    Raises:
        ValueError: `path` is given, or the unpacked content is not the one that published numbers were measured on.
        ModuleNotFoundError: gensim is not installed.
        FileNotFoundError: gensim is installed without its test data.
    """
    if path is not None:
        raise ValueError(
            f"path: {name!r} ships inside gensim and takes no path, got {str(path)!r}; use load_corpus('text', path)"
        )
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"corpus {name!r} reads a file inside gensim, and gensim is not installed; "
            'cure: pip install "sinkroute[lab]"'
        )
    archive = Path(spec.submodule_search_locations[0], "test", "test_data", WIKIPEDIA_FILE)
    if not archive.is_file():
        raise FileNotFoundError(
            f"corpus {name!r}: gensim is installed without its test data, found no {archive}; "
            'cure: pip install --force-reinstall --no-deps "gensim>=4.4"'
        )
    content = bz2.decompress(archive.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    version = importlib.metadata.version("gensim")
    if len(content) != WIKIPEDIA_BYTES or digest != WIKIPEDIA_SHA256:
        raise ValueError(
            f"corpus {name!r}: gensim {version} holds another text. Expected {WIKIPEDIA_BYTES:,} bytes with sha256 "
            f"{WIKIPEDIA_SHA256}, found {len(content):,} bytes with sha256 {digest}; cure: pip install gensim==4.4.0"
        )
    return content, f"gensim {version}: {WIKIPEDIA_FILE}"
