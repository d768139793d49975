"""What transformers loads from an export computes what the lab's model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkroute.lab.export import ExportError, export_run
from sinkroute.lab.trained import TrainedRun
from sinkroute.routing import list_routers

MIXTRAL, QWEN, ERNIE, GLM = "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Ernie4_5_MoeForCausalLM", "Glm4MoeForCausalLM"
SIGMOID = {"score": "sigmoid"}

CASES = [
    ("ssr-s", {}, {}, MIXTRAL),
    ("softmax", {"route_scale": 2.5}, {"top_k": 3}, MIXTRAL),
    ("softmax", {}, {"top_k": 1}, QWEN),
    ("ssr-l", {"norm_topk": False}, {}, QWEN),
    ("load-balance", {}, {"shared_hidden": 24}, QWEN),
    ("loss-free", {}, {}, ERNIE),
    ("loss-free", {"route_scale": 0.7}, {"shared_hidden": 24}, ERNIE),
    ("loss-free", SIGMOID, {}, GLM),
    ("loss-free", {**SIGMOID, "norm_topk": False, "route_scale": 1.7}, {"shared_hidden": 24}, GLM),
    ("loss-free", {**SIGMOID, "groups": 4, "top_groups": 2}, {"shared_hidden": 16}, GLM),
    ("ssr-s", {**SIGMOID, "groups": 8, "top_groups": 2, "group_score": "max"}, {}, GLM),
    ("quantile", {**SIGMOID, "scope": "batch"}, {}, GLM),
    ("base", {}, {"top_k": 1}, GLM),
    ("softmax", {}, {"vocab": 300, "heads": 4}, MIXTRAL),
]


def load(run: TrainedRun, folder: Path) -> PreTrainedModel:
    export_run(run, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def symbols(rows: int, length: int) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize(("router", "options", "sizes", "architecture"), CASES)
def test_logits_and_best_bytes_are_those_of_the_lab(
    make_run: Any, tmp_path: Path, router: str, options: dict[str, Any], sizes: dict[str, Any], architecture: str
) -> None:
    run = make_run(router, options, **sizes)
    exported = load(run, tmp_path / "hf")
    assert type(exported).__name__ == architecture
    text = symbols(6, 48)
    expected, found = run.model.eval()(text), exported(text).logits
    assert expected.abs().max() > 3  # or little would show
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("router", "options"), [("ssr-s", {}), ("loss-free", {}), ("loss-free", SIGMOID)])
def test_padding_changes_nothing_for_the_symbols_beside_it(
    make_run: Any, tmp_path: Path, router: str, options: dict[str, Any], side: str
) -> None:
    run = make_run(router, options)
    exported = load(run, tmp_path / "hf")
    text, padding = symbols(1, 20), torch.full((1, 9), 255)
    mask = torch.cat((torch.ones(1, 20), torch.zeros(1, 9)), dim=1).long()
    if side == "left":
        found = exported(torch.cat((padding, text), 1), attention_mask=mask.flip(1)).logits[:, 9:]
    else:
        found = exported(torch.cat((text, padding), 1), attention_mask=mask).logits[:, :20]
    torch.testing.assert_close(found, run.model.eval()(text), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("router", "options"), [("ssr-s", {}), ("loss-free", {}), ("loss-free", SIGMOID)])
def test_generation_continues_as_the_lab_does_with_and_without_a_cache(
    make_run: Any, tmp_path: Path, router: str, options: dict[str, Any]
) -> None:
    run = make_run(router, options)
    exported = load(run, tmp_path / "hf")
    text = expected = symbols(2, 10)
    for _ in range(20):
        expected = torch.cat((expected, run.model.eval()(expected)[:, -1:].argmax(-1)), dim=1)
    for use_cache in (True, False):
        found = exported.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=20, do_sample=False, use_cache=use_cache
        )
        assert torch.equal(found, expected)


def test_generation_without_a_prompt_begins_with_a_newline(make_run: Any, tmp_path: Path) -> None:
    exported = load(make_run(), tmp_path / "hf")
    assert exported.generate(max_new_tokens=2, do_sample=False)[0, 0] == ord("\n")


def test_the_file_has_the_tensors_that_mixtral_checkpoints_have(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    export_run(run, tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        up = file.get_tensor("model.layers.1.block_sparse_moe.experts.5.w3.weight")
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert torch.equal(up, run.model.moe_layers[1].experts.w_in[5, 16:])
    assert not list((tmp_path / "hf").glob("*.py")) + list((tmp_path / "hf").glob("*.bin"))


@pytest.mark.parametrize("router", list_routers())
def test_every_router_is_exported_or_refused_by_name(make_run: Any, tmp_path: Path, router: str) -> None:
    run = make_run(router)
    # By its default options.
    serving = run.model.moe_layers[0].router.serving()
    if serving is None or (serving.on == "logits" and not serving.plain and serving.bias_E.any()):
        with pytest.raises(ExportError, match=f"router '{router}' cannot be exported: "):
            export_run(run, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    else:
        assert export_run(run, tmp_path / "hf").agreement.logit_difference < 1e-4


def test_a_new_router_that_keeps_a_bias_is_exported_without_an_edit_here(
    make_run: Any, tmp_path: Path, newcomer: str
) -> None:
    exported = export_run(make_run(newcomer), tmp_path / "hf")
    assert exported.architecture == ERNIE
    assert exported.agreement.logit_difference < 1e-4


def test_ssr_bias_is_exported_where_it_serves_without_its_bias(make_run: Any, tmp_path: Path) -> None:
    run = make_run("ssr-bias", {"serve_with": "plain"})
    assert export_run(run, tmp_path / "hf").agreement.logit_difference < 1e-4


@pytest.mark.parametrize(
    ("router", "options", "architecture"),
    [
        ("ssr-bias", {"bias_on": "scores"}, "Ernie4_5_MoeForCausalLM"),
        ("ssr-bias", {"bias_on": "scores", **SIGMOID}, "Glm4MoeForCausalLM"),
        ("ssr-fold", {"gate": "plain"}, "MixtralForCausalLM"),
    ],
)
def test_what_a_plan_found_is_exported_in_a_correction_bias_or_a_plain_gate(
    make_run: Any, tmp_path: Path, router: str, options: dict[str, Any], architecture: str
) -> None:
    exported = export_run(make_run(router, options), tmp_path / "hf")
    assert exported.architecture == architecture
    assert exported.agreement.logit_difference < 1e-4


def test_ssr_fold_is_refused_once_its_gate_has_a_bias(make_run: Any, tmp_path: Path) -> None:
    run = make_run("ssr-fold")
    run.model.moe_layers[1].gate.bias.data[3] = 0.5
    with pytest.raises(ExportError, match=r"router 'ssr-fold' cannot be exported: its gate has a bias"):
        export_run(run, tmp_path / "hf")


@pytest.mark.parametrize(
    ("router", "options", "sizes", "message"),
    [
        ("softmax", {}, {"activation": "gelu"}, r"model.activation='gelu' .* train with \"swiglu\""),
        ("ssr-s", {"inference": "sinkhorn"}, {}, r"with inference='sinkhorn': .*; inference=\"none\" can be exported"),
        ("ssr-s", {"groups": 4, "top_groups": 2}, {}, r"groups=4 with a softmax .* DeepSeek-V2"),
        ("ssr-s", {**SIGMOID, "groups": 4, "top_groups": 2, "group_score": "max"}, {}, r"group_score='max'"),
        ("loss-free", {"norm_topk": False}, {}, "not renormalised cannot be exported"),
        ("quantile", SIGMOID, {}, r"its bias is added to the logits, .*; scope=\"batch\" can"),
        ("ssr-bias", {}, {}, r"its bias is added to the logits, .*; serve_with=\"plain\" or bias_on=\"scores\" can"),
    ],
)
def test_what_no_architecture_computes_is_refused_with_the_reason(
    make_run: Any, tmp_path: Path, router: str, options: dict[str, Any], sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_run(make_run(router, options, **sizes), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
