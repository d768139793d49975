"""The words for a RandAugment policy: "rand-m9-mstd0.5-inc1" is magnitude 9, standard deviation 0.5, growing severity.

The notation is timm's (https://huggingface.co/docs/timm), which the recipes of published models are written in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Policy", "parse_policy"]

_FORM = re.compile(r"rand-m(?P<magnitude>\d+(?:\.\d+)?)(?:-n(?P<ops>\d+))?(?:-mstd(?P<std>\d+(?:\.\d+)?))?-inc1")


@dataclass(frozen=True)
class Policy:
    """A RandAugment policy.

    Attributes:
        magnitude: Mean of the magnitude, from 0 (mildest) to 10.
        std: Its standard deviation.
        ops: Operations drawn for an image, with replacement; each is done with probability 0.5.
    """

    magnitude: float
    std: float
    ops: int


def parse_policy(text: str) -> Policy:
    """Read a policy of the set of operations whose severity grows with the magnitude ("inc1").

    Raises:
        ValueError: `text` is no such policy, or its magnitude is above 10.

    >>> parse_policy("rand-m9-mstd0.5-inc1")
    Policy(magnitude=9.0, std=0.5, ops=2)
    """
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"randaugment: expected rand-m<magnitude>[-n<operations>][-mstd<deviation>]-inc1, such as "
            f"'rand-m9-mstd0.5-inc1', got {text!r}"
        )
    policy = Policy(float(match["magnitude"]), float(match["std"] or 0), int(match["ops"] or 2))
    if policy.magnitude > 10:
        raise ValueError(f"randaugment: expected a magnitude from 0 to 10, got {policy.magnitude:g} in {text!r}")
    return policy
