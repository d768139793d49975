"""Run the property tests round after round, each round with other examples, until a failure or the end of the time.

    python scripts/fuzz.py [--minutes 30] [--seed 1] [pytest's arguments]

A round of seed S is `pytest --fuzz S` (conftest.py): the same seed gives the same examples again. If a test fails, the
last lines say how to pin what was found.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import time

# Without doctests, which nothing can vary: half of the time to collect.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers --import-mode=importlib"]
TESTS_FAILED = 1  # pytest's exit code; its others are of runs that did not take place
PIN = """
fuzz: a test failed with seed {seed}. To pin that in `make test`:
  1. see it again:  make fuzz SEED={seed} ARGS=tests/.../test_file.py::name_of_the_test
  2. put what "Falsifying example" shows above the test, as @hypothesis.example(...): it runs first in every run.
     If that cannot be written down, put the line @reproduce_failure(...) there until the fault is mended.
  3. mend the fault; make test"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no round starts after so many minutes")
    parser.add_argument("--seed", type=int, help="of the only round (default: one random seed after the other)")
    options, arguments = parser.parse_known_args()
    start, rounds = time.monotonic(), 0
    while rounds == 0 or (options.seed is None and time.monotonic() - start < 60 * options.minutes):
        seed = secrets.randbelow(2**32) if options.seed is None else options.seed
        rounds += 1
        print(f"fuzz: round {rounds}, seed {seed}, after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        code = subprocess.run([*PYTEST, "--fuzz", str(seed), *arguments]).returncode
        if code == TESTS_FAILED:
            print(PIN.format(seed=seed))
        if code:
            return code
    print(f"fuzz: {rounds} rounds in {(time.monotonic() - start) / 60:.1f} minutes, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
