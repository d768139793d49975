"""torchtitan's Trainer on four CPUs, layout by layout and method by method, against one process.

    python tests/peers/torchtitan_matrix.py --out found.json          all of it, some minutes a layout
    python tests/peers/torchtitan_matrix.py --layout dp4 --write      one, and the table of docs/torchtitan.md

A cell trains three steps of torchtitan's deepseek_v3 debug model (four layers, dense attention) with its Trainer, and
goes on from the checkpoint of step 2 on two processes and on one. It is right if

- the blocks have the same numbers in whatever stage they are;
- ranks that hold the same tokens give them the same experts, to the last bit;
- each token is counted once: the loads of a layer add up to tokens · k, and are those that were chosen;
- the choices are those of a router in one process that is given all tokens, noise of each rank included;
- the losses are those of one process, and a bias that the router learns is near that of one process;
- a resumed run begins with the learned bias, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sinkroute
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.routers.ssr_dual import SSRDualRouter

HERE = Path(__file__).parent
FOUND = HERE / "torchtitan_matrix.json"
PAGE = HERE.parents[1] / "docs" / "torchtitan.md"
BEGIN, END = "<!-- the matrix, by tests/peers/torchtitan_matrix.py -->\n", "<!-- end of the matrix -->\n"

LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {"dp_degree": 4},
    "dp2·ep2": {"dp_degree": 4, "expert_parallel_degree": 2},
    "dp2·tp2": {"dp_degree": 2, "tensor_parallel_degree": 2},
    "dp2·tp2·ep2": {"dp_degree": 2, "tensor_parallel_degree": 2, "expert_parallel_degree": 2},
    "pp2·dp2": {"dp_degree": 2, "pipeline_parallel_degree": 2},
}
METHODS = ("ssr-l", "ssr-dual", "loss-free")
STEPS, SAVED, LIMIT_S = 3, 2, 1500
EXPERTS, TOP_K, TOKENS, LAYERS = 8, 3, 128, [1, 2, 3]
# Experts are bfloat16 to torchtitan. Where tokens are added up in other orders, losses differ by that; and where noise
# is drawn by the rank, by that.
SAME_LOSS = {"ssr-l": 1e-2, "ssr-dual": 4e-3, "loss-free": 4e-3}
# How far the learned bias may be from that of one process, of the largest. So few tokens say no more of potentials than
# that; and with ssr-l the bias is torchtitan's, which follows other noise.
SAME_BIAS = {"ssr-dual": 0.3, "loss-free": 1e-3}


class Place(Ranks):
    """A place among ranks, to draw that rank's noise."""

    def __init__(self, place: int) -> None:
        super().__init__(None)
        self.place = place

    @property
    def rank(self) -> int:
        return self.place


def train(folder: Path, cell: dict[str, Any], processes: int) -> None:
    """Processes of a cell's, which torchtitan wants fresh: its meshes are of one Trainer.

    Raises:
    RuntimeError: with what the first process said that failed.
    """
    import torchtitan_rank  # noqa: F401 - once, for all that are forked

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    logs = [folder / f"{cell['name']}-{rank}.log" for rank in range(processes)]
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=_one, args=(rank, processes, port, log, cell)) for rank, log in enumerate(logs)]
    for process in running:
        process.start()
    ends = time.monotonic() + LIMIT_S
    try:
        while any(process.is_alive() for process in running):
            time.sleep(0.2)
            failed = [log for process, log in zip(running, logs, strict=True) if process.exitcode]
            if failed or time.monotonic() > ends:
                time.sleep(2)
                said = (failed or logs)[0].read_text(encoding="utf-8")[-3000:]
                raise RuntimeError(said if failed else f"no end in {LIMIT_S} s: {said}")
    finally:
        for process in running:
            process.kill()
            process.join()


def _one(rank: int, processes: int, port: str, log: Path, cell: dict[str, Any]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in mine.items()}
    import torchtitan_rank

    torchtitan_rank.train(cell, log.parent)


def read(folder: Path, name: str, processes: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]


# -- what is right ---------------------------------------------------------------------------------------------------


def differences(layout: str, four: list[Any], two: list[Any], one: list[Any], alone: Any) -> list[str]:
    """What is not as it should be, in words."""
    wrong = []
    stages: dict[int, list[Any]] = {}
    for rank in four:
        stages.setdefault(rank["places"]["pp"], []).append(rank)
    if sorted(layer for ranks in stages.values() for layer in ranks[0]["layers"].values()) != LAYERS:
        wrong.append(f"layers are numbered {[ranks[0]['layers'] for ranks in stages.values()]}")
    for ranks in stages.values():
        if any(rank["layers"] != ranks[0]["layers"] for rank in ranks):
            wrong.append("ranks of a stage number their layers otherwise")
            continue
        wrong += _replicas(layout, ranks)
        others = ranks if "tp" not in layout or "ep" in layout else [r for r in ranks if r["places"]["tp"] == 0]
        others.sort(key=lambda rank: rank["noise_rank"])
        wrong += _counts(others) + _choices(others)
        last = [rank["biases"][-1] for rank in ranks]
        if any(
            not torch.equal(biases[layer], last[0][layer]) for biases in last for layer in LAYERS if layer in biases
        ):
            wrong.append("ranks of a stage have learned other biases")
    for name, ranks in (("two processes", two), ("one process", one)):
        wrong += _resumed(name, four, ranks)
    wrong += _losses("one process", four[0]["method"], alone["losses"], four[-1]["losses"])
    if alone["options"] != four[0]["options"]:
        wrong.append("other options")
    return wrong


