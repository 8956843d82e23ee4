"""A run under SLURM, as launchers/slurm.sh starts it: submitted, and in its job started, stopped and queued again."""
