#!/usr/bin/env bash
# A run on a SLURM cluster, one task per GPU; docs/slurm.md has the whole story. Submits itself, from any folder:
#
#   launchers/slurm.sh --nodes=8 -- train stage=s2_general model=flash_35b_a3b parallel=tp2_ep8 data.path=…
#
# where options of sbatch stand before --, and a recipe that cannot work is refused before it is queued. It is a batch
# script too, for sbatch from the project's folder: sbatch --nodes=8 launchers/slurm.sh train stage=…
#
# Five minutes before the time limit SLURM sends SIGUSR1: the ranks finish their step and save, and the job is queued
# again, where the same command goes on. A crash, a lost rank and a lost node are queued again too; what is wrong in
# itself (exit code 2), cancelled or finished is not. Variables, all optional:
#
#   OMNI_TRAIN_PYTHON                      python of an environment with omni_train (.venv/bin/python of the project)
#   OMNI_TRAIN_REQUEUES                    most times that a job is queued again (100)
#   OMNI_TRAIN_REQUEUES_WITHOUT_PROGRESS   most times in a row without a newer checkpoint in between (3)
#   OMP_NUM_THREADS                        threads of a rank (its share of the node's CPUs)
#
# Options of sbatch take the place of these. A job has its nodes to itself, with all their CPUs and memory.
#SBATCH --job-name=omni_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
trap '' USR1 TERM # until python listens: they would end the job for good
set -euo pipefail
export PYTHONSAFEPATH=1 # modules in the folder that this is started in are not ours

script=$(readlink -f "${BASH_SOURCE[0]}")
here=$(dirname "$script")
if [[ -e $here/slurm.sh ]]; then
    trap - USR1 TERM
    action=submit root=$(dirname "$here")
    set -- "$script" "$@"
else # SLURM runs a copy, which does not know where it comes from
    action=job root=$SLURM_SUBMIT_DIR
fi

python=${OMNI_TRAIN_PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: $python: no such program; \`make setup\` makes .venv in the project's folder, launchers/slurm.sh submits" \
        "from any folder, and OMNI_TRAIN_PYTHON may name the python of another environment" >&2
    exit 2
fi
exec "$python" -m omni_train.slurm "$action" "$@"
