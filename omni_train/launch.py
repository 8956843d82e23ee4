"""Launcher of one command on N processes of this machine, which behave as a single process to the user.

Torchrun would hide a user's one-line error under pages of its own, always exit 1, and kill the ranks 30 s after a
SIGTERM, which a large checkpoint outlasts. Here the first failing rank's exit code is the launcher's, signals are
passed on and the ranks decide when to end, and ranks do not outlive a launcher that is killed.

``omni-train launch N train stage=…`` runs ``omni-train train stage=…`` on N processes. It sets what torchrun sets for
them, and what :mod:`omni_train.machine` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection

from omni_train import lines, machine, stopping
from omni_train.errors import FAILED, UserError
from omni_train.processes import Exit

USAGE = "omni-train launch N COMMAND …, N being a number of processes, at least 1"
_SAID = (Exit.wrong, Exit.stopped, Exit.interrupted)  # codes of which the rank has said why
_MOST_OF_A_CORE = 32  # processes; more are a slip of the finger, and take a machine down
_GLANCE = 0.1  # seconds between two looks at the ranks
# Seconds that the ranks have to end by themselves: when one was stopped, failed, or all were interrupted twice.
_GRACE = {Exit.stopped: 60.0, Exit.failed: 10.0, Exit.interrupted: 1.0}


def main(arguments: list[str], commands: Collection[str]) -> int:
    """Run ``N COMMAND …`` and return the exit code; a lone process takes the place of this one.

    Args:
        arguments: words after ``omni-train launch``.
        commands: names of the commands that can be launched.

    Raises:
        UserError: the number of processes is missing, or there is no such command.
    """
    count, *command = arguments or [""]
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"launch {count or 'has no number'}: write {USAGE}")
    if int(count) > (most := _MOST_OF_A_CORE * (os.cpu_count() or 1)):
        raise UserError(f"launch {count}: must be at most {most} processes, {_MOST_OF_A_CORE} for each core")
    if not command or command[0] not in commands:
        raise UserError(f"launch {count} {' '.join(command[:1])}: needs one of {', '.join(commands)}")
    os.environ["PYTHONSAFEPATH"] = "1"  # modules in the folder that this is started in are not ours
    if int(count) == 1:
        stopping.hold()
        os.execve(sys.executable, [sys.executable, "-m", "omni_train", *command], machine.environment(1))
    if command[0] in stopping.COMMANDS:
        lines.begin_log()
    return launch(int(count), "omni_train", command)


def launch(count: int, module: str, arguments: list[str]) -> int:
    """Run ``python -m module *arguments`` on ``count`` ranks and return the exit code.

    That is 0 when all ranks exit 0, else the code of the first rank that failed (128 + signal number if it was killed).
    The other ranks are then told so, sent SIGTERM, and later SIGKILL.
    """
    stopping.hold()  # signals wait for the loop below, in the ranks for their first line
    shared = machine.environment(count)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            command = [sys.executable, "-m", module, *arguments]
            # In a session of its own, a rank gets a terminal's Ctrl-C from here alone, and counts it once.
            environment = shared | _place(rank, count, store.port)
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _Watch(ranks, store).follow()
    finally:
        for rank in ranks:
            rank.kill()


def _place(rank: int, count: int, port: int) -> dict[str, str]:
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ours = {"TORCHELASTIC_RUN_ID": uuid.uuid4().hex, "OMNI_TRAIN_LAUNCHER": os.getpid()}
    return {key: str(value) for key, value in (mine | met | ours).items()}


class _Watch:
    """Watch over the ranks until all have ended, which passes signals on to them."""

    def __init__(self, ranks: list[subprocess.Popen], store) -> None:
        self.ranks, self.store = ranks, store
        self.code, self.last_line = int(Exit.finished), ""
        self.deadline = float("inf")  # when those that have not ended are killed

    def follow(self) -> int:
        """Wait for the end of all ranks; returns the exit code of the launcher."""
        interrupts = 0
        while running := [rank for rank in self.ranks if rank.poll() is None]:
            if self.code == Exit.finished:
                self._look_for_the_first_to_fail(running)
            if time.monotonic() > self.deadline:
                for rank in running:
                    rank.kill()
            # Not by sigtimedwait, which makes up a signal where this process was stopped and goes on.
            if not (pending := signal.sigpending() & set(stopping.SIGNALS)):
                time.sleep(_GLANCE)
                continue
            number = signal.sigwait(pending)
            for rank in running:
                rank.send_signal(number)
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                self._end(self.code or Exit.interrupted, _GRACE[Exit.interrupted])
        if self.code == Exit.finished:
            self._look_for_the_first_to_fail([])
        if self.last_line:
            lines.write(self.last_line)
        return self.code

    def _end(self, code: int, seconds: float) -> None:
        self.code, self.deadline = int(code), time.monotonic() + seconds

    def _look_for_the_first_to_fail(self, running: list[subprocess.Popen]) -> None:
        failed = [number for number, rank in enumerate(self.ranks) if rank.returncode]
        if not failed:
            return
        # Of several since the last glance, one that was killed is why the others lost their connection.
        first = min(failed, key=lambda number: self.ranks[number].returncode)
        code = self.ranks[first].returncode
        self._end(code if code > 0 else 128 - code, _GRACE.get(code, _GRACE[Exit.failed]))
        if self.code not in _SAID:
            ending = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            self.last_line = f"rank {first} {ending}; the other ranks were stopped"
            self.store.compare_set(FAILED, "", f"{int(Exit.failed)} rank {first} {ending}")
        for rank in running:
            rank.terminate()
