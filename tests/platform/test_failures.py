"""Of several ranks that fail, the first is the reason, and the others know it."""

from __future__ import annotations

import torch

from omni_train.errors import RankFailed, UserError
from omni_train.platform import failures

LOST = RuntimeError("Connection closed by peer")


def tcp_store(rank):
    """As ranks find each other by."""
    meeting = torch.distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting.set("port", str(store.port))
        return store
    return torch.distributed.TCPStore("127.0.0.1", int(meeting.get("port")))


def first_failures(rank, world_size, errors):
    """How each rank ends: type, exit code where it is another's, message."""
    store, before = tcp_store(rank), (failures.store, failures._PATIENCE)
    failures.store = lambda: store
    failures._PATIENCE = 20.0 if any(type(error) is not RuntimeError for error in errors) else 0.5
    try:
        ending = failures.first_failure(errors[rank])
        torch.distributed.barrier()
    finally:
        failures.store, failures._PATIENCE = before
    return type(ending), getattr(ending, "code", None), str(ending)


def test_a_lost_connection_is_the_failure_of_the_rank_that_was_lost(distributed):
    crashed = distributed(2, first_failures, [LOST, ValueError("no\nmore")])
    assert crashed[1] == (ValueError, None, "no\nmore")
    kind, code, line = crashed[0]
    assert (kind, code) == (RankFailed, 1)
    assert line.startswith("ValueError: no on rank 1 at ")


def test_a_users_error_of_one_rank_is_the_exit_code_of_all(distributed):
    lost, own = distributed(2, first_failures, [LOST, UserError("shard 7 is missing")])
    assert lost[:2] == (RankFailed, 2)
    assert own == (UserError, None, "shard 7 is missing")


def test_where_all_ranks_have_a_defect_all_show_it_and_where_nobody_explains_one_speaks_for_all(distributed):
    assert [kind for kind, *_ in distributed(2, first_failures, [KeyError("a")] * 2)] == [KeyError] * 2
    kinds = [kind for kind, *_ in distributed(2, first_failures, [LOST] * 2)]
    assert sorted(kind.__name__ for kind in kinds) == ["RankFailed", "RuntimeError"]
