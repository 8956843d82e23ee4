"""The ranks agree on a signal; the watchdog ends what hangs and says so."""

import signal
import subprocess
import sys

import torch

from omni_train import stopping
from omni_train.platform.signals import cut_short, stop_agreed


def agreements(rank, world_size, number):
    """What each rank makes of a signal that the last one alone was asked by."""
    before = stop_agreed()
    if rank == world_size - 1:
        stopping.agreed(number)
    try:
        alone = cut_short()
        return before, alone, cut_short(torch.distributed.group.WORLD), stop_agreed()
    finally:
        stopping._asked, stopping._told = None, False


def test_a_signal_to_one_rank_stops_all_by_its_name(distributed):
    name = signal.SIGUSR1
    assert distributed(2, agreements, int(name)) == [(None, False, True, name), (None, True, True, name)]


HANGS = """
import sys, threading, time
from omni_train.platform.signals import Watchdog, alive
def a_step_that_hangs():
    time.sleep(60)
watchdog = Watchdog(0.5)
for _ in range(4):
    time.sleep(0.2)
    alive()
print("alive until here", file=sys.stderr)
a_step_that_hangs()
"""


def test_a_step_that_hangs_dumps_all_stacks_and_says_so_last():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("alive until here\n")
    assert "a_step_that_hangs" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("failed: nothing moved for 0.5 s on rank 0 at ")