def _replicas(layout: str, ranks: list[Any]) -> list[str]:
    if "tp" not in layout or "ep" in layout:
        return []
    by_place: dict[int, list[Any]] = {}
    for rank in ranks:
        by_place.setdefault(rank["places"]["batch"], []).append(rank)
    same = all(
        torch.equal(call[part], other[part])
        for replicas in by_place.values()
        for replica in replicas[1:]
        for call, other in zip(replicas[0]["calls"], replica["calls"], strict=True)
        for part in ("logits", "experts")
    )
    return [] if same else ["ranks with the same tokens give them other experts"]


def _counts(others: list[Any]) -> list[str]:
    found: dict[tuple[int, int], torch.Tensor] = {}
    for rank in others:
        for call in rank["calls"]:
            key = call["layer"], call["step"]
            load_E = call["experts"].flatten().bincount(minlength=EXPERTS)
            found[key] = found.get(key, torch.zeros(EXPERTS, dtype=torch.int64)) + load_E
    wrong = [f"{key}: {load.sum()} choices, not {TOKENS * TOP_K}" for key, load in found.items() if load.sum() != 384]
    for rank in others:
        for layer, loads in rank["loads"].items():
            for step, load in enumerate(loads, 1):
                if not torch.equal(load, found[layer, step]):
                    wrong.append(
                        f"layer {layer}, step {step}: counted {load.tolist()}, not {found[layer, step].tolist()}"
                    )
    return wrong


def _choices(others: list[Any]) -> list[str]:
    """By one router for each layer, which has all tokens."""
    options = {name: getattr(others[0]["options"], name) for name in vars(others[0]["options"])}
    options |= {"process_group": None}
    method = others[0]["method"]
    wrong = []
    for layer in others[0]["layers"].values():
        rounds = list(zip(*[[c for c in rank["calls"] if c["layer"] == layer] for rank in others], strict=True))
        router = sinkroute.create_router(method, num_experts=EXPERTS, top_k=TOP_K, **(options | {"layer": layer}))
        for calls in rounds:
            first = calls[0]
            if len({(call["step"], call["micro_batch"], call["branch"]) for call in calls}) > 1:
                return ["ranks are in different steps or branches"]
            sinkroute.set_step(router, first["step"], first["micro_batch"], total_steps=STEPS)
            router.correction_E = first["correction"]
            mine = _choose(router, calls)
            theirs = torch.cat([call["experts"] for call in calls])
            off = (mine.sort().values != theirs.sort().values).any(1).sum().item()
            if off:
                wrong.append(
                    f"layer {layer}, step {first['step']}, {first['branch']}: {off} of {len(mine)} choices differ"
                )
    return wrong


def _choose(router: Any, calls: tuple[dict[str, Any], ...]) -> torch.Tensor:
    """(T, K) the choices of one process for the tokens of all ranks, each with the noise of its rank."""
    if isinstance(
        router, SSRDualRouter
    ):  # it looks at the margins of each rank's tokens, and learns a little otherwise
        router.state.bias_E.copy_(calls[0]["bias"])
        return router.topk(torch.cat([call["logits"] for call in calls])).experts
    if router.state is not None:
        if any(not torch.equal(call["bias"], router.state.bias_E) for call in calls):
            return torch.full((len(calls) * len(calls[0]["logits"]), TOP_K), -1)  # nobody has learned that
        return router(torch.cat([call["logits"] for call in calls])).experts
    if calls[0]["branch"] != "sinkhorn":
        found = []
        for place, call in enumerate(calls):
            router.ranks = router.ranks._replace(noise=Place(place))
            found.append(router(call["logits"]).experts)
        return torch.cat(found)
    noisy = []
    for place, call in enumerate(calls):
        router.ranks = router.ranks._replace(noise=Place(place))
        noisy.append(router.with_noise(call["logits"]))
    return router.route_by_plan(torch.cat(noisy), None, noisy=False).experts


def _resumed(name: str, four: list[Any], ranks: list[Any]) -> list[str]:
    saved: dict[int, torch.Tensor] = {}
    for rank in four:
        saved |= rank["biases"][SAVED]
    wrong = [
        f"resumed on {name}: the bias of layer {layer} is {bias.tolist()}, not {saved[layer].tolist()}"
        for rank in ranks
        for layer, bias in rank["biases"][0].items()
        if not torch.equal(bias, saved[layer])
    ]
    return wrong + _losses(f"resumed on {name}", four[0]["method"], ranks[0]["losses"], four[-1]["losses"][SAVED:])


