from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from sinkroute.lab.inspect import InspectError
from sinkroute.lab.inspect.text import read_windows

from .conftest import BOS, ids_of, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content)
    return path


def test_windows_are_the_text_in_order_and_the_rest_is_left_out(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    windows = read_windows(written(tmp_path, b"abcdefgh.ij"), tokenizer, length=4, tokens=100)
    assert windows.ids_NL.tolist() == [ids_of("abcd"), ids_of("efgh")]
    assert (windows.counted, windows.begun) == (8, False)


def test_tokens_are_cut_down_to_whole_windows(tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert read_windows(written(tmp_path, b"abcdefghij"), tokenizer, length=4, tokens=7).counted == 4


def test_a_bos_takes_a_place_in_each_window(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, bos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    windows = read_windows(written(tmp_path, b"abcdef"), tokenizer, length=4, tokens=100)
    assert windows.ids_NL.tolist() == [[BOS, *ids_of("abc")], [BOS, *ids_of("def")]]
    assert windows.counted == 6


def test_a_text_is_read_in_pieces_that_make_it_up(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinkroute.lab.inspect.text._PIECE", 3)
    windows = read_windows(written(tmp_path, b"ab\ncdefghij\nkl"), tokenizer, length=7, tokens=100)
    assert windows.ids_NL.flatten().tolist() == ids_of("ab\ncdefghij\nkl")


def test_batches_hold_whole_windows_and_the_last_may_hold_fewer(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    windows = read_windows(written(tmp_path, b"abcdefghij"), tokenizer, length=2, tokens=100)
    assert [list(batch.shape) for batch in windows.batches(3)] == [[3, 2], [2, 2]]


@pytest.mark.parametrize(
    ("content", "tokens", "words"),
    [
        (b"", 100, "is empty"),
        (b"abc", 100, "has 3 tokens, fewer than one window of length=4 holds.*take --length 3"),
        (b"a", 100, r"has 1 tokens, fewer than one window of length=4 holds \(4\); take a longer text$"),
        (b"abcdefgh", 3, "tokens=3 are fewer than one window of length=4.*raise --tokens"),
        ("ÄÖÜ".encode("latin-1"), 100, r"is not UTF-8 .*b'\\xc4'.*iconv -f LATIN1"),
        ("some words".encode("utf-16"), 100, "is in UTF-16, and --text needs UTF-8.*iconv -f UTF-16 -t UTF-8"),
        ("some words".encode("utf-16-le"), 100, "is in UTF-16LE, .*iconv -f UTF-16LE -t UTF-8"),
        ("some words".encode("utf-32"), 100, "is in UTF-32, .*iconv -f UTF-32 -t UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_with_the_cure(
    content: bytes, tokens: int, words: str, tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InspectError, match=words):
        read_windows(written(tmp_path, content), tokenizer, length=4, tokens=tokens)


def test_a_missing_file_and_a_folder_are_refused(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InspectError, match=r"no file .*nothing\.txt"):
        read_windows(tmp_path / "nothing.txt", tokenizer, length=4, tokens=100)
    with pytest.raises(InspectError, match="is a folder"):
        read_windows(tmp_path, tokenizer, length=4, tokens=100)


def test_words_are_the_text_of_the_first_tokens_through_all_pieces(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinkroute.lab.inspect.text._PIECE", 3)
    path = written(tmp_path, b"ab\ncdefghij\nkl")
    assert read_windows(path, tokenizer, length=7, tokens=100).words == ()
    assert "".join(read_windows(path, tokenizer, length=7, tokens=100, words=9).words) == "ab\ncdefgh"
    assert "".join(read_windows(path, tokenizer, length=4, tokens=100, words=100).words) == "ab\ncdefghij\n"


def test_words_join_to_the_text_where_tokens_are_parts_of_characters_or_leave_blanks_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    content = "Größe  </script>\n日本 &amp;\t!"
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_byte = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_)
    path = written(tmp_path, content.encode())
    words = read_windows(path, by_byte, length=len(content.encode()), tokens=100, words=100).words
    assert len(words) == len(content.encode())
    assert "".join(words) == content
    assert [word for word in words if "ö" in word or word == ""][:2] == ["ö", ""]

    parts = {
        part: place for place, part in enumerate(["[UNK]", "Größe", "</", "script", ">", "日本", "&", "amp", ";", "!"])
    }
    blanks = Tokenizer(models.WordLevel(parts, unk_token="[UNK]"))
    blanks.pre_tokenizer = pre_tokenizers.Whitespace()
    by_word = transformers.PreTrainedTokenizerFast(tokenizer_object=blanks, unk_token="[UNK]")
    words = read_windows(path, by_word, length=2, tokens=100, words=100).words
    assert content.startswith("".join(words))
    assert "\n日本" in words


def test_words_of_a_tokenizer_without_offsets_are_its_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    assert read_windows(written(tmp_path, b"abcdef"), tokenizer, length=2, tokens=100, words=5).words == tuple("abcde")


def test_the_mark_before_utf_8_is_no_word(tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    marked, plain = (
        read_windows(written(tmp_path, "abcdefgh".encode(coding)), tokenizer, length=4, tokens=100)
        for coding in ("utf-8-sig", "utf-8")
    )
    assert marked.ids_NL.tolist() == plain.ids_NL.tolist()
