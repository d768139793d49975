"""Options of routers: said once, as fields of a frozen dataclass, and read by everybody who asks.

A field holds its type, its default, what it means and its bounds. From these come the check of a value, the text of
`help(...)`, the names that `create_router` and YAML files take, and what `sinkroute routers NAME` prints.

    @dataclass(frozen=True, kw_only=True)
    class Options(Router.Options):
        update_rate: float = option(1e-3, "u, by which a bias moves in a step", least=0, published=True)
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sinkroute._errors import require_numbers, unknown_name
from sinkroute.routing.losses.registry import LossesLike, read_losses
from sinkroute.routing.ranks import Group, Ranks
from sinkroute.routing.scores import GroupScore, Score

__all__ = ["CommonOptions", "Described", "Ties", "checked_groups", "described", "option", "with_default"]

Ties = Literal["first", "spread"]


def option(
    default: Any,
    about: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    published: bool = False,
    hint: str = "",
) -> Any:
    """A field of options.

    Args:
        default: the value where the user gives none.
        about: what it means.
        least, above, most, below: bounds of a number, the second and the fourth not included.
        published: whether the default is that of the paper, which the texts then say.
        hint: what is usual, for the error that refuses a value.
    """
    if published:
        hint = f"{default:g} is the published value"
        about = f"{about}; {hint}"
    return field(
        default=default,
        metadata={"about": about, "least": least, "above": above, "most": most, "below": below, "hint": hint},
    )


def with_default(options: type[CommonOptions], name: str, default: Any) -> Any:
    """A field of a parent's options, with another default and the same meaning and bounds."""
    known = next(each for each in fields(options) if each.name == name)
    return field(default=default, metadata=known.metadata)


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options that every router takes; each is checked when it is made.

    Raises:
        TypeError, ValueError: a value of another type, an unknown word, a number out of its bounds.

    >>> CommonOptions(score="softmx")
    Traceback (most recent call last):
    ValueError: unknown score 'softmx'; did you mean 'softmax'? Known: sigmoid, softmax, sqrtsoftplus
    """

    norm_topk: bool | None = option(
        None,
        "whether the weights are renormalised over the chosen K. None: yes for K > 1; no for K = 1, where the one "
        "weight would be the constant 1 and the gate would get no gradient",
    )
    score: Score = option(
        "softmax",
        'what the model makes of logits: "softmax" over the experts, or "sigmoid" or "sqrtsoftplus", each by itself',
    )
    groups: int = option(
        1,
        "the experts stand in so many groups (DeepSeek-V2 and V3); divides E. 1: no groups",
        least=1,
        hint="1 means no groups",
    )
    top_groups: int | None = option(None, "a token chooses experts of so many groups. None: of all", least=1)
    group_score: GroupScore = option(
        "top2-sum", 'a group is as good as its best expert ("max") or its best two together ("top2-sum")'
    )
    route_scale: float = option(
        1.0, "factor of all weights (routed_scaling_factor)", hint="1.0 leaves weights as they are"
    )
    ties: Ties = option(
        "first",
        'which of equal values is chosen: the lower expert ("first"), or, in training, one that is drawn for each '
        'token ("spread"), so that equal experts get equal loads: for a gate of zeros and for experts that are copies '
        'of one another. Serving is always "first"',
    )
    losses: LossesLike = option(
        (),
        "auxiliary losses beside those of the method: names, or name → coefficient. One that the method has already "
        "is computed once, with this coefficient",
    )
    process_group: Group = option(
        None,
        'the ranks whose tokens are balanced together: a ProcessGroup, "world", a DeviceMesh of one dimension, or the '
        "name of a dimension of the mesh that an adapter finds the model on. None: for a plan, which is solved in "
        "every forward pass, this rank alone; for what is counted over a batch (biases, moving averages, the global "
        "loss), all ranks. Without an adapter, ranks outside a given group are taken to hold the same tokens as one in "
        "it (tensor parallelism), and draw the same noise",
    )
    seed: int = option(0, "of all random draws")
    layer: int | None = option(
        None, "part of the key of the random draws; None: sinkroute.set_step numbers the routers of a model in order"
    )

    def __post_init__(self) -> None:
        cls: Any = type(self)
        kinds = _kinds(cls)
        for each in fields(self):
            if each.metadata:
                _check(each.name, getattr(self, each.name), kinds[each.name], each.metadata)
        read_losses(self.losses)
        ranks = Ranks(self.process_group)
        if not isinstance(self.process_group, (str, type(None))):
            object.__setattr__(self, "process_group", ranks)  # a group cannot be copied; this is shared by copies


def checked_groups(options: CommonOptions, num_experts: int, top_k: int, method: str, keeps_groups: bool) -> int:
    """From how many groups of experts a token may choose.

    Raises:
        ValueError: sizes that do not fit, or some groups only for a method that cannot keep to them.

    >>> checked_groups(CommonOptions(groups=4, top_groups=2), 8, 2, "softmax", True)
    2
    """
    groups, top_groups = options.groups, options.top_groups
    if num_experts % groups:
        raise ValueError(f"groups must divide num_experts={num_experts}, got {groups}; 1 means no groups")
    top_groups = groups if top_groups is None else top_groups
    if top_groups > groups or top_groups * (num_experts // groups) < top_k:
        raise ValueError(
            f"top_groups must be between 1 and groups={groups} and hold top_k={top_k} experts "
            f"({num_experts // groups} in a group), got {top_groups}"
        )
    if top_groups < groups and not keeps_groups:
        raise ValueError(
            f"top_groups={top_groups} of groups={groups}: {method} cannot keep a token's experts in some groups; take "
            "ssr-l or ssr-s, or all groups"
        )
    return top_groups


class Described(NamedTuple):
    """An option as it is shown: its name, type and default as text, and what it means."""

    name: str
    kind: str
    default: str
    about: str


def described(options: type[CommonOptions]) -> Iterator[Described]:
    """The fields of a class of options, those of the method first.

    >>> [row.name for row in described(CommonOptions)][:3]
    ['norm_topk', 'score', 'groups']
    >>> next(row for row in described(CommonOptions) if row.name == "seed")
    Described(name='seed', kind='int', default='0', about='of all random draws')
    """
    common = {each.name for each in fields(CommonOptions)}
    for each in sorted(fields(options), key=lambda each: each.name in common):
        yield Described(each.name, str(each.type), repr(each.default), each.metadata["about"])


@cache
def _kinds(options: Any) -> dict[str, Any]:
    return get_type_hints(options)


def _check(name: str, value: Any, kind: Any, bounds: Any) -> None:
    """Refuse a value of another type than the field's, or out of its bounds. What has many types checks itself."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return
    kinds = tuple(each for each in kinds if each is not type(None))
    or_none = " or None" if len(kinds) < len(get_args(kind)) else ""
    if len(kinds) != 1:
        return
    if get_origin(kinds[0]) is Literal:
        if value not in get_args(kinds[0]):
            raise unknown_name(name, value, get_args(kinds[0]))
    elif kinds[0] is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False{or_none}, got {value!r}")
    elif kinds[0] is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int{or_none}, got {value!r}")
        _check_bounds(name, value, "an integer", bounds)
    elif kinds[0] is float:
        require_numbers(**{name: value})
        _check_bounds(name, value, "a finite number", bounds)


def _check_bounds(name: str, value: float, what: str, bounds: Any) -> None:
    least, above, most, below = (bounds[word] for word in ("least", "above", "most", "below"))
    fits = math.isfinite(value)
    fits = fits and (least is None or value >= least) and (above is None or value > above)
    fits = fits and (most is None or value <= most) and (below is None or value < below)
    if fits:
        return
    low = f"of {least:g} or more" if least is not None else f"above {above:g}" if above is not None else ""
    high = f"at most {most:g}" if most is not None else f"below {below:g}" if below is not None else ""
    said = " and ".join(part for part in (low, high) if part)
    hint = f"; {bounds['hint']}" if bounds["hint"] else ""
    raise ValueError(f"{name} must be {what}{' ' if said else ''}{said}, got {value}{hint}")
