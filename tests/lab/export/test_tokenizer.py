"""Ids are bytes, for any text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sinkroute.lab.export import export_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from sinkroute.lab.export.tokenizer import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(length=10_000).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("<|pad|> and <|pad|>")
@example("ÿ Ā Ċ Ġ \x00 \ufeff")
@example("  two  spaces, isn't it\r\n\t ﬁ e\u0301 \U0001f600")
def test_any_text_becomes_its_bytes_and_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_stands_before_a_text_and_is_no_byte_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"] == [[255, 255, 97, 98], [97, 98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert tokenizer.decode([255, 255, 97, 98], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("router", "options", "sizes"),
    [("ssr-s", {}, {}), ("softmax", {}, {"top_k": 1}), ("loss-free", {}, {}), ("loss-free", {"score": "sigmoid"}, {})],
)
def test_beside_every_architecture_the_tokenizer_is_found_as_it_was_saved(
    make_run, tmp_path: Path, router: str, options: dict[str, object], sizes: dict[str, int]
) -> None:
    # transformers knows another tokenizer for each of these.
    export_run(make_run(router, options, **sizes), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(" né <|pad|>\n")["input_ids"] == list(" né <|pad|>\n".encode())
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (255, None, None)
    assert tokenizer.model_max_length == 48
