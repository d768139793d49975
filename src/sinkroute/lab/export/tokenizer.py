"""A tokenizer whose ids are the bytes of the text, as everywhere in the lab.

Byte-level BPE (the alphabet of GPT-2, which shows each byte as a printable character) without a single merge. The
padding symbol has the id 255: no UTF-8 text holds that byte, so that the vocabulary stays the model's 256 symbols. The
text "<|pad|>" is seven bytes like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["NEWLINE", "PAD", "make_tokenizer"]

NEWLINE = 0x0A
"""What the lab takes to stand before a text: the id with which generation begins where it is given none."""

PAD = 0xFF
"""The id of the padding symbol."""

_PAD_NAME = "<|pad|>"


def make_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that was trained on windows of `length` bytes.

    >>> tokenizer = make_tokenizer(length=128)
    >>> tokenizer("né <|pad|>")["input_ids"] == list("né <|pad|>".encode())
    True
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in enumerate(_alphabet()) if byte != PAD}
    backend = Tokenizer(models.BPE(vocab={**vocab, _PAD_NAME: PAD}, merges=[]))
    # No regular expression: it would cut the text, and what is cut is put together again.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD_NAME,
        padding_side="left",  # a text is continued at its end
        split_special_tokens=True,  # or the text "<|pad|>" would be padding
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )


def _alphabet() -> list[str]:
    """GPT-2's character for each byte: itself where it can be seen, else the next from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
