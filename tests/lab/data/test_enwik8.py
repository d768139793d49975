"""enwik8 from its zip or unpacked, on a small stand-in: the published size and hash are replaced by the stand-in's."""

import hashlib
import zipfile

import pytest

from sinkroute.lab.data import load_corpus

CONTENT = b"".join(b"<page><id>%d</id>text</page>\n" % number for number in range(2000))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("sinkroute.lab.data.enwik8.ENWIK8_BYTES", len(CONTENT))
    monkeypatch.setattr("sinkroute.lab.data.enwik8.ENWIK8_SHA1", hashlib.sha1(CONTENT).hexdigest())


def pack(file, content=CONTENT, member="enwik8"):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return file


def whole(corpus):
    return b"".join(split.tobytes() for split in (corpus.train, corpus.valid, corpus.test))


def test_the_zip_is_read(tmp_path):
    assert whole(load_corpus("enwik8", pack(tmp_path / "enwik8.zip"))) == CONTENT


def test_the_zip_is_recognised_without_its_suffix(tmp_path):
    assert whole(load_corpus("enwik8", pack(tmp_path / "download"))) == CONTENT


def test_the_unpacked_file_is_read(tmp_path):
    (tmp_path / "enwik8").write_bytes(CONTENT)
    assert whole(load_corpus("enwik8", tmp_path / "enwik8")) == CONTENT


def test_no_path_says_where_to_download_and_how_to_point_to_it():
    with pytest.raises(
        ValueError, match=r"got None; download it from https://mattmahoney\.net/dc/enwik8\.zip and pass"
    ):
        load_corpus("enwik8")


def test_a_missing_path_says_where_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing at '.*enwik8\.zip'; download it from https://"):
        load_corpus("enwik8", tmp_path / "enwik8.zip")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a file, got the folder"):
        load_corpus("enwik8", tmp_path)


def test_another_size_is_refused_with_both_sizes(tmp_path):
    (tmp_path / "enwik8").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=f"expected {len(CONTENT):,} bytes unpacked, found {len(CONTENT) - 1:,}"):
        load_corpus("enwik8", tmp_path / "enwik8")


def test_another_size_inside_the_zip_is_refused_with_both_sizes(tmp_path):
    with pytest.raises(ValueError, match=f"expected {len(CONTENT):,} bytes unpacked, found {len(CONTENT) + 1:,}"):
        load_corpus("enwik8", pack(tmp_path / "enwik8.zip", CONTENT + b"x"))


def test_the_same_size_with_another_hash_is_refused_with_both_hashes(tmp_path):
    other = CONTENT[:-1] + b"x"
    expected, found = hashlib.sha1(CONTENT).hexdigest(), hashlib.sha1(other).hexdigest()
    with pytest.raises(ValueError, match=f"expected sha1 {expected}, found {found}"):
        load_corpus("enwik8", pack(tmp_path / "enwik8.zip", other))


def test_a_zip_without_the_member_lists_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match="no member 'enwik8', found: enwik9"):
        load_corpus("enwik8", pack(tmp_path / "enwik8.zip", member="enwik9"))


def test_a_download_cut_short_is_called_corrupt(tmp_path):
    packed = pack(tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="corrupt zip archive"):
        load_corpus("enwik8", tmp_path / "cut")


def test_an_error_page_saved_as_the_zip_is_called_corrupt(tmp_path):
    (tmp_path / "enwik8.zip").write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(ValueError, match="corrupt zip archive"):
        load_corpus("enwik8", tmp_path / "enwik8.zip")


def test_damage_inside_the_compressed_bytes_is_called_corrupt(tmp_path):
    file = pack(tmp_path / "enwik8.zip")
    packed = bytearray(file.read_bytes())
    packed[len(packed) // 2] ^= 0xFF
    file.write_bytes(packed)
    with pytest.raises(ValueError, match="corrupt zip archive"):
        load_corpus("enwik8", file)
