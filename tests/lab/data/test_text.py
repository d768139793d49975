"""Any local file or folder as a corpus."""

import pytest

from sinkroute.lab.data import load_corpus

LONG = b"The quick brown fox jumps over the lazy dog.\n" * 1000


def whole(corpus):
    return b"".join(split.tobytes() for split in (corpus.train, corpus.valid, corpus.test))


def test_a_file_is_taken_byte_for_byte_whatever_its_suffix(tmp_path):
    file = tmp_path / "dump.bin"
    file.write_bytes(b"\x00\xff\r\n" + LONG)
    assert whole(load_corpus("text", file)) == b"\x00\xff\r\n" + LONG


def test_the_path_may_be_a_string(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_bytes(LONG)
    assert whole(load_corpus("text", str(file))) == LONG


def test_the_source_names_the_file(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_bytes(LONG)
    assert load_corpus("text", file).source == f"file {file}"


def test_a_folder_is_joined_by_newlines_in_the_order_of_relative_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/2.md", "b/10.rst", "a.TXT"):
        (tmp_path / name).write_bytes(name.encode() + b":" + LONG)
    expected = b"\n".join(name + b":" + LONG for name in (b"a.TXT", b"b/10.rst", b"b/2.md", b"c.txt"))
    assert whole(load_corpus("text", tmp_path)) == expected


@pytest.mark.parametrize("stranger", ["image.png", "weights", ".hidden.txt", ".git/notes.md"])
def test_a_folder_leaves_out_other_suffixes_and_hidden_files(tmp_path, stranger):
    (tmp_path / "fox.txt").write_bytes(LONG)
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_bytes(b"not this")
    assert whole(load_corpus("text", tmp_path)) == LONG


def test_a_folder_whose_own_path_is_hidden_is_read(tmp_path):
    folder = tmp_path / ".cache" / "texts"
    folder.mkdir(parents=True)
    (folder / "fox.txt").write_bytes(LONG)
    assert whole(load_corpus("text", folder)) == LONG


def test_a_folder_named_like_a_text_file_is_no_text(tmp_path):
    (tmp_path / "chapters.txt").mkdir()
    (tmp_path / "fox.txt").write_bytes(LONG)
    assert whole(load_corpus("text", tmp_path)) == LONG


def test_no_path_is_an_error_that_asks_for_one():
    with pytest.raises(ValueError, match=r"path: .*got None; pass path="):
        load_corpus("text")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: found nothing at '.*nowhere\.txt'"):
        load_corpus("text", tmp_path / "nowhere.txt")


def test_a_folder_without_text_lists_the_known_suffixes(tmp_path):
    (tmp_path / "image.png").write_bytes(LONG)
    with pytest.raises(ValueError, match=r"holds no text file; known suffixes: .*\.md .*\.txt"):
        load_corpus("text", tmp_path)


@pytest.mark.parametrize("size", [0, 20_479])
def test_too_small_a_file_is_refused_with_its_size(tmp_path, size):
    file = tmp_path / "short.txt"
    file.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"short\.txt.*found {size:,} bytes, needed at least 20,480"):
        load_corpus("text", file)
