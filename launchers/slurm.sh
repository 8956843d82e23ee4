#!/usr/bin/env bash
# Submits a run to SLURM, one task per GPU:
#
#   sbatch --nodes=8 launchers/slurm.sh train stage=s2_general model=flash_35b_a3b parallel=tp2_ep8 data.path=…
#
# Five minutes before the time limit SLURM sends SIGUSR1 to this script, which hands it to every rank; the step is
# finished, a checkpoint is saved, and the job queues itself again, where the same command goes on.
#SBATCH --job-name=omni_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch [--nodes=N …] launchers/slurm.sh train key=value …" >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: launchers/slurm.sh is a batch script; submit it with sbatch, or use launchers/local.sh on one machine" >&2
  exit 2
fi

root=${OMNI_TRAIN_ROOT:-$SLURM_SUBMIT_DIR}
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONSAFEPATH=1 # modules in the folder that this is started in are not ours

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The ranks are SLURM's own tasks: srun forwards signals to them, and a lost one ends the others.
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  exec "$0" -m omni_train "$@"' "$python" "$@" &
ranks=$!
stopped=0
trap 'stopped=1; kill -USR1 "$ranks"' USR1

status=0
wait "$ranks" || status=$?
if [ "$stopped" = 1 ]; then # the trap ended the first wait; the ranks are still saving
  status=0
  wait "$ranks" || status=$?
  [ "$status" = 0 ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
