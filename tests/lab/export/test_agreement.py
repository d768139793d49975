"""The measure of an export notices what differs."""

from __future__ import annotations

from typing import Any

import torch

from sinkroute.lab.export.agreement import measure_agreement
from sinkroute.lab.export.architectures import convert


def test_the_same_model_agrees_everywhere(make_run: Any) -> None:
    run = make_run()
    found = measure_agreement(run.model, convert(run.model, run.config), 48)
    assert found.symbols == 8 * 48
    assert found.logit_difference < 1e-4
    assert (found.same_best, found.same_experts) == (1.0, 1.0)


def test_a_layer_whose_experts_were_renamed_agrees_in_the_other_layers_experts_only(make_run: Any) -> None:
    # With experts and gate in another order the layer computes the same, by experts of other numbers.
    run = make_run(top_k=1, experts=2)
    model = convert(run.model, run.config)
    mixture = model.model.layers[1].mlp
    with torch.no_grad():
        for tensor in (mixture.gate.weight, mixture.experts.gate_up_proj, mixture.experts.down_proj):
            tensor.copy_(tensor.flip(0))
    found = measure_agreement(run.model, model, 48)
    assert found.logit_difference < 1e-4
    assert found.same_experts == 0.5


def test_differences_are_the_largest_and_the_median_symbols(make_run: Any) -> None:
    run = make_run()
    model = convert(run.model, run.config)
    with torch.no_grad():
        model.lm_head.weight[7] += 1.0  # one logit of every symbol, by the sum of what is normed
    found = measure_agreement(run.model, model, 48)
    assert found.logit_difference > found.usual_difference > 0.01
