"""A text as windows of real tokens: none is padding, and what does not fill a window is left out.

Windows are of one length and have no overlap. Where the model's tokenizer puts a symbol before a text (BOS), it stands
before each window, since the model expects it, and is not counted: it is no word of the text, and models treat it like
none (as an attention sink).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sinkroute._errors import SinkrouteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["InspectError", "Windows", "read_windows"]

# Characters tokenized at once; a piece ends with a line where one ends soon.
_PIECE = 2**18


class InspectError(SinkrouteError):
    """A checkpoint or a text that cannot be inspected; the message says why."""


class Windows(NamedTuple):
    """Attributes:
    ids_NL: (N, L) int64.
    begun: whether the first of each window is the tokenizer's BOS, which is not counted.
    words: the parts of the text that the first counted tokens stand for; joined, they are the text.
    """

    ids_NL: Tensor
    begun: bool
    words: tuple[str, ...] = ()

    @property
    def counted(self) -> int:
        """How many tokens of the text they hold."""
        windows, length = self.ids_NL.shape
        return windows * (length - self.begun)

    def batches(self, size: int) -> list[Tensor]:
        """`size` windows each; the last may have fewer."""
        return list(self.ids_NL.split(size))


def read_windows(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, words: int = 0) -> Windows:
    """The head of a text: windows of `length` that hold at most `tokens` of its tokens, `words` of them spelled.

    Raises:
        InspectError: the file is missing, no UTF-8, empty, or shorter than a window.
    """
    begin = _begin(tokenizer)
    own = length - (begin is not None)
    if tokens < own:
        raise InspectError(
            f"tokens={tokens} are fewer than one window of length={length} holds ({own}); "
            "raise --tokens or lower --length"
        )
    ids: list[int] = []
    spelled: list[str] = []
    rest = ""  # what stands behind the last token of a piece belongs to the next token
    for piece in _pieces(path):
        spell = len(spelled) < words
        offsets = {"return_offsets_mapping": True} if spell and tokenizer.is_fast else {}
        told = tokenizer(piece, add_special_tokens=False, verbose=False, **offsets)
        ids += told["input_ids"]
        if offsets:
            found, after = _spelled(piece, told["offset_mapping"])
            spelled += [rest + found[0], *found[1:]] if found else []
            rest = after if found else rest + after
        elif spell:
            spelled += [str(tokenizer.decode([one])) for one in told["input_ids"][: words - len(spelled)]]
        if len(ids) >= tokens:
            break
    if not ids:
        raise InspectError(f"{path} is empty; --text needs a text of {own} tokens or more")
    windows = min(len(ids), tokens) // own
    if not windows:
        most = len(ids) + (begin is not None)
        raise InspectError(
            f"{path} has {len(ids)} tokens, fewer than one window of length={length} holds ({own}); "
            + (f"take --length {most} or less, or a longer text" if most > 1 else "take a longer text")
        )
    ids_NL = torch.tensor(ids[: windows * own]).view(windows, own)
    if begin is not None:
        ids_NL = torch.cat([torch.full((windows, 1), begin), ids_NL], dim=1)
    return Windows(ids_NL, begin is not None, tuple(spelled[: min(words, windows * own)]))


def _begin(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer itself puts before a text. (That it knows a BOS does not say that it uses it.)"""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def _spelled(piece: str, offsets: list[tuple[int, int]]) -> tuple[list[str], str]:
    """The text of each token, and what is left. What no token covers, such as a space, goes to the next; of tokens that
    share a character, the first has it.

    >>> _spelled("a  bé ", [(0, 1), (3, 4), (4, 5), (4, 5)])
    (['a', '  b', 'é', ''], ' ')
    """
    out, done = [], 0
    for _, end in offsets:
        out.append(piece[done : max(done, end)])
        done = max(done, end)
    return out, piece[done:]


def _pieces(path: Path) -> Iterator[str]:
    if path.is_dir():
        raise InspectError(f"{path} is a folder; --text needs a file")
    try:
        with path.open("rb") as file:
            other = _encoding(file.read(4096))
        if other is not None:
            raise InspectError(
                f"{path} is in {other}, and --text needs UTF-8; convert it first: iconv -f {other} -t UTF-8 "
                f"{path} > utf8.txt"
            )
        with path.open(encoding="utf-8-sig", newline="") as file:
            while piece := file.read(_PIECE):
                yield piece + file.readline(_PIECE)
    except FileNotFoundError:
        raise InspectError(f"there is no file {path}; --text needs a text in UTF-8") from None
    except UnicodeDecodeError as error:
        raise InspectError(
            f"{path} is not UTF-8 ({error.reason}: {error.object[error.start : error.start + 1]!r}); "
            "convert it first from the encoding that it has: iconv -f LATIN1 -t UTF-8, if that is Latin-1"
        ) from None


def _encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark at the beginning, or the zeros of which such texts are full; else None.

    >>> _encoding("ab".encode("utf-16")), _encoding("ab".encode("utf-16-be")), _encoding("ab".encode())
    ('UTF-16', 'UTF-16BE', None)
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) <= len(head) / 8:
        return None
    return "UTF-16BE" if even > odd else "UTF-16LE"
