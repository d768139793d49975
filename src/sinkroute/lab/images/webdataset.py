"""Images in webdataset shards: tar files with KEY.jpg and KEY.cls side by side, as in timm/imagenet-1k-wds.

The shards are indexed once, so that any image is one seek away; the index is kept beside them.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.images.decoding import decode
from sinkroute.lab.images.folder import is_image

__all__ = ["ShardImages", "read_shards"]


class ShardImages(Dataset[tuple[Image.Image, int]]):
    """The images in webdataset shards, decoded when asked for; in the order of the shards' names and of their members.

    Args:
        shards: the tar files, all in one folder.
        index: file beside them that the index is kept in; it is built anew when a shard's size or time has changed, and
            kept in memory only where the folder cannot be written to.

    Raises:
        ValueError: a shard is damaged, or an image in it has no label.
    """

    def __init__(self, shards: Sequence[Path], index: Path) -> None:
        self.shards = list(shards)
        stamps = np.array([(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, self.shards)], dtype=np.int64)
        known = np.array([os.fsencode(shard.name) for shard in self.shards])
        found = _read_index(index)
        if found is None or not (np.array_equal(found["shards"], known) and np.array_equal(found["stamps"], stamps)):
            found = {"shards": known, "stamps": stamps, **_build_index(self.shards)}
            _write_index(index, found)
        self.names = found["names"]
        self.labels: Tensor = torch.from_numpy(found["labels"])
        self._places = found["places"]  # (N, 3) int64: shard, offset and size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in colour, and its label.

        Raises:
            ValueError: the member is no image, is cut short, or is damaged.
        """
        number, offset, size = self._places[index].tolist()
        shard = self.shards[number]
        with shard.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
        return decode(content, f"{shard}: {os.fsdecode(bytes(self.names[index]))}"), int(self.labels[index])


def read_shards(root: Path) -> tuple[ShardImages, ShardImages]:
    """The training and validation images in the shards of `root`: tar files with "train" or "val" in their names.

    Raises:
        ValueError: a split has no shard, a shard is damaged, or an image has no label.
    """
    splits = []
    for split in ("train", "val"):
        shards = sorted(file for file in root.glob("*.tar") if split in file.name)
        if not shards:
            raise ValueError(f"path: {root} holds no shard *{split}*.tar")
        splits.append(ShardImages(shards, root / f".sinkroute-{split}.npz"))
    return splits[0], splits[1]


def _build_index(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    names, labels, places = [], [], []
    for number, shard in enumerate(shards):
        images: dict[str, tarfile.TarInfo] = {}
        classes: dict[str, int] = {}
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    # A key is the path up to the first dot of the file's name.
                    folder, _, file = member.name.rpartition("/")
                    key = f"{folder}/{file.partition('.')[0]}"
                    if is_image(file):
                        images[key] = member
                    elif file.endswith(".cls") and (content := archive.extractfile(member)) is not None:
                        classes[key] = int(content.read())
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(f"path: {shard} is no whole webdataset shard ({error}); get the file again") from error
        for key, member in images.items():
            if key not in classes:
                raise ValueError(f"path: {shard} holds {member.name} and no .cls of that name, hence no label for it")
            names.append(os.fsencode(member.name))
            labels.append(classes[key])
            places.append((number, member.offset_data, member.size))
    return {
        "names": np.array(names, dtype=bytes),
        "labels": np.array(labels, dtype=np.int64),
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
    }


def _read_index(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in ("shards", "stamps", "names", "labels", "places")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # none yet, or a damaged one


def _write_index(file: Path, index: dict[str, np.ndarray]) -> None:
    draft = file.with_suffix(".draft.npz")
    try:
        np.savez(draft, allow_pickle=False, **index)
        os.replace(draft, file)
    except OSError:
        # A folder that cannot be written to: the index is built anew each time.
        draft.unlink(missing_ok=True)
