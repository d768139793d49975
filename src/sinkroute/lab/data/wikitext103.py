"""WikiText-103, word level: 103 million words of the verified good and featured articles of English Wikipedia.

The standard word-level benchmark (Merity et al. 2017, arXiv 1609.07843). A line is split at white space and ended by
`<eos>`; words get their ids in the order in which train, then valid, then test show them, as in the code of the
adaptive-span family. The text is that of the release, in which rare words are `<unk>` already.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from sinkroute.lab.data._cache import cached_corpus
from sinkroute.lab.data.corpus import Corpus, encoded_corpus
from sinkroute.lab.data.vocabulary import EOS, FirstSeen

__all__ = ["WIKITEXT103_URL", "load_wikitext103"]

WIKITEXT103_URL = "https://huggingface.co/datasets/Salesforce/wikitext"

_CURE = (
    f"download the folder wikitext-103-v1 of {WIKITEXT103_URL} (train-00000-of-00002.parquet, "
    "train-00001-of-00002.parquet, validation-00000-of-00001.parquet, test-00000-of-00001.parquet) and point to it "
    "with path=..., on the command line --data.path; the wikitext-103-v1.zip of the first release, or the folder "
    "with its wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, will do too"
)


class _Counts(NamedTuple):
    """What makes a text WikiText-103: symbols of each split, `<eos>` included, and different ones in all."""

    train: int
    valid: int
    test: int
    vocabulary: int


_PUBLISHED = _Counts(103_227_021, 217_646, 245_569, 267_735)


def load_wikitext103(path: str | Path | None = None) -> Corpus:
    """Read WikiText-103 in any form in which it is published, and check that it is all there.

    What is encoded (413 MB of ids) is kept in `$XDG_CACHE_HOME/sinkroute` (else `~/.cache/sinkroute`) and read from
    there as long as the files have the same paths, sizes and times.

    Args:
        path: The folder with `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens`; `wikitext-103-v1.zip`,
            which holds these; the folder with the parquet files `train-*-of-*.parquet` and so on; or the folder in
            which one of these folders stands under its own name (`wikitext-103`, `wikitext-103-v1`).

    Raises:
        ValueError: `path` is None or another file; a file is missing, damaged or no UTF-8; the counts of symbols and
            words are not those of WikiText-103 (such as those of the raw release, or of WikiText-2).
        FileNotFoundError: nothing is at `path`.

    >>> load_wikitext103()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: path: corpus 'wikitext-103' needs a folder or a zip archive, got None; download the folder ...
    """
    return _load(path, _PUBLISHED)


def _load(path: str | Path | None, expected: _Counts) -> Corpus:
    if path is None:
        raise ValueError(f"path: corpus 'wikitext-103' needs a folder or a zip archive, got None; {_CURE}")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path: found nothing at {str(path)!r}; {_CURE}")
    files, splits = _find(root)

    def encode() -> Corpus:
        seen = FirstSeen()
        ids = {split: _encode(chunks, seen) for split, chunks in splits.items()}
        vocabulary = seen.vocabulary()
        found = _Counts(**{split: len(data) for split, data in ids.items()}, vocabulary=len(vocabulary))
        if found != expected:
            raise ValueError(
                f"path: {root} is not WikiText-103: expected {_in_words(expected)}, found {_in_words(found)}; {_CURE}"
            )
        return encoded_corpus("wikitext-103", f"{WIKITEXT103_URL}, read from {root}", vocabulary, **ids)

    return cached_corpus("wikitext-103", files, encode)


def _in_words(counts: _Counts) -> str:
    return (
        f"{counts.train:,} / {counts.valid:,} / {counts.test:,} symbols in train / valid / test "
        f"and {counts.vocabulary:,} different ones"
    )


def _encode(chunks: Iterator[str], seen: FirstSeen) -> np.ndarray:
    """The ids of a split, given as pieces of whole lines."""
    ids = array("i")
    for chunk in chunks:
        ids.extend(seen.encode(chunk.replace("\n", f" {EOS} ").split()))
    return np.frombuffer(ids, dtype=np.intc)


# What each form of the release gives: the files it is read from, and for each split pieces of whole lines, which open
# their file when the first is asked for.
_Found = tuple[list[Path], dict[str, Iterator[str]]]

_TOKENS = {split: f"wiki.{split}.tokens" for split in ("train", "valid", "test")}
_PARQUET = {"train": "train", "valid": "validation", "test": "test"}
_SHARD = re.compile(r"(train|validation|test)-\d{5}-of-(\d{5})\.parquet")


def _find(root: Path) -> _Found:
    if not root.is_dir():
        return _in_zip(root)
    for folder in (root, root / "wikitext-103", root / "wikitext-103-v1"):
        names = sorted(file.name for file in folder.glob("*"))
        if set(_TOKENS.values()).intersection(names):
            return _in_folder(folder)
        if any(map(_SHARD.fullmatch, names)):
            return _in_parquet(folder, names)
    found = ", ".join(sorted(file.name for file in root.iterdir())[:5]) or "(nothing)"
    raise ValueError(f"path: folder {str(root)!r} holds no file of WikiText-103, found: {found}; {_CURE}")


def _in_folder(folder: Path) -> _Found:
    files = {split: folder / name for split, name in _TOKENS.items()}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(f"path: folder {str(folder)!r} lacks {', '.join(missing)}; {_CURE}")
    return list(files.values()), {split: _file_chunks(file) for split, file in files.items()}


def _in_zip(file: Path) -> _Found:
    with _damage_named(file), zipfile.ZipFile(file) as archive:
        members = archive.namelist()
    splits = {}
    for split, name in _TOKENS.items():
        member = next((member for member in members if member.rpartition("/")[2] == name), None)
        if member is None:
            raise ValueError(
                f"path: {file} has no member {name!r}, found: {', '.join(members[:5]) or '(none)'}; {_CURE}"
            )
        splits[split] = _member_chunks(file, member)
    return [file], splits


def _in_parquet(folder: Path, names: list[str]) -> _Found:
    splits = {}
    for split, prefix in _PARQUET.items():
        shards = [shard for shard in map(_SHARD.fullmatch, names) if shard and shard[1] == prefix]
        needed = int(shards[0][2]) if shards else 1
        if len(shards) != needed:
            raise ValueError(
                f"path: folder {str(folder)!r} holds {len(shards)} of the {needed} files {prefix}-*.parquet; {_CURE}"
            )
        splits[split] = [folder / shard[0] for shard in shards]
    files = [file for shards in splits.values() for file in shards]
    return files, {split: _parquet_chunks(shards) for split, shards in splits.items()}


def _file_chunks(file: Path) -> Iterator[str]:
    with _damage_named(file), file.open("rb") as stream:
        yield from _chunks(stream)


def _member_chunks(file: Path, member: str) -> Iterator[str]:
    with _damage_named(file), zipfile.ZipFile(file) as archive, archive.open(member) as stream:
        yield from _chunks(stream)


def _chunks(stream: IO[bytes]) -> Iterator[str]:
    """A megabyte at a time, cut where a line ends; the last line is ended too."""
    rest = ""
    with io.TextIOWrapper(stream, encoding="utf-8") as text:
        while piece := text.read(1 << 20):
            lines, end, rest = (rest + piece).rpartition("\n")
            yield lines + end
    if rest:
        yield rest + "\n"


def _parquet_chunks(shards: list[Path]) -> Iterator[str]:
    """A row is a line, with its end or, where it is blank, without."""
    from pyarrow.parquet import ParquetFile

    for file in shards:
        with _damage_named(file), ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise ValueError(f"no column 'text' among {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=4096, columns=["text"]):
                yield "".join(row.rstrip("\n") + "\n" for row in batch.column(0).to_pylist())


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Errors of the formats (Arrow's are ValueErrors and OSErrors, bad UTF-8 is a ValueError) with file and cure."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"path: cannot read {file} ({error}); {_CURE}") from error
