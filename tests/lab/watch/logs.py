"""Logs as runs write them, made by hand."""

import json

import yaml


def train_line(step, *, loss=None, load=((6, 2, 0, 0), (2, 2, 2, 2)), **more):
    line = {"kind": "train", "step": step, "loss": 5.0 - step / 100 if loss is None else loss, "seconds": step / 10}
    line |= {"max_vio": [2.0, 0.0], "load": [list(row) for row in load], "tokens_per_second": 1000.0}
    return json.dumps(line | {"branches": {"softmax": 3, "sinkhorn": 1}} | more) + "\n"


def make_run(folder, steps=100, name="ssr-l", lines=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"router": {"name": name}, "train": {"steps": steps}}))
    if lines:
        (folder / "log.jsonl").write_text("".join(lines))
    return folder
