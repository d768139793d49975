"""The inspection of a vision model that the lab trained: the patches of its data set's validation images as tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinkroute._errors import require_count
from sinkroute.adapters._fit import SCORING
from sinkroute.adapters.hf.contracts import Decision, Site, Triple
from sinkroute.adapters.hf.scoring import Scoring
from sinkroute.lab.config import VisionConfig
from sinkroute.lab.images import evaluation_batches, load_images, normalise, scale
from sinkroute.lab.inspect.result import Audit, Pictures, Setting
from sinkroute.lab.inspect.tally import Tally
from sinkroute.lab.inspect.text import InspectError
from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory
from sinkroute.lab.trained import load_run
from sinkroute.routing import Router, Routes

__all__ = ["inspect_images", "is_run"]


def is_run(model: str) -> bool:
    """Whether a folder is a run of the lab's, and no checkpoint of transformers."""
    return Path(model, "config.yaml").is_file() and not Path(model, "config.json").is_file()


@torch.no_grad()
def inspect_images(
    run: str,
    *,
    tokens: int = 16384,
    batch: int | None = None,
    viewer_tokens: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Serve the first validation images of a run's data set and count what its routers do.

    Tokens are the class token of each image and its patches, row by row; all are counted, as all are routed.

    Args:
        run: folder of a run of `sinkroute train` with a "vit".
        tokens: at most so many, cut down to whole images.
        batch: images in a batch, over which alternatives are balanced; None: as in the run's training.
        viewer_tokens: the choices of so many are kept for `write_viewer`, cut down to whole images.
        on_progress: is told how many batches are done.

    Raises:
        InspectError: the run is of text, has no mixture, or `tokens` are fewer than an image has.
        FileNotFoundError, ValueError: see `sinkroute.lab.trained.load_run`.
    """
    require_count("tokens", tokens, 1)
    require_count("viewer_tokens", viewer_tokens, 0)
    started = time.perf_counter()
    reset_peak_memory()
    trained = load_run(Path(run))
    config = trained.config.model
    if not isinstance(config, VisionConfig):
        raise InspectError(f"{run!r} is a run on text; export it first: sinkroute export {run} --output FOLDER")
    batch = trained.config.train.batch if batch is None else batch
    require_count("batch", batch, 1)
    side = config.image_size // config.patch
    length = 1 + side**2
    count = tokens // length
    if not count:
        raise InspectError(f"tokens={tokens} are fewer than the {length} of one image; raise --tokens")
    data = load_images(trained.config.data.name, trained.config.data.path, config.image_size)
    count = min(count, len(data.valid))
    kept = min(viewer_tokens // length, count)
    model = trained.model.eval()
    tallies = _tallies(model, run, length, kept * length)
    pictures, done, steps = [], 0, -(-count // batch)
    on_progress(0, steps)
    try:
        for step, (pixels_BCHW, _) in enumerate(evaluation_batches(data, "valid", batch), start=1):
            pixels_BCHW = pixels_BCHW[: count - done]
            pictures.append(pixels_BCHW[: max(kept - done, 0)])
            model(normalise(scale(pixels_BCHW), data.mean, data.std))
            done += len(pixels_BCHW)
            on_progress(step, steps)
            if done >= count:
                break
    finally:
        for tally in tallies:
            tally.handle.remove()
    names = ("class", *(f"row {row + 1}, column {column + 1}" for row in range(side) for column in range(side)))
    return Audit(
        Setting(
            model=run,
            architecture=type(model).__name__,
            dtype="float32",
            device="cpu",
            text=f"{data.name}, the validation images",
            tokens=count * length,
            windows=count,
            length=length,
            batch=batch,
            bos=False,
            by_layer=False,
            held_mb=0.0,
        ),
        [tally.layer() for tally in tallies],
        time.perf_counter() - started,
        peak_memory_mb(),
        None,
        names * kept,
        Pictures(torch.cat(pictures), side) if kept else None,
    )


def _tallies(model: nn.Module, run: str, length: int, kept: int) -> list[_Watched]:
    names = {module: name for name, module in model.named_modules()}
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise InspectError(f"{run!r} has no mixture of experts: model.moe_from is beyond its layers")
    return [_Watched(router, names[router], run, length, kept) for router in routers]


class _Watched(Tally):
    """The count of one of our routers, which says in `Routes` what it decides."""

    def __init__(self, router: Router, path: str, run: str, length: int, kept: int) -> None:
        theirs: dict[str, Any] = {name: getattr(router, name) for name in SCORING}
        scoring = Scoring(Triple(), router.num_experts, router.top_k, **theirs)
        super().__init__(Site(path, router, router), scoring, run, length, False, kept)
        self.kept_in = "the layer's state"
        self.handle = router.register_forward_hook(self.watch)

    def watch(self, router: nn.Module, args: tuple[Any, ...], routes: Routes) -> None:
        if routes.chosen is not None or routes.experts.shape[-1] != self.site.host.top_k:
            raise InspectError(
                f"{self.site.path} of {self.checkpoint!r} serves tokens with differing numbers of experts, which "
                "inspect cannot count; it reads routers that give every token top_k"
            )
        self.calls += 1
        self.count(Decision(args[0], routes.weights, routes.experts))
