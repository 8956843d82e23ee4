"""First failure among the ranks, for the others, which themselves only see a lost connection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from omni_train import stopping
from omni_train.errors import FAILED, RankFailed, UserError, announce, described
from omni_train.platform.device import store, world_size
from omni_train.processes import Exit

_PATIENCE = 2.0  # seconds in which the rank that failed first, or the launcher, says so


def listen() -> None:
    """Let a signal that comes because a rank has failed end this process with that rank's error. After joining."""
    other = store().clone()  # a connection of its own: the other one may be waiting
    stopping.unless_lost(lambda: _read(other))


@contextmanager
def told() -> Iterator[None]:
    """Context whose first error is told to the other ranks, and printed where it is one of a user. While joined.

    Raises:
        RankFailed: in the place of an error that came of another rank's failure.
    """
    try:
        yield
    except UserError as error:
        announce(error)  # while the ranks can still agree on who prints it
        first_failure(error)
        raise
    except Exception as error:
        failure = first_failure(error)
        if failure is not error:
            raise failure from error
        raise


def first_failure(error: Exception) -> Exception:
    """Error that this rank ends with: its own, which the others are told, or RankFailed where another rank was first.

    To be called before the connections are closed, which is what the other ranks notice.

    Args:
        error: of this rank.
    """
    code = error.status if isinstance(error, UserError) else Exit.failed
    mine = f"{int(code)} {described(error)}"
    try:
        if isinstance(error, RuntimeError) and world_size() > 1:  # as all that torch says of lost connections
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and not store().check([FAILED]):
                time.sleep(0.05)
        first = store().compare_set(FAILED, "", mine).decode()
    except RuntimeError:  # the store has gone with the rank that kept it
        return error
    if first == mine or not isinstance(error, RuntimeError):
        return error
    return RankFailed(*_parsed(first))


def _read(store: torch.distributed.Store) -> tuple[int, str] | None:
    try:
        return _parsed(store.get(FAILED).decode()) if store.check([FAILED]) else None
    except RuntimeError:
        return None


def _parsed(text: str) -> tuple[int, str]:
    code, _, line = text.partition(" ")
    return int(code), line
