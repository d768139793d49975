"""What to do next: which router, what it would change, and how it is put in."""

from __future__ import annotations

from sinkroute.lab.inspect.result import Audit, Layer, mean
from sinkroute.lab.words import percent
from sinkroute.routing.metrics import DEAD
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["advice", "recipe"]

_LITTLE = 0.1  # of MaxVio: less is not worth a training


def advice(audit: Audit) -> list[str]:
    """Sentences: the router that `sinkroute.patch` takes unless told, or why not."""
    able = [layer for layer in audit.layers if RECOMMENDED in layer.alternatives]
    out = []
    if able:
        own, after = (mean(values) for values in zip(*map(_batches, able), strict=True))
        if own - after < _LITTLE:
            return [
                f"Leave the routing as it is: its batches have MaxVio {own:.2f}, and with {RECOMMENDED} they would "
                f"have {after:.2f}. To count loads while you train, sinkroute.LoadMonitor(model)."
            ]
        out += _change(able, own, after, "these images" if audit.of_images else "this text")
    left = [layer for layer in audit.layers if layer.rule is not None and layer.kept_in is None]
    if left:
        out.append(
            f"{_layers(left, audit)} no correction bias and no linear gate that could keep what {RECOMMENDED} learns; "
            "ssr-l, which keeps nothing, can be taken there."
        )
    unread = [layer for layer in audit.layers if layer.rule is None]
    if unread and able:
        out.append(f"{_layers(unread, audit)} no rule that is understood, and would stay as it is.")
    elif unread and not left:
        out.append("No layer has a rule that is understood, so that sinkroute.patch would refuse this model.")
    return out


def recipe(audit: Audit) -> str:
    """The line of code or the command that does it; "" where there is nothing to do."""
    able = [layer for layer in audit.layers if RECOMMENDED in layer.alternatives]
    if not able or mean([own - after for own, after in map(_batches, able)]) < _LITTLE:
        return ""
    if audit.of_images:
        return f"sinkroute train CONFIG --router.name {RECOMMENDED}"
    return (
        f"handle = sinkroute.patch(model)  # {RECOMMENDED}; before the optimizer and the training\n"
        "print(handle.summary())  # after it: MaxVio and dead experts, then and now"
    )


def _change(able: list[Layer], own: float, after: float, seen: str) -> list[str]:
    others = [layer.alternatives[RECOMMENDED] for layer in able]
    moved, lost = (mean([getattr(other, key) for other in others]) for key in ("tokens_moved", "score_lost"))
    least = mean([layer.alternatives["balanced"].score_lost for layer in able if "balanced" in layer.alternatives])
    dead = [(layer, expert) for layer in able for expert in layer.dead]
    revived = sum(_share(layer, expert) >= DEAD for layer, expert in dead)
    held = ", ".join(dict.fromkeys(layer.kept_in or "" for layer in able))
    out = [
        f"Train on with {RECOMMENDED}, the router that sinkroute.patch(model) takes unless told. On {seen} it would "
        f"serve batches with MaxVio {after:.2f} in place of {own:.2f}: the busiest expert would have {1 + after:.1f} "
        f"times its share, and not {1 + own:.1f} times.",
        f"That moves {percent(moved)} of the tokens to another set of experts, and loses {percent(lost)} of the gate's "
        f"scores; wholly equal loads lose {percent(least)} at the least.",
    ]
    if dead:
        out.append(f"Of {len(dead):,} experts that are dead on {seen} {revived:,} would get tokens again.")
    return [
        *out,
        f"What it learns is kept in the model's own tensors ({held}). Whether its predictions get better or worse no "
        "audit can tell: train, and compare.",
    ]


def _batches(layer: Layer) -> tuple[float, float]:
    """MaxVio of single batches, the model's own and with the recommended router."""
    return layer.max_vio_batch or 0.0, layer.alternatives[RECOMMENDED].max_vio_batch


def _share(layer: Layer, expert: int) -> float:
    load = layer.alternatives[RECOMMENDED].load.double()
    return float(load[expert] / load.mean().clamp(min=1e-9))


def _layers(some: list[Layer], audit: Audit) -> str:
    return f"{len(some)} of {len(audit.layers)} layers {'has' if len(some) == 1 else 'have'}"
