import subprocess
import sys


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
