"""Files of images, one folder per class."""

import io

import pytest
from PIL import Image

from sinkroute.lab.images.decoding import decode
from sinkroute.lab.images.folder import FolderImages

from .conftest import WNIDS, jpeg, told, write_folders

LABELS = {wnid: label for label, wnid in enumerate(WNIDS)}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_any_colours_become_rgb(mode):
    image = decode(jpeg(1, 1, mode=mode), "here")
    assert (image.mode, image.size) == ("RGB", (40, 32))
    if mode != "L":
        assert told(image) == (1, 1)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_read_whatever_the_suffix_says(form):
    stream = io.BytesIO()
    Image.new("P", (5, 4)).convert("RGBA").save(stream, form)
    assert decode(stream.getvalue(), "n0_1.JPEG").mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", jpeg(0, 0)[:-200], jpeg(0, 0)[:100]])
def test_what_is_no_whole_image_is_named(content):
    with pytest.raises(ValueError, match=r"^n0_1\.JPEG is no image that can be read .*; get the file again"):
        decode(content, "n0_1.JPEG")


def test_images_come_class_by_class_with_their_labels(tmp_path):
    images = FolderImages(write_folders(tmp_path / "images", 3), LABELS)
    found = [(told(image), label) for image, label in (images[index] for index in range(len(images)))]
    assert found == [((label, number), label) for label in range(3) for number in range(3)]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(type(images[index][1]) is int for index in range(3))


def test_labels_are_those_that_are_given(tmp_path):
    images = FolderImages(write_folders(tmp_path / "images", 1), {wnid: 10 * label for wnid, label in LABELS.items()})
    assert images.labels.tolist() == [0, 10, 20]


def test_other_files_and_hidden_ones_are_left_out(tmp_path):
    root = write_folders(tmp_path / "images", 2, suffix="jpg")
    for stranger in ("README.txt", f"{WNIDS[0]}/notes.txt", f"{WNIDS[0]}/.hidden.jpg", f"{WNIDS[1]}/._x.JPEG"):
        (root / stranger).write_bytes(b"no image")
    (root / ".git").mkdir()
    assert len(FolderImages(root, LABELS)) == 6


def test_a_damaged_file_is_named_when_it_is_read(tmp_path):
    root = write_folders(tmp_path / "images", 2)
    file = root / WNIDS[1] / f"{WNIDS[1]}_0.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    images = FolderImages(root, LABELS)
    with pytest.raises(ValueError, match=rf"{WNIDS[1]}_0\.JPEG is no image that can be read"):
        images[2]


def test_a_folder_of_no_known_class_is_refused(tmp_path):
    root = write_folders(tmp_path / "images", 1, wnids=(*WNIDS, "cats"))
    with pytest.raises(ValueError, match=r"cats is a folder of no known class; move it elsewhere"):
        FolderImages(root, LABELS)


def test_a_class_without_images_is_refused(tmp_path):
    root = write_folders(tmp_path / "images", 1)
    (root / WNIDS[2] / f"{WNIDS[2]}_0.JPEG").unlink()
    with pytest.raises(ValueError, match=f"{WNIDS[2]} holds no image"):
        FolderImages(root, LABELS)
