"""Encoded corpora kept on disk, where encoding them takes much longer than reading what was encoded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sinkroute.lab.data.corpus import Corpus, encoded_corpus
from sinkroute.lab.data.vocabulary import Vocabulary

__all__ = ["cached_corpus"]

_SPLITS = ("train", "valid", "test")


def cached_corpus(name: str, files: Iterable[Path], encode: Callable[[], Corpus]) -> Corpus:
    """What `encode` makes of `files`, from `$XDG_CACHE_HOME/sinkroute` (else `~/.cache/sinkroute`) if it is there.

    The key is the name of the corpus, and path, size and time of change of every file. What is kept is arrays without
    pickled objects and JSON, and is checked by its digest when it is read; where it cannot be kept (no place, no
    permission), or is damaged, the corpus is encoded again. Arrays that come from there are mapped, so that several
    processes share their memory.

    Args:
        name: The registry name of the corpus.
        files: All that the corpus is read from.
        encode: Reads and checks the corpus; its vocabulary must not be None.
    """
    seen = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([name, seen]).encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkroute"
    folder = home / f"{name}-{key}"
    # Missing, cut short, of another kind, or changed.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError):
        return _read(folder)
    corpus = encode()
    with contextlib.suppress(OSError):
        _write(corpus, folder)
    return corpus


def _read(folder: Path) -> Corpus:
    about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    splits = {split: np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False) for split in _SPLITS}
    corpus = encoded_corpus(about["name"], about["source"], Vocabulary(tuple(about["words"])), **splits)
    if corpus.sha256 != about["sha256"]:
        raise ValueError(f"{folder} is damaged")
    return corpus


def _write(corpus: Corpus, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split in _SPLITS:
            np.save(draft / f"{split}.npy", getattr(corpus, split), allow_pickle=False)
        assert corpus.vocabulary is not None
        about = {
            "name": corpus.name,
            "source": corpus.source,
            "sha256": corpus.sha256,
            "words": corpus.vocabulary.words,
        }
        (draft / "corpus.json").write_text(json.dumps(about), encoding="utf-8")
        # What is there is damaged, or another process was faster; either way the draft is as good.
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
