"""The model card of an export: what it is, what was measured, how it was trained. No paths of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import sinkroute
from sinkroute.lab.config import to_mapping
from sinkroute.lab.export.agreement import Agreement
from sinkroute.lab.trained import TrainedRun

__all__ = ["write_card"]

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- byte-level
- sinkroute
---

# {title}

A byte-level language model with {layers} layers of {experts} experts, {top_k} per byte, {total:,} parameters
({active:,} active per byte), exported from the sinkroute lab as `{architecture}`. A research model, of the size of an
experiment.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

- Ids are bytes. It was trained on windows of {length} bytes; beyond that length its positions are new to it.
- There is no symbol for the beginning or end of a text. A newline (id 10) stands for what is before it; `<|pad|>`
  (id 255, a byte that no UTF-8 text holds) is padding.
- In training its experts were balanced by `{router}`.

## Measured

{measures}

Against the model in the lab, both in float32 on {symbols:,} random bytes:

- logits, up to {logit_size:.1f} in size, differ by {usual_difference:.1e} at the median byte and
  {logit_difference:.1e} at most;
- the same next byte is best at {same_best:.2%}, the same experts are chosen at {same_experts:.2%}.

## Training

{checkpoint} of {steps:,} steps; text `{corpus}`, SHA-256 {sha256}; sinkroute {version}.

```yaml
{config}```
"""


def write_card(run: TrainedRun, architecture: str, agreement: Agreement, path: Path) -> None:
    """Write the card of an export of this run as that class of transformers."""
    corpus = json.loads((run.folder / "corpus.json").read_text(encoding="utf-8"))
    config = to_mapping(run.config)
    config["data"].pop("path")  # of the machine
    sizes = run.config.model
    path.write_text(
        _CARD.format(
            title=run.config.label or run.config.router.name,
            layers=sizes.layers,
            experts=sizes.experts,
            top_k=sizes.top_k,
            **run.model.count_parameters()._asdict(),
            architecture=architecture,
            length=run.config.data.length,
            router=run.config.router.name,
            measures=_measures(run),
            **vars(agreement),
            checkpoint=run.checkpoint.name,
            steps=run.config.train.steps,
            corpus=corpus["name"],
            sha256=corpus["sha256"],
            version=sinkroute.__version__,
            config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        ),
        encoding="utf-8",
    )


def _measures(run: TrainedRun) -> str:
    """The table of `result.json`, which is of the end of the training."""
    file = run.folder / "result.json"
    if run.step != run.config.train.steps or not file.exists():
        return "The run was not finished when it was exported; nothing was measured yet."
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = {"validation text": result["valid"], **{f"{name} text": found for name, found in result["attacked"].items()}}
    lines = ["| | bits per byte | bytes |", "|---|---|---|"]
    lines += [f"| {name} | {found['bits_per_byte']:.4f} | {found['bytes']:,} |" for name, found in rows.items()]
    load = result["serving"]
    lines += ["", f"Load when serving: MaxVio {load['max_vio']:.2f}, dead experts {load['dead']} of {load['experts']}."]
    return "\n".join(lines)
