#!/usr/bin/env bash
# omni-train on N processes of this machine: launchers/local.sh 2 train stage=text_pretrain …
# Exits with the code of the first rank that fails; SIGTERM, SIGUSR1 and Ctrl-C reach every rank.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Never another python than one that is named.
python=${OMNI_TRAIN_PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: $python: no such program; \`make setup\` makes .venv, and OMNI_TRAIN_PYTHON may name another python" >&2
    exit 2
fi
export PYTHONSAFEPATH=1 # modules in the folder that this is started in are not ours

if [[ ${1:-} == 1 ]]; then
    shift
    exec "$python" -m omni_train "$@"
fi
exec "$python" -m omni_train.launch "$@"