def _losses(name: str, method: str, found: list[float], expected: list[float]) -> list[str]:
    return [] if _off(found, expected) < SAME_LOSS[method] else [f"{name}: losses {found}, not {expected}"]


def _off(found: list[float], expected: list[float]) -> float:
    return round(max(abs(mine / theirs - 1) for mine, theirs in zip(found, expected, strict=True)), 5)


def _bias_off(alone: dict[str, Any], four: list[Any]) -> float:
    """How far the bias of four processes is from that of one in the end, of the largest."""
    largest = max(bias.abs().max().item() for bias in alone["biases"][-1].values())
    off = [(b - alone["biases"][-1][layer]).abs().max() for rank in four for layer, b in rank["biases"][-1].items()]
    return round(max(off).item() / largest, 3)


# -- all cells -------------------------------------------------------------------------------------------------------


def run(layout: str, method: str, folder: Path) -> dict[str, Any]:
    """A cell: trained on four processes, gone on with on two and on one, and trained on one."""
    folder.mkdir(parents=True, exist_ok=True)
    cell = {"name": method, "run": method, "method": method, "steps": STEPS, "layout": LAYOUTS[layout]}
    resumed = {"load_step": SAVED, "first_step": SAVED + 1}
    since, failed = time.monotonic(), None
    try:
        train(folder, cell, 4)
        train(folder, cell | resumed | {"name": f"{method}-two", "layout": {"dp_degree": 2}}, 2)
        train(folder, cell | resumed | {"name": f"{method}-one", "layout": {"dp_degree": 1}}, 1)
        alone = f"{method}-alone"  # the same whatever the layout
        if not (folder.parent / f"{alone}-0.pt").exists():
            train(folder.parent, cell | {"name": alone, "run": alone, "layout": {"dp_degree": 1}}, 1)
    except RuntimeError as error:
        failed = str(error)
    found = judge(layout, method, folder, failed)
    return {"cell": [layout, method], **found, "seconds": round(time.monotonic() - since, 1)}


def judge(layout: str, method: str, folder: Path, failed: str | None = None) -> dict[str, Any]:
    try:
        two, one = read(folder, f"{method}-two", 2), read(folder, f"{method}-one", 1)
        alone, four = read(folder.parent, f"{method}-alone", 1), read(folder, method, 4)
    except FileNotFoundError:
        return {"found": "failed", "said": [failed or "nothing was written"]}
    for rank in four:
        rank["method"] = method
    wrong = differences(layout, four, two, one, alone[0])
    figures = {"loss_off": _off(alone[0]["losses"], four[-1]["losses"]), "bias_off": _bias_off(alone[0], four)}
    if figures["bias_off"] > SAME_BIAS.get(method, math.inf):
        wrong.append(f"the learned bias is {figures['bias_off']} of the largest from that of one process")
    return {"found": "wrong" if wrong else "right", "said": wrong[:5], **figures}


def render(rows: list[dict[str, Any]]) -> str:
    found = {tuple(row["cell"]): row["found"] for row in rows}
    counts = {kind: list(found.values()).count(kind) for kind in ("right", "refused", "wrong", "failed")}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    lines = [f"{len(found)} cells: {told}.", "", "| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for layout in LAYOUTS:
        lines.append(f"| {layout} | " + " | ".join(found.get((layout, method), "–") for method in METHODS) + " |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]]) -> None:
    known = {tuple(row["cell"]): row for row in json.loads(FOUND.read_text(encoding="utf-8"))} if FOUND.exists() else {}
    known |= {tuple(row["cell"]): row for row in rows}
    ordered = [known[layout, method] for layout in LAYOUTS for method in METHODS if (layout, method) in known]
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    FOUND.write_text(text + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + render(ordered) + END + rest.partition(END)[2], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", nargs="*", choices=[*LAYOUTS], default=[*LAYOUTS])
    parser.add_argument("--method", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--folder", type=Path, help="where runs go, and stay")
    parser.add_argument("--judge", action="store_true", help="what is in the folder already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true", help=f"into {FOUND.name} and the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for layout in args.layout:
            folder = (args.folder or Path(temporary)) / layout.replace("·", "-")
            if args.judge:
                rows += [{"cell": [layout, m], **judge(layout, m, folder), "seconds": None} for m in args.method]
                continue
            for method in args.method:
                rows.append(run(layout, method, folder))
                print(*rows[-1].values(), flush=True)
                if args.write:
                    write(rows[-1:])
    if args.judge:
        print(*rows, sep="\n")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    if args.judge and args.write:
        write(rows)
    return any(row["found"] in ("wrong", "failed") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
