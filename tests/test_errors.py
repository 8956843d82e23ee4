"""A user's error is printed once, however many ranks have it."""

import contextlib
import errno
import io
import os
from unittest.mock import patch

import pytest

from omni_train import lines
from omni_train.errors import UserError, announce, cannot_write


def printed(rank, world_size, messages):
    """What this rank prints for its message; None has none."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), patch.object(lines, "_in_a_run", False):  # another test's may go on here
        if messages[rank] is not None:
            announce(UserError(messages[rank]))
    return stderr.getvalue()


def test_an_error_of_every_rank_is_printed_by_one(distributed):
    outputs = distributed(3, printed, ["no such checkpoint"] * 3)
    assert sorted(outputs) == ["", "", "error: no such checkpoint\n"]


def test_an_error_of_one_rank_is_printed_by_that_rank(distributed):
    assert distributed(3, printed, [None, "shard 7 is missing", None]) == ["", "error: shard 7 is missing\n", ""]


def test_before_ranks_are_connected_the_first_of_a_machine_prints(monkeypatch, capsys):
    for local_rank, output in (("0", "error: bad key\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        announce(UserError("bad key"))
        assert capsys.readouterr().err == output


def test_an_error_announced_where_it_arose_is_not_printed_again(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    error = UserError("bad key")
    announce(error)
    announce(error)
    assert capsys.readouterr().err == "error: bad key\n"


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.EISDIR, 2)],
)
def test_what_only_a_person_can_mend_is_not_worth_another_try(number, status):
    error = cannot_write("runs/a", OSError(number, os.strerror(number)))
    assert (error.status, str(error)) == (status, f"runs/a: cannot be written: {os.strerror(number)}")


def test_a_link_that_leads_nowhere_is_called_so(tmp_path):
    link = tmp_path / "checkpoints"
    link.symlink_to(tmp_path / "unmounted")
    for path in (link, link / "step_00000001"):
        with pytest.raises(FileExistsError) as made:
            path.mkdir(parents=True, exist_ok=True)
        error = cannot_write(path, made.value)
        assert (error.status, str(error)) == (2, f"{link}: is a link that leads nowhere; is a disk missing?")
