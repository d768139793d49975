"""Every kind of tensor and transform into every public function: right, or refused by name; never a crash, never a lie.

Each group runs in a separate process (`tensors.py`), which says what it begins, so that a crash has a name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("tensors.py")
SECONDS = 600

USED = ["gathered", "negated", "spaced", "transposed", "parameter", "named", "expanded", "zero", "inference"]
HOLLOW = ["fake", "meta"]
REFUSED = ["masked", "distributed", "jagged", "nested", "sparse", "freed", "ended"]
FOLLOWED = ["grad", "jvp", "dual", "functionalize", "vmap"]
TRACED = ["jit.trace", "make_fx real", "make_fx fake", "make_fx symbolic"]
GROUPS = [USED + HOLLOW + REFUSED, FOLLOWED, TRACED]

# What is not to be done, and the words with which it is refused: (kinds, what a call's name has in it, words).
EXCEPTIONS = [
    (HOLLOW + TRACED + ["vmap"], ("expert-choice in training", "ssr-ec in training"), "cannot be looked at"),
    (["jvp", "dual"], ("solve differentiable", "MoE"), "take torch.func.vjp or jacrev"),
    (["meta"], ("token_mask", "token_mass", "expert_mass", "init"), "is on the meta device and holds no numbers"),
    # torch's own words from here on.
    (["functionalize"], ("MoE",), "Functionalize rule for custom_function_call"),
    (["functionalize"], ("in training",), "custom (non-ATen) operator whose output has alias annotations"),
    (["inference"], ("MoE token_mask", "LoadMonitor"), "Inference tensors cannot be saved for backward"),
]


def run(kinds: list[str], *options: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Kind → call → what was found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *kinds, *options]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert lines, ended.stderr
    last = lines[-1]
    assert ended.returncode == 0, f"{last['call']} died of {last['kind']}: {ended.returncode}\n{ended.stderr[-3000:]}"
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["kind"], {})[line["call"]] = line
    return found


@pytest.fixture(scope="module")
def sample() -> dict[str, dict[str, dict[str, Any]]]:
    return run([kind for group in GROUPS for kind in group if kind not in ("make_fx real", "make_fx fake")])


def complaints(kind: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """What is neither right nor refused in the right words."""
    wrong = []
    for call, result in results.items():
        said, found = result.get("said", ""), result["found"]
        words = [w for kinds, calls, w in EXCEPTIONS if kind in kinds and any(part in call for part in calls)]
        if kind in REFUSED:
            # An argument by its name, what it is, and what to pass instead.
            fine = found == "refused" and result["error"] == "TypeError" and "; pass " in said

        else:
            fine = found == "equal" or (found == "refused" and any(w in said for w in words))
        if not fine:
            wrong.append(f"{call}: {found} {result.get('error', '')} {said}")
    return wrong


@pytest.mark.parametrize(
    "kind", [kind for group in GROUPS for kind in group if kind not in ("make_fx real", "make_fx fake")]
)
def test_a_kind_of_tensor_is_right_or_refused_by_name(sample, kind):
    assert len(sample[kind]) > 10
    assert not complaints(kind, sample[kind])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=["tensors", "transforms", "tracers"])
def test_every_kind_is_right_or_refused_by_every_function(group):
    found = run(group, "--all")
    assert set(found) == set(group)
    assert not {kind: wrong for kind in group if (wrong := complaints(kind, found[kind]))}
