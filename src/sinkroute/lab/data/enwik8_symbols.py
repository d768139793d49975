"""enwik8 as the adaptive-span family reads it: its 205 different bytes as symbols of a vocabulary.

The family's usual preparation, `prep_enwik8.py`, writes every byte as its decimal code, split by spaces, and a newline
as a line break; its word-level reader then makes a word of each code and `<eos>` of each line break. So the text is
that of "enwik8", byte for byte, under other numbers; a model has 205 embeddings and outputs instead of 256. One thing
differs: the family's reader adds an `<eos>` after a split that does not end with a newline, which is no part of it.
"""

from __future__ import annotations

from pathlib import Path

from sinkroute.lab.data.corpus import Corpus, encoded_corpus, split_corpus
from sinkroute.lab.data.enwik8 import read_enwik8
from sinkroute.lab.data.vocabulary import EOS, Vocabulary

__all__ = ["ENWIK8_SYMBOLS", "load_enwik8_symbols"]

ENWIK8_SYMBOLS = 205


def load_enwik8_symbols(path: str | Path | None = None) -> Corpus:
    """Read enwik8, split 90/5/5 million bytes, each byte as the number of its first appearance in train.

    Args:
        path: The zip archive or the unpacked file.

    Returns:
        The corpus; its vocabulary has the decimal code of a byte as its word, `<eos>` for the newline, and
        `byte_values`.

    Raises:
        ValueError: `path` is None or a folder; the zip is corrupt or has no member `enwik8`; size, SHA-1 or the number
            of symbols differ from the published ones.
        FileNotFoundError: nothing is at `path`.
    """
    content, source = read_enwik8("enwik8-symbols", path)
    corpus = split_corpus("enwik8-symbols", source, content)
    # In train, valid, test order, as the family's reader goes; train alone has them all.
    places = ((content.find(byte), byte) for byte in range(256))
    seen = bytes(byte for place, byte in sorted(places) if place >= 0)
    if len(seen) != ENWIK8_SYMBOLS:
        raise ValueError(f"path: {path} is not enwik8: expected {ENWIK8_SYMBOLS} different bytes, found {len(seen)}")
    vocabulary = Vocabulary(tuple(EOS if byte == 0x0A else str(byte) for byte in seen), seen)
    splits = (vocabulary.from_bytes(split) for split in (corpus.train, corpus.valid, corpus.test))
    return encoded_corpus("enwik8-symbols", source, vocabulary, *splits)
