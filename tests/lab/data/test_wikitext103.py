"""WikiText-103 in each form in which it is published, on small files: the published counts are replaced by theirs."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from sinkroute.lab.data import load_corpus
from sinkroute.lab.data.wikitext103 import _Counts, _load

# As in the release: a line begins and ends with a space, titles stand between blank lines, rare words are <unk>.
TEXTS = {
    "train": " \n = Moss = \n \n Moss is <unk> , a small @-@ leaved plant . \n = = Uses = = \n \n Moss AAA \n",
    "valid": " \n = Fern = \n \n A fern is a plant . \n",
    "test": " \n Moss and fern \n \n",
}
COUNTS = _Counts(train=27, valid=13, test=6, vocabulary=18)
WORDS = "<eos> = Moss is <unk> , a small @-@ leaved plant . Uses AAA Fern A fern and"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write_tokens(folder, texts=TEXTS):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / f"wiki.{split}.tokens").write_bytes(text.encode())
    return folder


def write_zip(file, texts=TEXTS):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-103/", "")
        for split, text in texts.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    return file


def write_parquet(folder, texts=TEXTS):
    """Rows as Hugging Face has them: a line with its end, an empty string where it is blank; train in two files."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
        parts = [rows[:3], rows[3:]] if split == "train" else [rows]
        name = "validation" if split == "valid" else split
        for number, part in enumerate(parts):
            table = arrow.table({"text": arrow.array(part, type=arrow.string())})
            parquet.write_table(table, folder / f"{name}-{number:05}-of-{len(parts):05}.parquet")
    return folder


