"""Files of somebody else: code in them and the mark that it leaves when it is run, and a process of little memory."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.errors import UserError
from tests.hostile import confined
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile") / "tokenizer"
    train(["what is said here", "one two three"], folder, 300)
    return str(folder)


@pytest.fixture(scope="session")
def within() -> Iterator[Callable]:
    """within(function, ...) is what the function gives in a process that may take confined.ROOM bytes of memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=confined.confine) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(confined.SECONDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with room beside it for what lies outside."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"
