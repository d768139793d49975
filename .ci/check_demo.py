"""Check what a short `sinkroute demo` left behind: all methods finished, with finite numbers and a whole report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

METHODS = {"softmax", "load-balance", "loss-free", "quantile", "ssr-l", "ssr-dual"}


def main(folder: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    found = {result["method"] for result in results}
    assert found == METHODS, f"methods {found ^ METHODS} are missing or unexpected in {folder}"
    for result in results:
        for bits in (result["valid"]["bits_per_byte"], result["attacked"]["word-swap"]["bits_per_byte"]):
            assert math.isfinite(bits) and 1 < bits < 8, f"{result['method']}: {bits} bits per byte"
        assert result["train"]["peak_memory_mb"] <= 3 * 1024, f"{result['method']} needs more than 3 GB"
        assert result["valid"]["bytes"] == 304_487, "not every validation byte was evaluated"
    steps = {result["method"]: result["sinkhorn_steps"] for result in results}
    assert steps["softmax"] == 0 and steps["ssr-l"] > 0, steps
    # In training: after so few steps the average that serves has not caught up with a gate that moves fast.
    vio = {result["method"]: result["train"]["max_vio"] for result in results}
    assert vio["ssr-dual"] < 0.75 * vio["softmax"], f"the recommended router does not balance: {vio}"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>"), "the report is cut off"
    assert 'src="http' not in page and 'href="http' not in page, "the report reaches for the network"
    missing = [method for method in METHODS if method not in page]
    assert not missing, f"the report does not show {missing}"
    print(f"demo: {len(results)} methods, report of {len(page) / 1e6:.1f} MB: good")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
