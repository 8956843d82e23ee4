"""Small states go to a file and come back as they were; random states to the bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from omni_train.checkpoint.state_files import read_state, write_state
from omni_train.errors import UserError
from omni_train.recipe.schema import ParallelConfig


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "numbers": [0, -1, 2**40, 2**700, 0.1, float("inf"), True, None],
        "texts": ("", "ä" * 300, b"", bytes(range(256)) * 3),
        3: {("a", 1): [], 0.5: (), "nested": [{"deep": ((1,), [2])}]},
        "tensors": [torch.arange(7, dtype=torch.uint8), torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(0, 3)],
    }
    write_state(tmp_path / "state.pt", state)
    found = read_state(tmp_path / "state.pt")
    tensors, expected = found.pop("tensors"), state.pop("tensors")
    assert found == state and repr(found) == repr(state)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("value", [np.zeros(3), np.float64(1), {1}, range(3), torch.float32, torch.Size([1])])
def test_what_could_not_be_read_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\.pt: a \w+ is no plain state"):
        write_state(tmp_path / "state.pt", {"a": [value]})
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04", b"\x80\x02]q\x00"])
def test_what_is_damaged_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt:? (cannot be read|holds something).* use another") as error:
        read_state(tmp_path / "state.pt")
    assert "\n" not in str(error.value)


def test_reading_leaves_the_classes_that_torch_may_make_as_they_were(tmp_path):
    import megatron.core  # noqa: F401  which registers some

    before = set(torch.serialization.get_safe_globals())
    write_state(tmp_path / "state.pt", {})
    read_state(tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(UserError):
        read_state(tmp_path / "state.pt")
    assert before and set(torch.serialization.get_safe_globals()) == before


def draw() -> list:
    """Odd numbers of normal deviates, of which each generator makes two and keeps one."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        forked = torch.randn(3).tolist()
    return [
        [random.gauss(0, 1) for _ in range(3)],
        [random.random(), random.getrandbits(70)],
        np.random.standard_normal(3).tolist(),
        np.random.randint(1 << 30, size=5).tolist(),
        torch.randn(3).tolist(),
        torch.rand(5).tolist(),
        forked,
    ]


def random_states(rank, world_size, folder):
    from omni_train import platform
    from omni_train.checkpoint.random_state import random_state, restore_random_state

    platform.parallel.initialize(ParallelConfig(), 5)
    file = folder / "random_00000.pt"
    for skipped in range(3):
        for _ in range(skipped):  # so that some are kept, and none
            draw()
        write_state(file, random_state())
        assert random.getstate() == random_state()["python"] == read_state(file)["python"]
        expected = [draw(), draw()]
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        assert [draw(), draw()] != expected
        restore_random_state(folder)
        assert [draw(), draw()] == expected
    kept = read_state(file)
    platform.parallel.destroy()
    return kept["python"][2], kept["numpy"][3:]


def test_random_states_come_back_to_the_bit(distributed, tmp_path):
    python, numpy = distributed(1, random_states, tmp_path)[0]
    assert python is not None and numpy[0] == 1
