#!/usr/bin/env bash
# launchers/gpu_check.sh [PART …]: the GPU check on this machine, with the wheels of gpu_wheels/ (`make gpu-wheels`).
# Needs PyTorch 2.11 or newer, in .venv or where OMNI_TRAIN_PYTHON=python3 says, and no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${OMNI_TRAIN_PYTHON:-$PWD/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: $python: no such program; \`make setup\` makes .venv, and OMNI_TRAIN_PYTHON may name another python" >&2
    exit 2
fi
# Into a folder of its own: nothing that is installed changes, and transformers does not find kernels that it cannot run.
rm -rf build/gpu_check
"$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --target build/gpu_check gpu_wheels/*.whl
PYTHONPATH=$PWD:$PWD/build/gpu_check exec "$python" -m benchmarks.gpu_check "$@"
