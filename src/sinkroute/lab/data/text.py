"""Any local text: one file, or every text file of a folder."""

from __future__ import annotations

from pathlib import Path

from sinkroute.lab.data.corpus import Corpus, split_corpus

__all__ = ["TEXT_SUFFIXES", "load_text"]

TEXT_SUFFIXES = frozenset({".htm", ".html", ".markdown", ".md", ".rst", ".tex", ".text", ".txt", ".xml"})
"""What counts as text in a folder, in either case. A file that is named itself may have any suffix."""


def load_text(path: str | Path | None = None) -> Corpus:
    """Read a file, or a folder's text files joined by a newline, and split the bytes 90/5/5.

    Args:
        path: A file of any suffix, taken as it is; or a folder, of which every file with a suffix in `TEXT_SUFFIXES`
            is taken, subfolders included, hidden files and folders not, in the order of their relative paths.

    Raises:
        ValueError: `path` is None, the folder holds no text file, or there are too few bytes (see `split_corpus`).
        FileNotFoundError: nothing is at `path`.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "b.txt").write_bytes(b"second" * 4000)
    ...     _ = pathlib.Path(folder, "a.md").write_bytes(b"first" * 4000)
    ...     corpus = load_text(folder)
    >>> corpus.train[:5].tobytes(), corpus.test[-6:].tobytes()
    (b'first', b'second')
    """
    if path is None:
        raise ValueError("path: corpus 'text' needs a text file or a folder, got None; pass path=...")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path: found nothing at {str(path)!r}; pass an existing text file or folder")
    if not root.is_dir():
        return split_corpus("text", f"file {root}", root.read_bytes())
    files = _text_files(root)
    if not files:
        raise ValueError(
            f"path: folder {str(path)!r} holds no text file; known suffixes: {' '.join(sorted(TEXT_SUFFIXES))}. "
            "Rename the files, or pass one file itself"
        )
    source = f"folder {root}, {len(files)} file{'s' if len(files) > 1 else ''}"
    return split_corpus("text", source, b"\n".join(file.read_bytes() for file in files))


def _text_files(root: Path) -> list[Path]:
    found = []
    for file in root.rglob("*"):
        relative = file.relative_to(root)
        # Hidden folders are tools' own: version control, caches, virtual environments.
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix.lower() in TEXT_SUFFIXES and not hidden and file.is_file():
            found.append((relative.as_posix(), file))
    return [file for _, file in sorted(found)]
