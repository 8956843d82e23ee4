"""Code in files, and the mark that it leaves when it is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_train.errors import UserError
from tests.support.hostile import CALLS, Call


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there when code has run."""
    return tmp_path / "code_has_run"


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, mark: Path) -> Call:
    """A call that leaves the mark, for a pickle."""
    return CALLS[request.param](mark)


@pytest.fixture
def refused(mark: Path) -> Callable:
    """Raises UserError of one line, and runs nothing."""

    def check(read: Callable, *arguments, match: str) -> None:
        error = None
        try:
            read(*arguments)
        except Exception as raised:
            error = raised
        assert not mark.exists(), "code of the file has run"
        assert isinstance(error, UserError), error
        assert re.search(match, str(error)), error
        assert "\n" not in str(error)

    return check
