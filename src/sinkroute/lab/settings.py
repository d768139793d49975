"""A section of a configuration: a pydantic dataclass, strict, whose errors name the dotted key, the value, the range.

Whether a section is read from a mapping, called for, or made by the command line: an unknown key, a value of another
type and one out of its range are a `ValueError` in the project's words.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from sinkroute._errors import unknown_name

__all__ = [
    "Count",
    "Flag",
    "Key",
    "Natural",
    "Number",
    "Positive",
    "Scalar",
    "Share",
    "from_mapping",
    "numeric",
    "settings",
]

T = TypeVar("T")


def numeric(value: Any) -> Any:
    """A string that is a number, as that number: YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"must be a number, a word, true or false, got {value!r} ({type(value).__name__})")
    return numeric(value)


Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True), BeforeValidator(numeric)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Scalar = Annotated[bool | int | float | str, PlainValidator(_scalar)]
Key = Annotated[str, BeforeValidator(lambda key: str(key) if isinstance(key, (int, float)) else key)]
"""A name that the author of a file chose: 5 is one too."""


@dataclass_transform()
def settings(where: str = "", *, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class a section of a configuration; `where` is its dotted name, with which its errors begin.

    >>> @settings("train")
    ... class Train:
    ...     steps: Count = 1
    >>> Train(steps=0)
    Traceback (most recent call last):
    ValueError: train.steps must be 1 or more, got 0
    """

    def decorate(cls: type[T]) -> type[T]:
        # As types, not as text: pydantic 2.11 and tyro 1.0 look up what a base class names in the subclass's module.
        hints = get_type_hints(cls, include_extras=True)
        cls.__annotations__ = {name: hints[name] for name in inspect.get_annotations(cls)}
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        made: Any = pydantic.dataclasses.dataclass(cls, config=config, frozen=frozen)
        checked = made.__init__

        @functools.wraps(checked)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            named = dict(zip(made.__pydantic_fields__, args, strict=False))  # errors are told by name
            if len(named) < len(args) or named.keys() & values.keys():
                fields = ", ".join(made.__pydantic_fields__)
                raise TypeError(f"{cls.__name__} takes one value for each of {fields}; got more by position")
            try:
                checked(self, **named, **values)
            except ValidationError as error:
                raise ValueError(_words(error, made, where)) from None

        made.__init__ = __init__
        return made

    return decorate


def from_mapping(cls: type[T], mapping: Any, where: str = "") -> T:
    """Settings from nested mappings; keys that are missing keep their defaults.

    Raises:
        ValueError: the unknown keys and wrong values, a line each, with their dotted names.

    >>> from sinkroute.lab.config import Config
    >>> from_mapping(Config, {"train": {"lr": "1e-3"}}).train.lr  # YAML 1.1 reads 1e-3 as a string
    0.001
    >>> from_mapping(Config, {"train": {"stepps": 5}})
    Traceback (most recent call last):
    ValueError: unknown key in train 'stepps'; did you mean 'steps'? Known: ...
    """
    try:
        return TypeAdapter(cls).validate_python(mapping)
    except ValidationError as error:
        raise ValueError(_words(error, cls, where)) from None


def _words(error: ValidationError, cls: Any, where: str) -> str:
    return "\n".join(_line(each, cls, where) for each in error.errors(include_url=False))


def _line(error: Any, hint: Any, where: str) -> str:
    """What pydantic found wrong, in the project's words: from the kind of error and the hint of the field."""
    kind, value = error["type"], error["input"]
    for part in error["loc"]:
        bare = _bare(hint)
        fields, parts = getattr(bare, "__pydantic_fields__", {}), get_args(bare)
        if part in fields:
            hint = fields[part]
            where = f"{where}.{part}" if where else part
        elif fields:
            return str(unknown_name(f"key in {where or 'configuration'}", part, fields)) + getattr(
                bare, "misplaced", _nowhere
            )(part)
        elif isinstance(part, int) and get_origin(bare) is tuple:
            hint, where = parts[0], f"{where}[{part}]"
        elif get_origin(bare) is dict:
            hint, where = (parts[1], f"{where}.{part}") if part != "[key]" else (str, where)
        else:
            hint = next((each for each in parts if getattr(each, "name", None) == part), hint)  # of several kinds
    if kind == "value_error":
        words = str(error["ctx"]["error"])
        return f"{where} {words}" if words.startswith("must ") else words
    if kind == "union_tag_invalid":
        names = [each.name for each in get_args(_bare(hint))]
        return str(unknown_name(f"value of {where}.name:", value.get("name"), names))
    if kind == "literal_error":
        return str(unknown_name(f"value of {where}:", value, map(str, get_args(_bare(hint)))))
    if kind in ("dataclass_type", "dict_type", "model_attributes_type"):
        return f"{where or 'configuration'} must be a mapping of keys to values, got {value!r}"
    if kind.endswith("_type"):
        wanted = kind.removesuffix("_type").replace("string", "str")
        return f"{where} must be {wanted}, got {value!r} ({type(value).__name__})"
    return f"{where} must be {_range(_bounds(hint), finite=_bare(hint) is float)}, got {value!r}"


def _bare(hint: Any) -> Any:
    """A hint without what is annotated, and without its None."""
    while isinstance(hint, FieldInfo) or get_origin(hint) is Annotated:
        hint = hint.annotation if isinstance(hint, FieldInfo) else get_args(hint)[0]
    others = [each for each in get_args(hint) if each is not type(None)]
    return _bare(others[0]) if len(others) == 1 and len(get_args(hint)) == 2 else hint


def _bounds(hint: Any) -> dict[str, float]:
    """The limits (gt, ge, lt, le) that a hint sets, wherever in it they stand."""
    found = {name: limit for name in ("gt", "ge", "lt", "le") if (limit := getattr(hint, name, None)) is not None}
    within = (hint.annotation, *hint.metadata) if isinstance(hint, FieldInfo) else get_args(hint)
    for part in (*within, *getattr(hint, "__metadata__", ())):
        found |= _bounds(part)
    return found


def _range(bounds: dict[str, float], finite: bool) -> str:
    """
    >>> _range({"gt": 0}, True), _range({"ge": 0, "lt": 1}, True), _range({"ge": 0, "le": 1}, True)
    ('a finite number above 0', '0 or more and below 1', 'from 0 to 1')
    """
    if "ge" in bounds and "le" in bounds:
        return f"from {bounds['ge']:g} to {bounds['le']:g}"
    low = f"above {bounds['gt']:g}" if "gt" in bounds else f"{bounds['ge']:g} or more" if "ge" in bounds else ""
    high = f"below {bounds['lt']:g}" if "lt" in bounds else f"{bounds['le']:g} or less" if "le" in bounds else ""
    if finite and not high:
        return " ".join(["a finite number", *([low] if "gt" in bounds else [f"of {low}"] if low else [])])
    return " and ".join(filter(None, (low, high)))


def _nowhere(key: object) -> str:
    """Sections whose keys are often put at another level say more, by a static `misplaced(key)`."""
    return ""
