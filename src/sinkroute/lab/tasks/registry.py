"""The task of a configuration, and the data that it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute.lab.config import Config, VisionConfig
from sinkroute.lab.data import Corpus, load_corpus
from sinkroute.lab.tasks.base import Task
from sinkroute.lab.tasks.streams import StreamTask
from sinkroute.lab.tasks.windows import WindowTask

if TYPE_CHECKING:
    from sinkroute.lab.images import ImageData

__all__ = ["load_data", "make_task"]


def load_data(config: Config) -> Corpus | ImageData:
    """The text, or for a vision model the images, of a configuration.

    Raises:
        ValueError: an unknown name; data that is not what its name promises.
        FileNotFoundError: it is not where `data.path` says.
    """
    if isinstance(config.model, VisionConfig):
        from sinkroute.lab.images import load_images

        return load_images(config.data.name, config.data.path, config.model.image_size)
    return load_corpus(config.data.name, config.data.path)


def make_task(config: Config, data: Corpus | ImageData) -> Task:
    """What a configuration trains: windows for a "decoder", streams for a "stream", images for a "vit"."""
    if isinstance(config.model, VisionConfig):
        from sinkroute.lab.images import ImageData
        from sinkroute.lab.tasks.images import ImageTask

        assert isinstance(data, ImageData)
        return ImageTask(config, data)
    assert isinstance(data, Corpus)
    return (StreamTask if config.model.name == "stream" else WindowTask)(config, data)
