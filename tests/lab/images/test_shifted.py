"""ImageNet-C, -A, -R and -O, with 4 classes in place of 1000 and 2 of them in place of 200."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from sinkroute.lab.images import load_images
from sinkroute.lab.images.batches import EvaluationImages
from sinkroute.lab.images.shifted import SHIFTED, load_shifted, read_wnids

from .conftest import told, write_folders

ALL = ["n00000001", "n00000003", "n00000005", "n00000007"]
SOME = ["n00000003", "n00000007"]  # labels 1 and 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("sinkroute.lab.images.shifted.CLASSES", 4)
    for name, images, classes in (
        ("imagenet-a", 6, 2),
        ("imagenet-r", 6, 2),
        ("imagenet-o", 6, 2),
        ("imagenet-c", 8, 4),
    ):
        monkeypatch.setitem(SHIFTED, name, dataclasses.replace(SHIFTED[name], images=images, classes=classes))


@pytest.mark.parametrize(
    ("name", "images", "classes"),
    [("imagenet-a", 7500, 200), ("imagenet-r", 30_000, 200), ("imagenet-o", 2000, 200), ("imagenet-c", 50_000, 1000)],
)
def test_the_published_sizes_are_expected(monkeypatch, name, images, classes):
    monkeypatch.undo()
    assert (SHIFTED[name].images, SHIFTED[name].classes) == (images, classes)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r", "imagenet-o"])
def test_labels_are_the_places_of_the_folders_among_all_classes(tmp_path, name):
    root = write_folders(tmp_path / name, 3, wnids=SOME)
    (root / "README.txt").write_text("as in the archive")
    shifted = load_shifted(name, root, ALL)
    assert shifted.classes.tolist() == [1, 3]
    assert [shifted.images[index][1] for index in range(6)] == [1, 1, 1, 3, 3, 3]
    assert told(shifted.images[4][0]) == (1, 1)
    assert (shifted.name, shifted.margin) == (name, True)


def test_corrupted_images_lie_in_folders_of_corruption_and_severity(tmp_path):
    for corruption in ("fog", "snow"):
        for severity in (1, 5):
            write_folders(tmp_path / corruption / str(severity), 2, wnids=ALL)
    shifted = load_shifted("imagenet-c", tmp_path, ALL, corruption="snow", severity=5)
    assert shifted.classes.tolist() == [0, 1, 2, 3]
    assert shifted.images.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (shifted.name, shifted.margin) == ("imagenet-c/snow/5", False)
    assert "snow/5" in str(shifted.images.root)


def test_corrupted_images_are_not_cut_again(tmp_path):
    write_folders(tmp_path / "fog" / "1", 2, wnids=ALL)
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "fog" / "1" / ALL[0] / f"{ALL[0]}_0.JPEG", "PNG")  # PNG keeps each pixel
    shifted = load_shifted("imagenet-c", tmp_path, ALL, "fog", 1)
    item = EvaluationImages(shifted.images, 32, shifted.margin)[0]
    assert np.array_equal(item["images"].permute(1, 2, 0), pixels)


def test_only_the_classes_of_the_set_count_as_answers(tmp_path):
    shifted = load_shifted("imagenet-a", write_folders(tmp_path / "a", 3, wnids=SOME), ALL)
    logits = torch.tensor(
        [
            [9.0, 2.0, 9.0, 1.0],  # of the classes 1 and 3: 1, right
            [9.0, 2.0, 9.0, 3.0],  # 3, wrong
            [0.0, 2.0, 0.0, 3.0],  # 3, right
        ]
    )
    assert shifted.errors(logits, torch.tensor([1, 1, 3])).tolist() == [False, True, False]


def test_the_known_images_are_those_of_the_same_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("sinkroute.lab.images.imagenet.CLASSES", 4)
    monkeypatch.setattr("sinkroute.lab.images.imagenet.COUNTS", {"train": 4, "validation": 8})
    write_folders(tmp_path / "imagenet" / "train", 1, wnids=ALL)
    write_folders(tmp_path / "imagenet" / "val", 2, wnids=ALL)
    shifted = load_shifted("imagenet-o", write_folders(tmp_path / "o", 3, wnids=SOME), ALL)
    known = shifted.known(load_images("imagenet-1k", tmp_path / "imagenet").valid)
    assert [known[index][1] for index in range(len(known))] == [1, 1, 3, 3]


def test_class_ids_are_read_from_any_folder_of_classes(tmp_path):
    write_folders(tmp_path / "imagenet" / "train", 1, wnids=ALL)
    write_folders(tmp_path / "snow" / "5", 1, wnids=ALL)
    assert read_wnids(tmp_path / "imagenet") == read_wnids(tmp_path / "imagenet" / "train") == ALL
    assert read_wnids(tmp_path / "snow" / "5") == ALL


def test_class_ids_are_read_from_the_head_of_lines_in_any_order(tmp_path):
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} a name, another\n" for wnid in reversed(ALL)) + "\n"
    )
    assert read_wnids(tmp_path / "LOC_synset_mapping.txt") == ALL


@pytest.mark.parametrize("lines", [ALL[:3], [*ALL[:3], "cat"], [*ALL, ALL[0]]])
def test_a_list_that_is_not_the_classes_is_refused_with_both_counts(tmp_path, lines):
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"names . different class ids .* among {len(lines)}, expected 4; pass"):
        read_wnids(tmp_path / "classes.txt")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wnids: found nothing at '.*classes\.txt'"):
        read_wnids(tmp_path / "classes.txt")


def test_another_number_of_images_is_refused_with_both_counts(tmp_path):
    root = write_folders(tmp_path / "a", 2, wnids=SOME)
    with pytest.raises(
        ValueError, match=r"is not imagenet-a: found 4 images of 2 classes, expected 6 of 2; get it from https://github"
    ):
        load_shifted("imagenet-a", root, ALL)


def test_another_number_of_classes_is_refused_though_that_of_images_is_right(tmp_path):
    root = write_folders(tmp_path / "a", 2, wnids=ALL[:3])
    with pytest.raises(ValueError, match="found 6 images of 3 classes, expected 6 of 2"):
        load_shifted("imagenet-a", root, ALL)


def test_a_class_of_no_imagenet_is_refused(tmp_path):
    root = write_folders(tmp_path / "a", 3, wnids=["n00000003", "n99999999"])
    with pytest.raises(ValueError, match="n99999999 is a folder of no known class"):
        load_shifted("imagenet-a", root, ALL)


def test_a_missing_folder_says_where_to_get_the_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere'; get imagenet-c from https://zenodo\.org/records/2235448"):
        load_shifted("imagenet-c", tmp_path / "nowhere", ALL, "fog", 1)


def test_a_missing_severity_says_where_to_get_the_set(tmp_path):
    write_folders(tmp_path / "fog" / "1", 2, wnids=ALL)
    with pytest.raises(FileNotFoundError, match=r"fog/2'; get imagenet-c from"):
        load_shifted("imagenet-c", tmp_path, ALL, "fog", 2)


@pytest.mark.parametrize(
    ("name", "corruption", "severity", "message"),
    [
        ("imagenet-c", None, 1, "imagenet-c needs both, got None and 1"),
        ("imagenet-c", "fog", None, "imagenet-c needs both, got 'fog' and None"),
        ("imagenet-c", "fogg", 1, "unknown corruption in .* 'fogg'; did you mean 'fog'"),
        ("imagenet-c", "fog", 6, "severity must be an integer from 1 to 5, got 6"),
        ("imagenet-a", "fog", 1, "imagenet-a has none, got 'fog' and 1"),
        ("imagenet-b", None, None, "unknown shifted images 'imagenet-b'; did you mean 'imagenet-"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, name, corruption, severity, message):
    (tmp_path / "fog").mkdir()
    with pytest.raises(ValueError, match=message):
        load_shifted(name, tmp_path, ALL, corruption, severity)
