"""Text to train on: corpora split into train, valid and test, and the windows or streams that a model reads.

A corpus is a sequence of symbols: the 256 byte values, or the ids of a `Vocabulary` of words.

- `load_corpus(name, path)` reads one of the corpora that `list_corpora()` names.
- `Windows` serves training windows in an order that depends on (seed, index) alone.
- `evaluation_windows` cuts a split so that each of its symbols is predicted exactly once.
- `Streams` serves contiguous rows block by block, for models with a cache; `stream_evaluation` scores with one.

A new corpus is one file with a loader and one line in `registry.py`.
"""

from sinkroute.lab.data.corpus import MIN_SPLIT_BYTES, Corpus, encoded_corpus, split_corpus, switched_corpus
from sinkroute.lab.data.evaluation import evaluation_windows
from sinkroute.lab.data.registry import CORPORA, list_corpora, load_corpus
from sinkroute.lab.data.streams import StreamBlocks, Streams, stream_evaluation
from sinkroute.lab.data.vocabulary import Vocabulary
from sinkroute.lab.data.windows import Windows

__all__ = [
    "CORPORA",
    "MIN_SPLIT_BYTES",
    "Corpus",
    "StreamBlocks",
    "Streams",
    "Vocabulary",
    "Windows",
    "encoded_corpus",
    "evaluation_windows",
    "list_corpora",
    "load_corpus",
    "split_corpus",
    "stream_evaluation",
    "switched_corpus",
]
