#!/usr/bin/env bash
# `omni-train launch` with the python of .venv: launchers/local.sh 2 train stage=text_pretrain …
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Never another python than one that is named.
python=${OMNI_TRAIN_PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: $python: no such program; \`make setup\` makes .venv, and OMNI_TRAIN_PYTHON may name another python" >&2
    exit 2
fi
export PYTHONSAFEPATH=1 # modules in the folder that this is started in are not ours

exec "$python" -m omni_train launch "$@"
