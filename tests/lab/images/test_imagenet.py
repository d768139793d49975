"""ImageNet-1K in each of the three forms on disk, with 3 classes in place of 1000."""

import io
import json
import shutil
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from sinkroute.lab.images import DEIT, ImageBatches, evaluation_batches, load_images

from .conftest import TRAIN, VALID, WNIDS, jpeg, told


@pytest.fixture(autouse=True)
def small(three_classes):
    pass


def write_parquet(root, described=True):
    """The files of ILSVRC/imagenet-1k: data/SPLIT-00000-of-00002.parquet, with the Hub's description of the columns."""
    (root / "data").mkdir(parents=True)
    kind = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(WNIDS)}}
    for split, count in (("train", TRAIN), ("validation", VALID), ("test", 1)):
        rows = [(label, number) for number in range(count) for label in range(3)]  # as there: classes mixed
        halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
        for place, part in enumerate(halves):
            images = [
                {"bytes": jpeg(label, number), "path": f"{WNIDS[label]}_{number}_{WNIDS[label]}.JPEG"}
                for label, number in part
            ]
            labels = [-1 if split == "test" else label for label, _ in part]
            table = pyarrow.table({"image": images, "label": labels})
            if described:
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kind}})})
            pyarrow.parquet.write_table(table, root / "data" / f"{split}-0000{place}-of-00002.parquet")
    return root


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(root):
    """The shards of timm/imagenet-1k-wds: KEY.cls, KEY.jpg and KEY.json side by side."""
    root.mkdir()
    for split, count in (("train", TRAIN), ("validation", VALID)):
        rows = [(label, number) for number in range(count) for label in range(3)]
        for place, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            with tarfile.open(root / f"imagenet1k-{split}-{place:04d}.tar", "w") as archive:
                for label, number in part:
                    key = f"{WNIDS[label]}_{number}"
                    add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.jpg", jpeg(label, number))
                    add(archive, f"{key}.json", json.dumps({"label": label, "width": 40, "height": 32}).encode())
    (root / "_info.json").write_text("{}")
    return root


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def contents(split):
    return sorted((told(image), label) for image, label in (split[index] for index in range(len(split))))


def expected(count):
    return [((label, number), label) for label in range(3) for number in range(count)]


def require_whole(data):
    assert contents(data.train) == expected(TRAIN)
    assert contents(data.valid) == expected(VALID)
    assert data.train.labels.tolist() == [data.train[index][1] for index in range(len(data.train))]
    assert (data.shape, data.test is data.valid) == ((3, 224, 224), True)


def test_folders_are_read(imagenet_folder):
    data = load_images("imagenet-1k", imagenet_folder)
    require_whole(data)
    assert data.source == f"folder {imagenet_folder}"
    # The usual constants of ImageNet.
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("described", [True, False])
def test_parquet_files_are_read(tmp_path, hub_cache, described):
    require_whole(load_images("imagenet-1k", write_parquet(tmp_path / "hub", described)))


def test_webdataset_shards_are_read(tmp_path):
    require_whole(load_images("imagenet-1k", write_shards(tmp_path / "wds")))


def test_the_index_of_shards_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "wds")
    load_images("imagenet-1k", root)
    opened = []
    whole = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda file, *rest: opened.append(file.name) or whole(file, *rest))
    require_whole(load_images("imagenet-1k", root))
    assert opened == []
    changed = root / "imagenet1k-train-0001.tar"
    with whole(changed, "a") as archive:
        add(archive, "extra.cls", b"0")
        add(archive, "extra.jpg", jpeg(0, 5))
    monkeypatch.setattr("sinkroute.lab.images.imagenet.COUNTS", {"train": 3 * TRAIN + 1, "validation": 3 * VALID})
    assert len(load_images("imagenet-1k", root).train) == 3 * TRAIN + 1
    assert sorted(opened) == ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"]


