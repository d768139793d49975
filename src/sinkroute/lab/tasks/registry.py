"""The task of a configuration, and the data that it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute.lab.config import Config, VisionConfig
from sinkroute.lab.data import Corpus, load_corpus, switched_corpus
from sinkroute.lab.tasks.base import Task
from sinkroute.lab.tasks.streams import StreamTask
from sinkroute.lab.tasks.windows import WindowTask

if TYPE_CHECKING:
    from sinkroute.lab.images import ImageData

__all__ = ["load_data", "make_task"]


def load_data(config: Config) -> Corpus | ImageData:
    """The text, or for a vision model the images, of a configuration.

    Raises:
        ValueError: an unknown name; data that is not what its name promises; a text to turn to that has other symbols
            or needs a path.
        FileNotFoundError: it is not where `data.path` says.
    """
    if isinstance(config.model, VisionConfig):
        from sinkroute.lab.images import load_images

        return load_images(config.data.name, config.data.path, config.model.image_size)
    corpus = load_corpus(config.data.name, config.data.path)
    if config.data.switch_to is None:
        return corpus
    try:
        then = load_corpus(config.data.switch_to)
    except ValueError as error:
        raise ValueError(f"data.switch_to must name a text that needs no path: {error}") from None
    return switched_corpus(corpus, then)


def make_task(config: Config, data: Corpus | ImageData) -> Task:
    """What a configuration trains: windows for a "decoder", streams for a "stream", images for a "vit"."""
    if isinstance(config.model, VisionConfig):
        from sinkroute.lab.images import ImageData
        from sinkroute.lab.tasks.images import ImageTask

        assert isinstance(data, ImageData)
        return ImageTask(config, data)
    assert isinstance(data, Corpus)
    return (StreamTask if config.model.name == "stream" else WindowTask)(config, data)
