"""Every token of a text with the experts that it is given, layer by layer, as one self-contained HTML page.

The text of a document gets into the page as JSON and onto the screen as text nodes, so nothing in it is ever markup. A
layer's choices lie there packed (`viewer_pack`) and are unfolded when the layer is looked at.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sinkroute.lab.files import write_text
from sinkroute.lab.inspect.result import Audit, Layer, Pictures
from sinkroute.lab.inspect.table import labels
from sinkroute.lab.inspect.viewer_colours import INK, MOST, colours
from sinkroute.lab.inspect.viewer_pack import pack, spell
from sinkroute.lab.page import render

__all__ = ["write_viewer"]


def write_viewer(audits: Sequence[Audit], path: Path) -> None:
    """Write the page; its folder is there.

    Args:
        audits: one checkpoint, or more on the same text, which are shown side by side; made with `viewer_tokens`.
        path: of the HTML file.

    Raises:
        ValueError: an audit kept no tokens.
        ModuleNotFoundError: jinja2 is missing; `pip install "sinkroute[inspect]"` brings it.
    """
    from markupsafe import Markup

    for audit in audits:
        if not audit.words:
            raise ValueError(
                f"the audit of {audit.setting.model!r} kept no tokens to show; "
                "give inspect_checkpoint viewer_tokens=4096"
            )
    script = resources.files(__package__).joinpath("viewer.js").read_text(encoding="utf-8")
    blobs: dict[str, str] = {}
    told = [_checkpoint(audit, place, blobs) for place, audit in enumerate(audits)]
    experts = max((len(layer.load) for audit in audits for layer in audit.layers if layer.load is not None), default=0)
    page = render(
        "inspect/viewer.html.j2",
        audits=audits,
        colours=list(enumerate(colours(min(experts, MOST)))),
        experts=experts,
        most=MOST,
        ink=INK,
        told=Markup(_json({"checkpoints": told, "most": MOST})),
        blobs={name: Markup(blob) for name, blob in blobs.items()},
        script=Markup(script),
    )
    write_text(page, path)


def _checkpoint(audit: Audit, place: int, blobs: dict[str, str]) -> dict[str, Any]:
    """What the script reads of a checkpoint; `blobs` is given its packed layers."""
    setting = audit.setting
    return {
        "name": setting.model,
        "words": audit.words,
        "window": setting.length - setting.bos,
        "tokens": setting.tokens,
        "side": audit.pictures.side if audit.pictures else None,
        "pictures": _drawn(audit.pictures) if audit.pictures else [],
        "layers": [
            _layer(layer, label, f"c{place}l{number}", audit, blobs)
            for number, (label, layer) in enumerate(zip(labels(audit.layers), audit.layers, strict=True))
        ],
    }


def _layer(layer: Layer, label: str, name: str, audit: Audit, blobs: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {"label": label, "path": layer.path, "rule": layer.rule, "reason": layer.reason}
    choices = layer.choices
    if layer.load is None:
        return out
    out |= {"experts": len(layer.load), "load": layer.load.tolist()}
    if "balanced" in layer.alternatives:
        out["balanced_load"] = layer.alternatives["balanced"].load.tolist()
    # A router that is called twice for each token has its choices in another order than the text.
    if choices is None or layer.tokens != audit.setting.tokens or len(choices.experts_TK) != len(audit.words):
        return out | {
            "reason": layer.reason or "it is not called once for every token, or not always with as many experts"
        }
    packed, how = pack(choices, len(layer.load))
    blobs[name] = spell(packed)
    return out | how | {"blob": name}


def _drawn(pictures: Pictures) -> list[str]:
    """Each image as a PNG in a data URL."""
    from PIL import Image

    out = []
    for pixels_CHW in pictures.pixels:
        pixels = pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(file, "png")
        out.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"))
    return out


def _json(content: Any) -> str:
    """For a script element: `<` begins neither an end tag nor a comment there when it is written as an escape."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
