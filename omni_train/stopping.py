"""Handling of the signals that ask a run to stop, from its first line to its last. Imports nothing heavy.

SIGTERM and SIGUSR1 are what schedulers send before they kill, SIGINT is Ctrl-C. While there is nothing to save (at the
start, between the stages of a pipeline) the first of them ends the process at once, with the exit code that says that
the same command goes on. Else (:func:`finish_first`) it is remembered, and the training loop ends where all is saved.
A second SIGINT always ends the process at once.

A thread handles them, because the main one may be held up in a collective. It reads signals from the interpreter's
wakeup pipe and does not block them, so that programs that the run starts inherit nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from omni_train import lines
from omni_train.processes import Exit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COMMANDS = ("train", "pipeline")
"""Commands that stop where all is saved. The others end at the first signal, as any program does."""

_LINE_SECONDS = 1.0  # longest wait for the line of a signal to be written
_GO_ON = "the same command goes on from here"

_changing = threading.Lock()
_last_word = threading.Lock()  # kept by the thread that ends the process: no other line may follow its own
_asked: signal.Signals | None = None
_told = False
_doing: str | None = None  # what is finished before the run stops; None: nothing, it ends at once
_where = "at the start, nothing new to save"
_lost: Callable[[], tuple[int, str] | None] = lambda: None  # noqa: E731
_end_others: Callable[[], None] = lambda: None  # noqa: E731


def hold() -> None:
    """Block these signals until :func:`listen` or :func:`let_go`, here or in a process started from here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_go() -> None:
    """Unblock these signals, so that they end this process as they do any program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def listen() -> None:
    """Handle the signals from here on; call it in the main thread, before anything starts threads or processes."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _remember)
    let_go()  # before the thread starts, which inherits the mask
    threading.Thread(target=_read_signals, args=(reading,), name="signals", daemon=True).start()
    _keep_from_children()


def finish_first(doing: str) -> None:
    """Let signals wait from here on until something is done.

    Args:
        doing: what is done first, for the line that says so, as in ``finishing step 7 and saving``.
    """
    global _doing
    with _changing:
        if _doing is None and _asked is not None:
            _end_stopped()
        _doing = doing


def at_once(where: str) -> None:
    """Let a signal end the process at once from here on, also one that came already.

    Args:
        where: where the run stops, for the line that says so, as in ``at step 40, nothing new to save``.
    """
    global _doing, _where
    with _changing:
        _doing, _where = None, where
        if _asked is not None:
            _end_stopped()


def asked() -> signal.Signals | None:
    """Signal that asks this run to stop, None where none does."""
    return _asked


def agreed(number: int) -> None:
    """Note that all ranks stop by a signal, whichever had it; a launcher may now send it to the others too."""
    global _told
    _remember(number)
    _told = True


def unless_lost(lost: Callable[[], tuple[int, str] | None]) -> None:
    """Set the function that tells, when a signal comes, whether a rank has failed and the others must only end.

    Args:
        lost: function that returns the exit code and the reason of the failed rank, None where none has failed.
    """
    global _lost
    _lost = lost


def end_too(others: Callable[[], None]) -> None:
    """Set the function that ends other programs of this run, before a signal ends this process at once."""
    global _end_others
    _end_others = others


def over() -> None:
    """Ignore a scheduler's signals from here on: the run has ended, and its exit code stands."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end(code: int, line: str) -> NoReturn:
    """End the process now, whatever its threads wait for; the first rank prints the reason.

    Args:
        code: exit code.
        line: the reason.
    """
    _last_word.acquire(timeout=_LINE_SECONDS)
    with contextlib.suppress(OSError):
        _end_others()
    if _is_first():
        lines.show_cursor()
        lines.write(line)
    lines.flush()
    os._exit(code)


def _remember(number: int, _frame: object = None) -> None:
    global _asked
    if _asked is None:
        _asked = signal.Signals(number)


def _read_signals(pipe: int) -> None:
    interrupts = 0
    while True:
        (number,) = os.read(pipe, 1)
        if number not in SIGNALS:
            continue
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            end(Exit.interrupted, "interrupted: ended at once by a second Ctrl-C; what was saved before is kept")
        # In a thread: should it hang, a second Ctrl-C is still read.
        threading.Thread(target=_handle, args=(number,), daemon=True).start()


def _handle(number: int) -> None:
    global _told
    if failure := _lost():
        end(failure[0], f"failed: {failure[1]}")
    with _changing:
        _remember(number)
        if _doing is None:
            _end_stopped()
        if not _told and _is_first():
            with _last_word:
                lines.write(f"{signal.Signals(number).name}: {_doing}; a second Ctrl-C ends at once")
        _told = True


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _end_stopped() -> NoReturn:
    end(Exit.stopped, f"stopped by {_asked.name} {_where}; {_GO_ON}")


def _keep_from_children() -> None:
    """Keep forked processes from handling the signals: they share our pipe and terminal, but only the run must stop."""
    mask = threading.local()

    def before() -> None:
        mask.kept = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask.kept)

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        in_parent()

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)
