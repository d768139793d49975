"""Loads and what balance would change, against slow counts that share no code with the package."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sinkroute.adapters.hf.contracts import Decision, Site, Triple
from sinkroute.adapters.hf.scoring import Scoring, Source
from sinkroute.lab.inspect import InspectError, inspect_checkpoint
from sinkroute.lab.inspect.tally import Tallies, Tally

from .conftest import BOS, CONFIGS, SPECIAL, build, ids_of
from .oracle import best, chosen, logits_of, plan, softmax

Save = Callable[..., Path]


def windows_of(characters: str, length: int, count: int) -> list[list[int]]:
    ids = ids_of(characters)
    return [ids[place * length : (place + 1) * length] for place in range(count)]


@pytest.mark.parametrize("family", CONFIGS)
def test_loads_are_those_of_a_slow_loop(family: str, save: Save, text: Path, characters: str) -> None:
    audit = inspect_checkpoint(str(save(family)), text, tokens=110, length=10, batch=4)
    model = build(family)
    recorded = logits_of(model, windows_of(characters, 10, 11))
    gates = [part for part in model.modules() if hasattr(part, "e_score_correction_bias")]
    biases = [gate.e_score_correction_bias.tolist() for gate in gates] or [None] * len(recorded)
    assert len(audit.layers) == len(recorded) == 2
    for layer, logits, bias in zip(audit.layers, recorded, biases, strict=True):
        counts = Counter(expert for token in logits for expert in chosen(model.config, token, bias))
        assert layer.load is not None
        assert layer.load.tolist() == [counts[expert] for expert in range(8)]
        assert layer.tokens == 110
        assert layer.dead == [expert for expert in range(8) if not counts[expert]]
        assert layer.rule is not None


def test_a_bos_stands_before_each_window_and_is_not_counted(save: Save, text: Path, characters: str) -> None:
    audit = inspect_checkpoint(str(save("mixtral", bos=True)), text, tokens=40, length=9, batch=2)
    windows = [[BOS, *window] for window in windows_of(characters, 8, 5)]
    model = build("mixtral")
    assert (audit.setting.tokens, audit.setting.windows, audit.setting.bos) == (40, 5, True)
    for layer, logits in zip(audit.layers, logits_of(model, windows), strict=True):
        counts = Counter(
            expert for place, token in enumerate(logits) if place % 9 for expert in chosen(model.config, token)
        )
        assert layer.load is not None
        assert layer.load.tolist() == [counts[expert] for expert in range(8)]


def test_balanced_is_the_best_of_all_routings_with_equal_loads(save: Save, text: Path, characters: str) -> None:
    small = {"num_local_experts": 3, "num_experts_per_tok": 1}
    audit = inspect_checkpoint(str(save("mixtral", **small)), text, tokens=6, length=3, batch=2)
    for layer, logits in zip(
        audit.layers, logits_of(build("mixtral", **small), windows_of(characters, 3, 2)), strict=True
    ):
        scores = [softmax(token) for token in logits]
        own = [max(range(3), key=token.__getitem__) for token in scores]

        def total(routing: tuple[int, ...] | list[int], scores: list[list[float]] = scores) -> float:
            return sum(token[expert] for token, expert in zip(scores, routing, strict=True))

        balanced = [
            routing
            for routing in itertools.product(range(3), repeat=6)
            if all(routing.count(expert) == 2 for expert in range(3))
        ]
        routing = max(balanced, key=total)
        moved = sum(a != b for a, b in zip(own, routing, strict=True)) / 6
        found = layer.alternatives["balanced"]
        assert found.load.tolist() == [2, 2, 2]
        assert found.score_lost == pytest.approx(1 - total(routing) / total(own), abs=1e-6)
        assert (found.tokens_moved, found.choices_moved) == pytest.approx((moved, moved))
        assert (found.max_vio, found.max_vio_batch) == (0, 0)


@pytest.mark.parametrize(("name", "reg"), [("ssr-l", 0.5), ("ssr-s", 0.1)])
def test_ssr_is_the_top_k_of_a_plan_over_each_batch(
    name: str, reg: float, save: Save, text: Path, characters: str
) -> None:
    audit = inspect_checkpoint(str(save("olmoe")), text, tokens=60, length=10, batch=3)
    recorded = logits_of(build("olmoe"), windows_of(characters, 10, 6))
    for layer, logits in zip(audit.layers, recorded, strict=True):
        moved = kept = 0
        before = after = 0.0
        counts: Counter[int] = Counter()
        worst = []
        for batch in (logits[:30], logits[30:]):
            rows = plan([softmax(token) for token in batch] if name == "ssr-s" else batch, reg)
            single: Counter[int] = Counter()
            for token, row in zip(batch, rows, strict=True):
                own, other, scores = best(token, 3), best(row, 3), softmax(token)
                moved += own != other
                kept += len(own & other)
                before += sum(scores[expert] for expert in own)
                after += sum(scores[expert] for expert in other)
                single.update(other)
            counts += single
            worst.append(max(single.values()) / (30 * 3 / 8) - 1)
        found = layer.alternatives[name]
        assert found.tokens_moved == pytest.approx(moved / 60)
        assert found.choices_moved == pytest.approx(1 - kept / 180)
        assert found.score_lost == pytest.approx(1 - after / before, abs=1e-5)
        assert found.load.tolist() == [counts[expert] for expert in range(8)]
        assert found.max_vio_batch == pytest.approx(sum(worst) / 2)


@pytest.mark.parametrize("bias", [False, True])
def test_the_recommended_router_serves_what_follows_evenly(bias: bool) -> None:
    """Four batches of logits whose first experts are liked best, of a model with a correction bias and one without."""
    found = Scoring(Triple(), 8, 2, gate_weight=Source("host", "weight"))
    if bias:
        found = replace(found, score="sigmoid", correction=Source("host", "e_score_correction_bias"))
    tally = Tally(Site("gate", nn.Identity(), nn.Identity()), found, "drawn", 64, False, 0)
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(4):
        logits_TE = torch.randn(1024, 8, generator=generator) - 0.4 * torch.arange(8)
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(2)
        loads.append(experts_TK.flatten().bincount(minlength=8))
        tally.calls += 1
        tally.count(Decision(logits_TE, weights_TK, experts_TK))
    layer = tally.layer()
    dual = layer.alternatives["ssr-dual"]
    assert layer.kept_in == ("e_score_correction_bias" if bias else "weight")
    assert min(max(load.tolist()) / 256 - 1 for load in loads) > 1
    assert 0 < dual.max_vio_batch < 0.25  # of 256 tokens an expert; chance alone gives about 0.1
    assert dual.score_lost == pytest.approx(layer.alternatives["balanced"].score_lost, abs=0.03)
    assert int(dual.load.sum()) == 4 * 2048


def test_the_gates_entropy_is_of_its_scores_over_that_of_chance(save: Save, text: Path, characters: str) -> None:
    audit = inspect_checkpoint(str(save("mixtral")), text, tokens=40, length=10)
    for layer, logits in zip(audit.layers, logits_of(build("mixtral"), windows_of(characters, 10, 4)), strict=True):
        shares = torch.tensor(logits).softmax(-1)
        assert layer.gate_entropy == pytest.approx(
            (-(shares * shares.log()).sum(-1).mean() / torch.tensor(8).log()).item()
        )


@pytest.mark.parametrize("shards", ["5GB", "8KB"])
@pytest.mark.parametrize("family", CONFIGS)
def test_by_layer_counts_the_same_to_the_last(family: str, shards: str, save: Save, text: Path) -> None:
    folder = str(save(family, shards=shards, bos=True, tie_word_embeddings=shards == "8KB"))
    whole, layered = (
        inspect_checkpoint(folder, text, tokens=100, length=10, batch=4, by_layer=by) for by in (False, True)
    )
    assert [layer.json() for layer in layered.layers] == [layer.json() for layer in whole.layers]
    assert layered.setting.by_layer
    assert layered.setting.held_mb == pytest.approx(11 * 10 * 16 * 4 / 2**20)  # windows × length × width × float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SPECIAL)
def test_by_layer_reads_what_stands_apart_in_the_dtypes_of_the_whole(
    family: str, dtype: str, save: Save, text: Path
) -> None:
    folder = save(family)
    # On disk they are float32 always, so that what is rounded shows.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    whole, layered = (inspect_checkpoint(str(folder), text, tokens=200, length=20, by_layer=by) for by in (False, True))
    assert whole.setting.dtype == layered.setting.dtype == dtype
    assert [layer.json() for layer in layered.layers] == [layer.json() for layer in whole.layers]


def test_the_json_has_all_there_is_and_is_json(save: Save, text: Path) -> None:
    found = json.loads(json.dumps(inspect_checkpoint(str(save("mixtral")), text, tokens=40, length=10).json()))
    assert {
        "format",
        "model",
        "text",
        "tokens",
        "seconds",
        "peak_memory_mb",
        "checkpoint_mb",
        "summary",
        "layers",
    } <= set(found)
    assert (found["format"], found["summary"]["layers"], found["summary"]["experts"]) == (2, 2, 16)
    layer = found["layers"][0]
    assert layer["path"] == "model.layers.0.mlp.gate"
    assert (layer["experts"], layer["top_k"], sum(layer["load"])) == (8, 2, 80)
    assert set(layer["alternatives"]) == {"ssr-l", "ssr-s", "ssr-dual", "balanced"}
    vio = [one["max_vio"] for one in found["layers"]]
    assert found["summary"]["max_vio_mean"] == pytest.approx(sum(vio) / 2)
    assert found["summary"]["max_vio_worst"] == max(vio)


def test_a_model_without_experts_is_refused(save: Save, text: Path, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)  # weights are not even looked for
    folder = save("mixtral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InspectError, match="LlamaForCausalLM holds no mixture of experts"):
        inspect_checkpoint(str(tmp_path), text, tokens=40, length=10)


class _Odd(nn.Module):
    """A router whose weights follow no known rule; its choices can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = hidden_TD @ self.weight.t()
        values_TK, experts_TK = logits_TE.topk(2)
        return logits_TE, values_TK.sin() ** 2 + experts_TK, experts_TK


