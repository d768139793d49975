"""Bytes to train on: corpora split into train, valid and test, and the windows that a model reads.

Every corpus is plain bytes: the vocabulary is the 256 byte values, and no tokenizer stands between a text and its loss.

- `load_corpus(name, path)` reads one of the corpora that `list_corpora()` names.
- `Windows` serves training windows in an order that depends on (seed, index) alone.
- `evaluation_windows` cuts a split so that each of its bytes is predicted exactly once.

A new corpus is one file with a loader and one line in `registry.py`.
"""

from sinkroute.lab.data.corpus import MIN_SPLIT_BYTES, Corpus, split_corpus
from sinkroute.lab.data.evaluation import evaluation_windows
from sinkroute.lab.data.registry import CORPORA, list_corpora, load_corpus
from sinkroute.lab.data.windows import Windows

__all__ = [
    "CORPORA",
    "MIN_SPLIT_BYTES",
    "Corpus",
    "Windows",
    "evaluation_windows",
    "list_corpora",
    "load_corpus",
    "split_corpus",
]
