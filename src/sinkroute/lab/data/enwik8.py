"""enwik8: the first 10^8 bytes of the English Wikipedia dump of 3 March 2006, split 90/5/5 million bytes.

The standard byte-level benchmark. Source, size and hash: Matt Mahoney, Large Text Compression Benchmark,
https://mattmahoney.net/dc/textdata.html.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

from sinkroute.lab.data.corpus import Corpus, split_corpus

__all__ = ["ENWIK8_BYTES", "ENWIK8_SHA1", "ENWIK8_URL", "load_enwik8", "read_enwik8"]

ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"

_MEMBER = "enwik8"
_CURE = f"download it from {ENWIK8_URL} and pass path='.../enwik8.zip', or the file unpacked from it"


def load_enwik8(path: str | Path | None = None) -> Corpus:
    """Read `enwik8.zip`, or the `enwik8` file unpacked from it, and check that it is the published one.

    Args:
        path: The zip archive or the unpacked file.

    Raises:
        As `read_enwik8`.

    >>> load_enwik8()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: path: corpus 'enwik8' needs a file, got None; download it from https://mattmahoney.net/dc/enwik8.zip ...
    """
    content, source = read_enwik8("enwik8", path)
    return split_corpus("enwik8", source, content)


def read_enwik8(name: str, path: str | Path | None = None) -> tuple[bytes, str]:
    """The bytes of enwik8, and where they came from in human words, for the corpus `name`.

    Raises:
        ValueError: `path` is None or a folder; the zip is corrupt or has no member `enwik8`; size or SHA-1 differ from
            the published ones.
        FileNotFoundError: nothing is at `path`.
    """
    if path is None:
        raise ValueError(f"path: corpus {name!r} needs a file, got None; {_CURE}")
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"path: found nothing at {str(path)!r}; {_CURE}")
    if file.is_dir():
        raise ValueError(f"path: corpus {name!r} needs a file, got the folder {str(path)!r}; {_CURE}")
    content = _unzip(file) if _is_zip(file) else _read(file)
    sha1 = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    if sha1 != ENWIK8_SHA1:
        raise ValueError(f"path: {file} is not enwik8: expected sha1 {ENWIK8_SHA1}, found {sha1}; {_CURE}")
    return content, f"{ENWIK8_URL}, read from {file}"


def _is_zip(file: Path) -> bool:
    # The first bytes as well as the suffix: a download cut short keeps them, and loses the index that
    # `zipfile.is_zipfile` looks for at the end.
    with file.open("rb") as stream:
        return file.suffix.lower() == ".zip" or stream.read(4) == b"PK\x03\x04"


def _read(file: Path) -> bytes:
    # Before reading: a wrong path may name a file of any size.
    _require_size(file, file.stat().st_size)
    return file.read_bytes()


def _unzip(file: Path) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            if _MEMBER not in archive.namelist():
                members = ", ".join(archive.namelist()[:5]) or "(none)"
                raise ValueError(f"path: {file} has no member {_MEMBER!r}, found: {members}; {_CURE}")
            _require_size(file, archive.getinfo(_MEMBER).file_size)
            return archive.read(_MEMBER)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"path: {file} is a corrupt zip archive ({error}); {_CURE}") from error


def _require_size(file: Path, found: int) -> None:
    if found != ENWIK8_BYTES:
        raise ValueError(
            f"path: {file} is not enwik8: expected {ENWIK8_BYTES:,} bytes unpacked, found {found:,}; {_CURE}"
        )