class _Block(nn.Module):
    def __init__(self, called: bool) -> None:
        super().__init__()
        self.gate, self.called = _Odd(), called
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden_TD: torch.Tensor) -> Any:
        return self.gate(hidden_TD) if self.called else hidden_TD


def test_a_router_that_is_not_understood_is_counted_and_named() -> None:
    model = nn.Sequential(_Block(called=True))
    tokens_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    with Tallies(model, "odd", 4, False) as tallies:
        model(tokens_TD)
    (layer,) = tallies.layers()
    assert layer.load is not None
    counts = Counter((tokens_TD @ model[0].gate.weight.t()).topk(2).indices.flatten().tolist())
    assert layer.load.tolist() == [counts[expert] for expert in range(4)]
    assert (layer.rule, layer.alternatives, layer.gate_entropy) == (None, {}, None)
    assert layer.reason is not None and "no known rule" in layer.reason


def test_a_router_that_is_never_called_says_so_and_hooks_are_gone_afterwards() -> None:
    model = nn.Sequential(_Block(called=False))
    with Tallies(model, "odd", 4, False) as tallies:
        model(torch.randn(4, 8))
    (layer,) = tallies.layers()
    assert layer.load is None
    assert layer.reason is not None and "never called" in layer.reason
    assert not model[0].gate._forward_hooks


def test_a_router_that_sees_other_tokens_is_refused() -> None:
    model = nn.Sequential(_Block(called=True))
    with (
        Tallies(model, "odd", 5, False),
        pytest.raises(InspectError, match="12 tokens, which are no whole windows of 5"),
    ):
        model(torch.randn(12, 8))
