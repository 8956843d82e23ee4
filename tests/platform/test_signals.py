import signal
import subprocess
import sys

from omni_train.platform.signals import StopRequest


def test_a_step_that_hangs_dumps_all_stacks_and_fails():
    program = """
import time
from omni_train.platform.signals import Watchdog
def a_step_that_hangs():
    time.sleep(30)
Watchdog(0.3).alive()
a_step_that_hangs()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, 2)
    assert "a_step_that_hangs" in done.stderr


def test_a_stop_request_hears_signals_until_it_is_closed():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        stop = StopRequest()
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.name, heard) == ("SIGUSR1", [])
        stop.close()
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