def test_a_folder_that_cannot_be_written_to_needs_no_index_on_disk(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr("numpy.savez", refuse)
    require_whole(load_images("imagenet-1k", write_shards(tmp_path / "wds")))
    assert not list((tmp_path / "wds").glob("*.npz"))


def test_a_damaged_index_is_made_anew(tmp_path):
    root = write_shards(tmp_path / "wds")
    load_images("imagenet-1k", root)
    for file in root.glob(".sinkroute-*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    require_whole(load_images("imagenet-1k", root))


def test_the_digest_tells_other_images_apart(imagenet_folder):
    before = load_images("imagenet-1k", imagenet_folder)
    assert load_images("imagenet-1k", imagenet_folder) == before
    file = imagenet_folder / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    file.rename(file.with_name("other.JPEG"))
    assert load_images("imagenet-1k", imagenet_folder).sha256 != before.sha256


def test_images_of_a_size_are_served_by_worker_processes(imagenet_folder):
    data = load_images("imagenet-1k", imagenet_folder, size=32)
    batches = list(evaluation_batches(data, "valid", 4, workers=1))
    assert [images.shape for images, _ in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2, 2]


def test_training_batches_are_the_same_with_worker_processes(imagenet_folder):
    items = ImageBatches(load_images("imagenet-1k", imagenet_folder, size=32), 4, 0, 3, DEIT)
    here, there = (list(DataLoader(items, batch_size=4, num_workers=workers)) for workers in (0, 1))
    assert all(torch.equal(one["images"], two["images"]) for one, two in zip(here, there, strict=True))


def test_no_path_says_where_to_get_the_images_and_how_to_point_to_them():
    with pytest.raises(
        ValueError, match=r"need a folder, got None; ImageNet-1K comes from https://image-net\.org.*path="
    ):
        load_images("imagenet-1k")


def test_a_missing_folder_says_where_to_get_the_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no folder at '.*nowhere'; ImageNet-1K comes from"):
        load_images("imagenet-1k", tmp_path / "nowhere")


def test_an_unknown_form_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"in no known form; .*val/CLASS/\*\.JPEG.*\.parquet.*\.tar"):
        load_images("imagenet-1k", tmp_path)


def test_missing_images_are_refused_with_both_counts(imagenet_folder):
    (imagenet_folder / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").unlink()
    with pytest.raises(ValueError, match="found 11 train images of 3 classes, expected 12 of 3; get what is missing"):
        load_images("imagenet-1k", imagenet_folder)


def test_missing_validation_images_are_refused_too(imagenet_folder):
    (imagenet_folder / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").unlink()
    with pytest.raises(ValueError, match="found 5 validation images of 3 classes, expected 6 of 3"):
        load_images("imagenet-1k", imagenet_folder)


def test_the_true_counts_are_checked(imagenet_folder, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="found 12 train images of 3 classes, expected 1,281,167 of 1,000"):
        load_images("imagenet-1k", imagenet_folder)


def test_a_missing_class_is_refused_though_the_count_is_right(imagenet_folder):
    for split in ("train", "val"):
        for number, file in enumerate(sorted((imagenet_folder / split / WNIDS[2]).iterdir())):
            file.rename(imagenet_folder / split / WNIDS[1] / f"moved_{number}.JPEG")
        (imagenet_folder / split / WNIDS[2]).rmdir()
    with pytest.raises(ValueError, match="found 12 train images of 2 classes, expected 12 of 3"):
        load_images("imagenet-1k", imagenet_folder)


def test_classes_that_differ_between_the_splits_are_refused(imagenet_folder):
    shutil.rmtree(imagenet_folder / "val" / WNIDS[1])
    with pytest.raises(ValueError, match=f"3 classes in train/ and 2 in val/, and '{WNIDS[1]}' is in one only"):
        load_images("imagenet-1k", imagenet_folder)


def test_validation_images_side_by_side_are_refused_with_the_cure(imagenet_folder):
    shutil.rmtree(imagenet_folder / "val")
    (imagenet_folder / "val").mkdir()
    (imagenet_folder / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(0, 0))
    with pytest.raises(ValueError, match=r"lie side by side.*folder named by its class.*valprep\.sh"):
        load_images("imagenet-1k", imagenet_folder)


def test_a_missing_split_of_the_parquet_files_is_named(tmp_path, hub_cache):
    root = write_parquet(tmp_path / "hub")
    for file in root.glob("data/validation*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no validation\*\.parquet, neither itself nor in data/"):
        load_images("imagenet-1k", root)


def test_parquet_files_without_the_columns_are_refused(tmp_path, hub_cache):
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), tmp_path / f"{split}-0.parquet")
    with pytest.raises(ValueError, match="has no column 'image'; found: text, label"):
        load_images("imagenet-1k", tmp_path)


def test_a_damaged_image_in_a_parquet_file_is_named(tmp_path, hub_cache):
    for split, count in (("train", TRAIN), ("validation", VALID)):
        rows = [{"bytes": jpeg(0, 0)[:300], "path": f"n0_{number}.JPEG"} for number in range(3 * count)]
        table = pyarrow.table({"image": rows, "label": [number % 3 for number in range(3 * count)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    data = load_images("imagenet-1k", tmp_path)
    with pytest.raises(ValueError, match=r"\(train\), row 4 \(n0_4\.JPEG\) is no image that can be read"):
        data.train[4]


def test_a_missing_split_of_the_shards_is_named(tmp_path):
    root = write_shards(tmp_path / "wds")
    for file in root.glob("*validation*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no shard \*val\*\.tar"):
        load_images("imagenet-1k", root)


def test_a_shard_cut_short_is_named(tmp_path):
    root = write_shards(tmp_path / "wds")
    shard = root / "imagenet1k-train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"imagenet1k-train-0001\.tar is no whole webdataset shard"):
        load_images("imagenet-1k", root)


def test_an_image_without_a_label_is_named(tmp_path):
    root = write_shards(tmp_path / "wds")
    with tarfile.open(root / "imagenet1k-train-0000.tar", "a") as archive:
        add(archive, "odd.jpg", jpeg(0, 0))
    with pytest.raises(ValueError, match=r"train-0000\.tar holds odd\.jpg and no \.cls of that name"):
        load_images("imagenet-1k", root)


def test_a_damaged_image_in_a_shard_is_named(tmp_path):
    root = write_shards(tmp_path / "wds")
    data = load_images("imagenet-1k", root)
    shard = root / "imagenet1k-train-0000.tar"
    content = bytearray(shard.read_bytes())
    start = content.index(b"\xff\xd8")
    content[start : start + 20] = bytes(20)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-0000\.tar: {WNIDS[0]}_0\.jpg is no image that can be read"):
        data.train[0]


def test_the_hub_is_asked_when_the_path_is_hf(monkeypatch, tmp_path, hub_cache):
    write_parquet(tmp_path / "hub")
    files = {
        split: [str(file) for file in sorted((tmp_path / "hub" / "data").glob(f"{split}*"))]
        for split in ("train", "validation")
    }
    whole, asked = hub_cache.load_dataset, []

    def load(name, split):
        asked.append((name, tuple(split)))
        return whole("parquet", data_files=files, split=split)

    monkeypatch.setattr(hub_cache, "load_dataset", load)
    require_whole(load_images("imagenet-1k", "hf"))
    assert asked == [("ILSVRC/imagenet-1k", ("train", "validation"))]


@pytest.mark.parametrize("kind", ["gated", "offline"])
def test_without_access_the_hub_says_where_to_ask_and_how_to_use_a_copy(monkeypatch, hub_cache, kind):
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*arguments, **options):
        raise DatasetNotFoundError("is a gated dataset") if kind == "gated" else ConnectionError("no route")

    monkeypatch.setattr(hub_cache, "load_dataset", refuse)
    with pytest.raises(
        PermissionError,
        match=r"(gated dataset|no route).*ask for access at https://huggingface\.co/datasets/ILSVRC/imagenet-1k, "
        r"log in by `hf auth login`.*path of a local copy",
    ):
        load_images("imagenet-1k", "hf")