FORMS = {
    "folder": lambda root: write_tokens(root / "data"),
    "folder in folder": lambda root: write_tokens(root / "data" / "wikitext-103").parent,
    "zip": lambda root: write_zip(root / "wikitext-103-v1.zip"),
    "parquet": lambda root: write_parquet(root / "hf"),
    "parquet in folder": lambda root: write_parquet(root / "hf" / "wikitext-103-v1").parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_words_split_at_spaces_and_eos_for_each_line(tmp_path, form):
    corpus = _load(FORMS[form](tmp_path), COUNTS)
    for split, text in TEXTS.items():
        expected = [word for line in text.splitlines() for word in [*line.split(), "<eos>"]]
        assert [corpus.vocabulary.words[place] for place in getattr(corpus, split)] == expected


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_digest(tmp_path, form):
    assert _load(FORMS[form](tmp_path), COUNTS).sha256 == _load(write_tokens(tmp_path / "other"), COUNTS).sha256


def test_ids_follow_train_then_valid_then_test_in_first_seen_order(tmp_path):
    corpus = _load(write_tokens(tmp_path / "data"), COUNTS)
    assert " ".join(corpus.vocabulary.words) == WORDS
    assert corpus.symbols == 18
    assert corpus.train[:5].tolist() == [0, 1, 2, 1, 0]


def test_a_last_line_without_an_end_gets_its_eos(tmp_path):
    texts = TEXTS | {"test": TEXTS["test"].rstrip(" \n")}
    corpus = _load(write_tokens(tmp_path / "data", texts), _Counts(27, 13, 5, 18))
    assert corpus.vocabulary.words[corpus.test[-1]] == "<eos>"


def test_pieces_of_a_long_file_are_joined_where_they_were_cut(tmp_path):
    # 3 MB, read a megabyte at a time.
    line = " ".join(f"word{number}" for number in range(1000))
    texts = TEXTS | {"train": f" {line} \n" * 400}
    corpus = _load(write_tokens(tmp_path / "data", texts), _Counts(400 * 1001, 13, 6, 1001 + 10))
    assert np.array_equal(corpus.train, np.tile(np.arange(1001), 400))


def test_other_counts_are_refused_with_those_found_and_where_to_get_the_text(tmp_path):
    folder = write_tokens(tmp_path / "data")
    with pytest.raises(ValueError) as error:
        load_corpus("wikitext-103", folder)
    message = str(error.value)
    assert f"{folder} is not WikiText-103: expected 103,227,021 / 217,646 / 245,569 symbols" in message
    assert "267,735 different ones, found 27 / 13 / 6 symbols in train / valid / test and 18 different ones" in message
    assert "https://huggingface.co/datasets/Salesforce/wikitext" in message
    assert "--data.path" in message


@pytest.mark.parametrize("place", range(4))
def test_each_of_the_four_counts_is_checked(tmp_path, place):
    counts = list(_Counts(27, 13, 6, 18))
    counts[place] += 1
    with pytest.raises(ValueError, match="is not WikiText-103"):
        _load(write_tokens(tmp_path / "data"), _Counts(*counts))


def test_no_path_says_where_to_download_and_how_to_point_to_it():
    with pytest.raises(ValueError, match=r"got None; download .*Salesforce/wikitext .*parquet.*--data\.path"):
        load_corpus("wikitext-103")


def test_a_missing_path_says_where_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing at '.*nowhere'; download .*Salesforce/wikitext"):
        load_corpus("wikitext-103", tmp_path / "nowhere")


def test_a_folder_that_lacks_a_file_names_it(tmp_path):
    folder = write_tokens(tmp_path / "data")
    (folder / "wiki.valid.tokens").unlink()
    with pytest.raises(ValueError, match=r"lacks wiki\.valid\.tokens"):
        load_corpus("wikitext-103", folder)


@pytest.mark.parametrize(
    ("missing", "count"),
    [("train-00001-of-00002", "1 of the 2 files train"), ("test-00000-of-00001", "0 of the 1 files test")],
)
def test_a_folder_that_lacks_a_parquet_file_says_how_many_there_should_be(tmp_path, missing, count):
    folder = write_parquet(tmp_path / "hf")
    (folder / f"{missing}.parquet").unlink()
    with pytest.raises(ValueError, match=f"holds {count}-"):
        load_corpus("wikitext-103", folder)


def test_another_folder_lists_what_it_holds(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no file of WikiText-103, found: notes\.txt"):
        load_corpus("wikitext-103", folder)


def test_a_zip_without_a_member_lists_what_it_holds(tmp_path):
    file = write_zip(tmp_path / "wikitext.zip", {"train": "a\n"})
    with pytest.raises(
        ValueError, match=r"no member 'wiki\.valid\.tokens', found: wikitext-103/, wikitext-103/wiki\.train"
    ):
        load_corpus("wikitext-103", file)


def test_a_download_cut_short_is_named(tmp_path):
    packed = write_zip(tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.zip \(File is not a zip file\); download"):
        load_corpus("wikitext-103", tmp_path / "cut.zip")


def test_damage_inside_a_zip_is_named(tmp_path):
    file = write_zip(tmp_path / "wikitext.zip", TEXTS | {"train": "".join(f" w{i} \n" for i in range(9999))})
    packed = bytearray(file.read_bytes())
    packed[len(packed) // 2] ^= 0xFF
    file.write_bytes(packed)
    with pytest.raises(ValueError, match=r"cannot read .*wikitext\.zip \("):
        load_corpus("wikitext-103", file)


def test_a_damaged_parquet_file_is_named(tmp_path):
    folder = write_parquet(tmp_path / "hf")
    (folder / "validation-00000-of-00001.parquet").write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(ValueError, match=r"cannot read .*validation-00000-of-00001\.parquet \("):
        load_corpus("wikitext-103", folder)


def test_a_parquet_file_of_something_else_names_its_columns(tmp_path):
    folder = write_parquet(tmp_path / "hf")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": [1], "label": [2]}), folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no column 'text' among image, label"):
        load_corpus("wikitext-103", folder)


def test_text_that_is_no_utf8_is_named(tmp_path):
    folder = write_tokens(tmp_path / "data")
    (folder / "wiki.test.tokens").write_bytes(b" M\xfcsli \n")
    with pytest.raises(ValueError, match=r"cannot read .*wiki\.test\.tokens \('utf-8' codec can't decode byte 0xfc"):
        load_corpus("wikitext-103", folder)


class TestCache:
    """What was encoded once is read from the cache folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        return write_tokens(tmp_path / "data")

    @pytest.fixture
    def no_encoding(self, monkeypatch):
        def forbid():
            def encode(*_):
                raise AssertionError("encoded again")

            monkeypatch.setattr("sinkroute.lab.data.wikitext103._encode", encode)

        return forbid

    def test_the_second_time_nothing_is_encoded_and_the_corpus_is_the_same(self, folder, no_encoding):
        first = _load(folder, COUNTS)
        no_encoding()
        second = _load(folder, COUNTS)
        assert second == first
        assert second.vocabulary == first.vocabulary
        assert all(np.array_equal(getattr(second, split), getattr(first, split)) for split in TEXTS)
        assert not second.train.flags.writeable

    def test_a_changed_file_is_encoded_again(self, folder):
        first = _load(folder, COUNTS)
        (folder / "wiki.test.tokens").write_text(" fern and Moss moss \n \n")
        assert _load(folder, _Counts(27, 13, 6, 19)) != first

    @pytest.mark.parametrize("damage", ["cut", "changed", "missing", "json"])
    def test_what_is_damaged_is_encoded_again(self, folder, cache, damage):
        first = _load(folder, COUNTS)
        (kept,) = (cache / "sinkroute").iterdir()
        array = kept / "train.npy"
        if damage == "cut":
            array.write_bytes(array.read_bytes()[:-3])
        elif damage == "changed":
            array.write_bytes(array.read_bytes()[:-1] + b"\x01")
        elif damage == "missing":
            array.unlink()
        else:
            (kept / "corpus.json").write_text("{")
        assert _load(folder, COUNTS) == first
        assert [file.name for file in (cache / "sinkroute").iterdir()] == [kept.name]
        assert sorted(file.name for file in kept.iterdir()) == ["corpus.json", "test.npy", "train.npy", "valid.npy"]

    def test_a_pickle_in_the_place_of_an_array_is_not_loaded(self, folder, cache, tmp_path):
        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "sprung"),)

        first = _load(folder, COUNTS)
        (kept,) = (cache / "sinkroute").iterdir()
        (kept / "train.npy").write_bytes(pickle.dumps(Trap()))
        assert _load(folder, COUNTS) == first
        assert not (tmp_path / "sprung").exists()

    def test_without_a_place_to_keep_it_the_corpus_is_still_read(self, folder, cache):
        cache.write_text("a file where the folder would be")
        assert _load(folder, COUNTS).symbols == 18

    def test_what_is_not_wikitext_103_is_not_kept(self, folder, cache):
        with pytest.raises(ValueError, match="is not WikiText-103"):
            load_corpus("wikitext-103", folder)
        assert not cache.exists()
