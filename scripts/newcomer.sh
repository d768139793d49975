#!/usr/bin/env bash
# How long a newcomer waits: a clone, an environment, the README's first snippet, a checkpoint of theirs patched.
#   scripts/newcomer.sh [FOLDER]     FOLDER, by default a new one, is left behind. PYTHON=python3.12 chooses another one
# Packages are downloaded before the clock starts, unless WHEELS=FOLDER has those of a former run; the build of torch is
# chosen by TORCH="torch==2.13.0 --index-url ...".
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
wheels=${WHEELS:-$folder/wheels}
torch=${TORCH:-torch}
if [ ! -d "$wheels" ]; then
    # shellcheck disable=SC2086
    "$python" -m pip download --quiet --disable-pip-version-check -d "$wheels" $torch
    "$python" -m pip download --quiet --disable-pip-version-check -d "$wheels" --find-links "$wheels" \
        "$here[hf]" "hatchling>=1.26" "${torch%% *}"
fi

timed() { # timed WORDS COMMAND...: run it, say how long it took
    local words=$1 start
    shift
    start=$(date +%s.%N)
    "$@"
    printf '%-34s %6.1f s\n' "$words" "$(echo "$(date +%s.%N) - $start" | bc)"
}

everything() {
    timed "git clone" git clone --quiet "$here" "$folder/clone"
    cd "$folder/clone"
    timed "an environment" "$python" -m venv .venv
    timed 'pip install ".[hf]", from wheels' .venv/bin/pip --disable-pip-version-check install --quiet \
        --no-index --find-links "$wheels" ".[hf]" "${torch%% *}"
    timed "the README's first snippet" .venv/bin/python - <<'SNIPPET'
import re
from pathlib import Path

exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[1])
model.save_pretrained("mine")
SNIPPET
    timed "from_pretrained, patch, a step" .venv/bin/python - <<'OWN'
import torch
import transformers

import sinkroute

model = transformers.AutoModelForCausalLM.from_pretrained("mine").train()
print(sinkroute.patch(model))
sinkroute.set_step(model, 0)
model(input_ids=(ids := torch.arange(64)[None]), labels=ids).loss.backward()
OWN
}

timed "all of it" everything
