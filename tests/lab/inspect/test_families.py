"""Every router class of the installed transformers, in small models as checkpoints: both ways of reading them agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sinkroute.lab.inspect import InspectError, inspect_checkpoint

from ...adapters.hf.zoo import FAMILIES, VOCABULARY, Family

# What inspect says of models that it does not take.
REFUSED = {
    "doge": "holds no mixture of experts",
    "dots3_note.vision": "cannot be run: TypeError",
    "nllb_moe": "encoder-decoder",
    "qwen3_omni_moe.talker": "cannot be run: AttributeError",
    "switch_transformers": "encoder-decoder",
}


def saved(family: Family, folder: Path) -> str:
    family.build().save_pretrained(folder)
    # Fewer than the model has, and ASCII: some tokenizer classes add tokens and take text as bytes.
    letters = {chr(ord("!") + place): place for place in range(VOCABULARY - 4)}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    # Ids with a special meaning left out.
    ids = torch.randint(3, len(letters), (96,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text("".join(chr(ord("!") + place) for place in ids), encoding="utf-8")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param(one, id=one.name) for one in FAMILIES])
def test_by_layer_equals_the_whole_in_every_number(family: Family, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)

    def audit(by_layer: bool) -> Any:
        found = inspect_checkpoint(folder, tmp_path / "text.txt", length=12, batch=3, by_layer=by_layer)
        return json.loads(json.dumps([layer.json() for layer in found.layers]))

    if family.name in REFUSED:
        with pytest.raises(InspectError, match=re.escape(REFUSED[family.name])):
            audit(by_layer=False)
        return
    whole = audit(by_layer=False)
    assert whole
    assert audit(by_layer=True) == whole
