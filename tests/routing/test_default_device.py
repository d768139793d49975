"""Routers and layers where the default device is another than that of their tensors: nothing is made on it."""

import json
import subprocess
import sys

import pytest

import sinkroute
from sinkroute.routing.registry import router_options

WAYS = {name: {} for name in sinkroute.list_routers()}
WAYS |= {
    f"{name}, {what}": options
    for name in sinkroute.list_routers()
    if "probability" in router_options(name)
    for what, options in {
        "plans": {"probability": 1.0},
        "adaptive": {"probability": "adaptive"},
        "gradient of a plan": {"probability": 1.0, "plan_gradient": "full", "weights": "plan"},
        "learned noise": {"noise": "learned"},
        "plans when serving": {"inference": "both"},
    }.items()
}
WAYS["softmax, all losses"] = {"losses": ["load-balance", "gshard", "global-load-balance", "importance", "z-loss"]}

# In a new process: the default device is the whole process's, and tensors of the meta device hold no values.
PROGRAM = """
import json, sys, traceback, warnings

import torch
import sinkroute

warnings.simplefilter("ignore")
ways = json.loads(sys.argv[1])
layers = {
    way: sinkroute.MoE(8, 8, 4, 2, way.partition(",")[0], router_options=options, bias=True, shared_hidden=4)
    for way, options in ways.items()
}
x, ids = torch.randn(9, 8), torch.arange(9)  # 18 choices: no multiple of 4
mask, counts = ids != 3, torch.arange(7.0)
torch.set_default_device("meta")
failed = {}


def use(layer):
    if hasattr(layer.gate, "balance"):
        layer.gate.balance(counts)
    with sinkroute.LoadMonitor(layer, "detailed") as monitor:
        for step in range(3):
            sinkroute.set_step(layer, step, total_steps=10)
            for token_mask in (None, mask):
                loss = layer(x, token_mask, token_ids=ids).square().sum()
                if layer.routes.aux_loss is not None:
                    loss = loss + layer.routes.aux_loss
                loss.backward()
        sinkroute.end_step(layer)
        monitor.metrics(), monitor.table(), monitor.probe(x, token_ids=ids)
    layer.eval()
    for token_mask in (None, mask):
        assert layer(x, token_mask, token_ids=ids).isfinite().all()
    layer.load_state_dict(layer.state_dict())
    for part in layer.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert layer.train()(x, token_ids=ids).device.type == "cpu"


for way, layer in layers.items():
    try:
        use(layer)
    except Exception:
        failed[way] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed():
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(WAYS)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_used_on_its_own_device_whatever_the_default_is(failed, way):
    assert way not in failed, failed[way]
