"""Environment of a process that trains on this machine: threads, memory, and MKL on request. Imports nothing heavy.

A launcher sets it, because neither the C library nor the loader reads it after a process has started. What a person has
set wins. ``env $(python -m omni_train.machine N) torchrun …`` gives it to N processes that something else starts.
docs/machine.md says what was measured.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from omni_train import lines
from omni_train.errors import UserError, first_line

FULL_WIDTH = "OMNI_TRAIN_MKL_FULL_WIDTH"
"""Variable that asks, with 1, for MKL's full-width matrix products on AMD's processors."""

_M_MMAP_THRESHOLD = -3  # malloc.h
_KEEP = 1 << 30  # bytes of a block up to which memory is kept for the next step
_MKL_ASKS = "mkl_serv_intel_cpu_true"  # is this Intel's? MKL chooses its widest kernels only where it is


def environment(processes: int, cores: int | None = None) -> dict[str, str]:
    """Environment variables of each of the processes that share this machine.

    Args:
        processes: number of processes.
        cores: cores that they share; None for those that this process may use, where a lone process leaves the number
            of threads to OpenMP.

    Raises:
        UserError: the variable ``FULL_WIDTH`` is neither 0 nor 1.
    """
    ours = _memory()
    if processes > 1 or cores:
        ours["OMP_NUM_THREADS"] = str(max(1, (cores or len(os.sched_getaffinity(0))) // processes))
    result = ours | os.environ
    if _is_full_width_asked():
        del result[FULL_WIDTH]  # handled here: ranks must not warn again
        try:
            library = _preloaded()
        except _CannotBe as why:
            lines.write(f"{FULL_WIDTH}=1 changes nothing here: {why}")
        else:
            result["LD_PRELOAD"] = " ".join(filter(None, (str(library), result.get("LD_PRELOAD"))))
    return result


def say_what_came_too_late() -> None:
    """Warn that ``FULL_WIDTH`` needs a launcher, where it is set and this process was started without its effect."""
    if _is_full_width_asked() and os.environ.get("LOCAL_RANK", "0") == "0":
        lines.write(f"{FULL_WIDTH}=1 changes nothing in a process that has started; omni-train launch 1 … does it")


def _memory() -> dict[str, str]:
    """Variables that let glibc keep freed memory: it would return large blocks, and fault every page in again."""
    try:
        is_taken = ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _KEEP)
    except AttributeError:  # another C library
        return {}
    # Old versions refuse more than 32 MiB, and the second variable alone would do harm: it stops their own adapting.
    return {"MALLOC_MMAP_THRESHOLD_": str(_KEEP), "MALLOC_TRIM_THRESHOLD_": str(_KEEP)} if is_taken else {}


class _CannotBe(Exception):
    """Error that says why MKL cannot be set."""


def _is_full_width_asked() -> bool:
    if (asked := os.environ.get(FULL_WIDTH, "0")) not in ("0", "1"):
        raise UserError(f"{FULL_WIDTH}={asked}: must be 1, or 0 as where it is not set")
    return asked == "1"


def _preloaded() -> Path:
    """Library that tells MKL that the processor is Intel's, compiled into the user's cache."""
    if "AuthenticAMD" not in (cpu := Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""):
        raise _CannotBe("the processor is not AMD's, or this is not Linux")
    if " avx512f " not in cpu:
        raise _CannotBe("the processor has no AVX-512, so that there is no fuller width")
    torch = find_spec("torch")
    library = Path(torch.origin).parent / "lib" / "libtorch_cpu.so" if torch else Path()
    if not library.is_file() or not _holds(library, _MKL_ASKS.encode()):
        raise _CannotBe("torch has no MKL in it")
    if (compiler := next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)) is None:
        raise _CannotBe("there is no C compiler (cc, gcc, clang)")
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "omni_train")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", f"{made}/library"]
            source = f"int {_MKL_ASKS}(void) {{ return 1; }}\n"
            subprocess.run(command, input=source, text=True, check=True, capture_output=True)
            return Path(made, "library").rename(folder / "mkl_full_width.so")
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise _CannotBe(f"its library cannot be made: {first_line(error)}") from error


def _holds(file: Path, word: bytes) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(word) >= 0


if __name__ == "__main__":
    given = environment(int(sys.argv[1]) if sys.argv[1:] else 1)
    print(*(shlex.quote(f"{name}={value}") for name, value in given.items() if os.environ.get(name) != value))
