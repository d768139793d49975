"""What `sinkroute.patch` makes of every family of the zoo.

python -m tests.adapters.hf.families > docs/families.md
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch
import transformers
from torch import Tensor

import sinkroute

from .zoo import FAMILIES, HIDDEN, VOCABULARY, Family


def page() -> str:
    """The page, in Markdown."""
    rows, patched = [], 0
    for family in sorted(FAMILIES, key=lambda family: family.name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = family.build()
        try:
            handle = sinkroute.patch(model, "ssr-l")
        except ValueError as error:
            rows.append((family.name, family.router_class, "", f"refused: {reason(str(error))}"))
            continue
        patched += 1
        kinds = Counter((rule.contract.name, str(rule)) for rule in handle.scorings.values())
        for contract, rule in kinds:
            rows.append((family.name, family.router_class, contract, rule))
    head = ("family", "router class", "returns", "rule in the tiny model")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(
        [
            "# Mixture-of-experts families of transformers and `sinkroute.patch`",
            "",
            f"transformers {transformers.__version__}: {patched} of {len(FAMILIES)} router classes are taken over. "
            "Written by",
            "`python -m tests.adapters.hf.families > docs/families.md` from tiny random models, whose sizes, groups "
            "and factors are",
            "the test's own: another configuration of a family may have another rule, which `print(handle)` shows.",
            "",
            *lines,
            "",
        ]
    )


def reason(message: str) -> str:
    """Why a model is refused, without the paths of its layers."""
    _, _, of_routers = message.partition("has no router that sinkroute can take over. ")
    if of_routers:
        return of_routers.partition("): ")[2].partition("; ")[0]
    return "it holds " + message.partition(" holds ")[2].partition(";")[0]


def many(family: Family, batch: int = 8, length: int = 48, seed: int = 7) -> dict[str, Tensor]:
    """Inputs as the family's own, of more tokens."""
    draw = torch.Generator().manual_seed(seed)
    given: dict[str, Tensor] = {}
    for name, value in family.inputs().items():
        if name.endswith("input_ids"):
            given[name] = torch.randint(3, VOCABULARY, (batch, length), generator=draw)
        elif name == "inputs_embeds":
            given[name] = torch.randn(batch, length, HIDDEN, generator=draw)
        elif name == "moe_mm_token_type_ids":
            given[name] = (torch.arange(length) % 3 == 0).int().expand(batch, -1)
        elif name == "pixel_values":
            given[name] = torch.randn(batch * length, value.shape[1], generator=draw)
        else:
            assert name == "grid_thw"
            given[name] = torch.tensor([[1, 4, 4]] * (batch * length // 16))
    return given


if __name__ == "__main__":
    print(page(), end="")
