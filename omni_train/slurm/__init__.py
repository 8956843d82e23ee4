"""Runs under SLURM, as launchers/slurm.sh starts them: submission, and start, stop and requeue within the job."""
