"""The settings of a process that trains: set unless given, and MKL's full width on request alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_train import machine
from omni_train.errors import UserError

MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@pytest.fixture(autouse=True)
def given(monkeypatch, tmp_path):
    """The environment of a person who has set nothing; what a test puts in is set."""
    given = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(os, "environ", given)
    return given


@pytest.fixture
def libc(monkeypatch):
    """The C library's answer to whether it takes a threshold as high as ours; None: it has no such function."""

    class Library:
        def __init__(self, answer: int | None) -> None:
            if answer is not None:
                self.mallopt = lambda what, value: answer

    return lambda answer: monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(answer))


def test_memory_is_kept_and_threads_are_shared_unless_a_person_says_otherwise(given, libc):
    libc(1)
    assert machine.environment(2, cores=6) == given | MEMORY | {"OMP_NUM_THREADS": "3"}
    assert machine.environment(8, cores=2) == given | MEMORY | {"OMP_NUM_THREADS": "1"}
    assert machine.environment(1) == given | MEMORY  # OpenMP knows best
    given |= {"OMP_NUM_THREADS": "5", "MALLOC_TRIM_THRESHOLD_": "7"}
    assert machine.environment(2) == MEMORY | given


@pytest.mark.parametrize("answer", [0, None], ids=["refuses so much", "is not glibc"])
def test_memory_is_left_alone_where_the_c_library(given, libc, answer):
    libc(answer)
    assert machine.environment(1) == given


def test_full_width_is_off_by_default_and_where_it_is_0(given, libc, capsys):
    libc(1)
    machine.say_what_came_too_late()
    given[machine.FULL_WIDTH] = "0"
    machine.say_what_came_too_late()
    assert "LD_PRELOAD" not in machine.environment(1)
    assert capsys.readouterr().err == ""
    given[machine.FULL_WIDTH] = "yes"
    with pytest.raises(UserError, match=r"^OMNI_TRAIN_MKL_FULL_WIDTH=yes: must be 1, or 0"):
        machine.environment(1)


@pytest.fixture
def able(given, monkeypatch, tmp_path):
    """A machine where it can be done, whatever this one is; what a test sets in `able` differs."""
    able = {"cpu": "vendor_id : AuthenticAMD\nflags : avx2 avx512f fma\n", "torch": b"... mkl_serv_intel_cpu_true ..."}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: able["cpu"] if str(path) == "/proc/cpuinfo" else read(path))

    class Found:
        origin = str(tmp_path / "torch" / "__init__.py")

    def find(name: str) -> type[Found]:
        (tmp_path / "torch" / "lib").mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / "lib" / "libtorch_cpu.so").write_bytes(able["torch"])
        return Found

    monkeypatch.setattr(machine, "find_spec", find)
    given[machine.FULL_WIDTH] = "1"
    return able


@pytest.mark.parametrize(
    ("differs", "why"),
    [
        ({"cpu": "vendor_id : GenuineIntel\nflags : avx512f \n"}, "the processor is not AMD's"),
        ({"cpu": "vendor_id : AuthenticAMD\nflags : avx2 \n"}, "the processor has no AVX-512"),
        ({"torch": b"OpenBLAS"}, "torch has no MKL in it"),
        ({"PATH": ""}, "there is no C compiler"),
        ({"XDG_CACHE_HOME": "/proc/nosuch"}, "its library cannot be made: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_full_width_cannot_be_one_line_says_so_and_all_else_goes_on(given, able, capsys, differs, why):
    able |= differs
    given |= {name: value for name, value in differs.items() if name.isupper()}
    environment = machine.environment(1)
    assert not {"LD_PRELOAD", machine.FULL_WIDTH} & environment.keys()
    err = capsys.readouterr().err
    assert err.startswith(f"OMNI_TRAIN_MKL_FULL_WIDTH=1 changes nothing here: {why}") and err.count("\n") == 1


def test_the_library_that_is_preloaded_answers_yes_beside_what_a_person_preloads(given, able, tmp_path, capsys):
    given["LD_PRELOAD"] = "theirs.so"
    library, theirs = machine.environment(1)["LD_PRELOAD"].split()
    assert (library, theirs) == (f"{tmp_path}/omni_train/mkl_full_width.so", "theirs.so")
    ask = f"import ctypes, sys; sys.exit(ctypes.CDLL({library!r}).mkl_serv_intel_cpu_true())"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 1
    assert [path.name for path in (tmp_path / "omni_train").iterdir()] == ["mkl_full_width.so"]
    assert capsys.readouterr().err == ""


def test_a_process_without_a_launcher_says_that_it_is_too_late(given, capsys):
    given[machine.FULL_WIDTH] = "1"
    machine.say_what_came_too_late()
    assert "omni-train launch 1 … does it" in capsys.readouterr().err
    given["LOCAL_RANK"] = "1"
    machine.say_what_came_too_late()
    assert capsys.readouterr().err == ""
