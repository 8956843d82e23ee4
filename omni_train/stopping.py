"""Signals that ask a run to stop count from its first line to its last. Imports nothing heavy.

SIGTERM and SIGUSR1 are what schedulers send before they kill, SIGINT is Ctrl-C. While there is nothing to save (at the
start, between the stages of a pipeline) the first of them ends the process at once, with the exit code that says that
the same command goes on. Else (:func:`finish_first`) it is remembered, and the training loop ends where all is saved.
A second SIGINT always ends the process at once.

A thread listens, because the main one may be held up in a collective. It hears of signals through the interpreter's
wakeup pipe and not by blocking them, so that programs that the run starts inherit nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from omni_train import lines
from omni_train.processes import Exit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COMMANDS = ("train", "pipeline")
"""Those that stop where all is saved. The others end at the first signal, as any program does."""

_LINE_SECONDS = 1.0  # for the line of a signal to be written, where standard error takes one
_GO_ON = "the same command goes on from here"

_changing = threading.Lock()
_last_word = threading.Lock()  # with whoever ends the process, for good: no line of a signal before comes after
_asked: signal.Signals | None = None
_told = False
_doing: str | None = None  # what is finished before the run stops; None: nothing, it ends at once
_where = "at the start, nothing new to save"
_lost: Callable[[], tuple[int, str] | None] = lambda: None  # noqa: E731


def hold() -> None:
    """Keep these signals for later: until :func:`listen` or :func:`let_go`, here or in a process started from here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_go() -> None:
    """Let the signals do what they do to any program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def listen() -> None:
    """Heed the signals from here on. From the main thread, before anything else starts threads or processes."""
    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _remember)
    let_go()  # before the thread starts, which hears them also where the main one holds them
    threading.Thread(target=_heed, args=(heard,), name="signals", daemon=True).start()
    _keep_from_children()


def finish_first(doing: str) -> None:
    """From here on a signal waits until `doing` is done, as in ``finishing step 7 and saving``."""
    global _doing
    with _changing:
        if _doing is None and _asked is not None:
            _end_stopped()
        _doing = doing


def at_once(where: str) -> None:
    """From here on, and if a signal came already, it ends the process at once.

    Args:
        where: for the line that says so, as in ``at step 40, nothing new to save``.
    """
    global _doing, _where
    with _changing:
        _doing, _where = None, where
        if _asked is not None:
            _end_stopped()


def asked() -> signal.Signals | None:
    """The signal that asks this run to stop, if any does."""
    return _asked


def agreed(number: int) -> None:
    """All ranks stop by this signal, whichever had it; whoever started them may now send it to the others too."""
    global _told
    _remember(number)
    _told = True


def unless_lost(lost: Callable[[], tuple[int, str] | None]) -> None:
    """Ask this when a signal comes: the exit code and the reason where a rank has failed, and the rest only end."""
    global _lost
    _lost = lost


def over() -> None:
    """All is said: a scheduler's signal changes nothing any more, not even the exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end(code: int, line: str) -> NoReturn:
    """End the process now, whatever its threads are held up in; the first rank says why."""
    _last_word.acquire(timeout=_LINE_SECONDS)
    if _is_first():
        lines.show_cursor()
        lines.write(line)
    lines.flush()
    os._exit(code)


def _remember(number: int, _frame: object = None) -> None:
    global _asked
    if _asked is None:
        _asked = signal.Signals(number)


def _heed(pipe: int) -> None:
    interrupts = 0
    while True:
        (number,) = os.read(pipe, 1)
        if number not in SIGNALS:
            continue
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            end(Exit.interrupted, "interrupted: ended at once by a second Ctrl-C; what was saved before is kept")
        # In a thread: should it hang, a second Ctrl-C is still heard.
        threading.Thread(target=_answer, args=(number,), daemon=True).start()


def _answer(number: int) -> None:
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
    """A forked process is a helper: it has our pipe and our terminal, but a signal to stop was for the run."""
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
