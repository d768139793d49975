"""Images in tables of the Hugging Face Hub: columns `image` = {bytes, path} and `label`, as in ILSVRC/imagenet-1k."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.images.decoding import decode

if TYPE_CHECKING:
    import datasets

__all__ = ["TableImages", "read_hub", "read_parquet"]


class TableImages(Dataset[tuple[Image.Image, int]]):
    """The rows of a table, decoded when asked for.

    Args:
        table: with the columns `image` and `label`.
        where: what errors call the table.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(self, table: datasets.Dataset, where: str) -> None:
        import datasets
        import pyarrow.compute

        self.where = where
        for column in ("image", "label"):
            if column not in table.column_names:
                raise ValueError(f"path: {where} has no column {column!r}; found: {', '.join(table.column_names)}")
        if isinstance(table.features["image"], datasets.Image):
            # The bytes as they are: our own decoding names the image that is damaged.
            table = table.cast_column("image", datasets.Image(decode=False))
        self.table = table
        paths = pyarrow.compute.struct_field(table.data.column("image"), "path").to_pylist()
        self.names = np.array([(path or str(row)).encode() for row, path in enumerate(paths)], dtype=bytes)
        self.labels: Tensor = torch.from_numpy(table.data.column("label").to_numpy().astype(np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in colour, and its label.

        Raises:
            ValueError: the bytes are no image, are cut short, or are damaged.
        """
        content = self.table[index]["image"]["bytes"]
        where = f"{self.where}, row {index} ({bytes(self.names[index]).decode()})"
        return decode(content or b"", where), int(self.labels[index])


def read_parquet(root: Path) -> tuple[TableImages, TableImages]:
    """The training and validation images in `train*.parquet` and `validation*.parquet`, in `root` or `root/data`.

    The `datasets` package makes a memory-mapped copy of them in its own cache the first time: a parquet file has no
    quick way to a single row.

    Raises:
        ValueError: a split has no file, or a table lacks a column.
    """
    import datasets

    files: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        found = sorted([*root.glob(f"{split}*.parquet"), *root.glob(f"data/{split}*.parquet")])
        if not found:
            raise ValueError(f"path: {root} holds no {split}*.parquet, neither itself nor in data/")
        files[split] = [str(file) for file in found]
    tables = datasets.load_dataset("parquet", data_files=files)
    return TableImages(tables["train"], f"{root} (train)"), TableImages(tables["validation"], f"{root} (validation)")


def read_hub(name: str) -> tuple[TableImages, TableImages]:
    """The training and validation images of a data set on the Hugging Face Hub, downloaded if they are not yet here.

    Raises:
        PermissionError: the Hub gives no access, or cannot be reached and no copy is in the cache.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        train, valid = datasets.load_dataset(name, split=["train", "validation"])
    except (DatasetsError, OSError) as error:
        raise PermissionError(
            f"path: 'hf' asks the Hugging Face Hub for {name}, and it gave none ({error}). The data set is gated: ask "
            f"for access at https://huggingface.co/datasets/{name}, log in by `hf auth login`, and run this again; or "
            "pass the path of a local copy: a folder with train/ and val/, with the parquet files, or with the "
            "webdataset shards"
        ) from error
    return TableImages(train, f"{name} (train)"), TableImages(valid, f"{name} (validation)")
