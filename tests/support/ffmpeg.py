"""The ffmpeg program of imageio-ffmpeg: it makes odd files, and decodes them as a player does."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import imageio_ffmpeg


@cache
def ffmpeg_path() -> str:
    """Where the program is."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments: str | float | Path, input: bytes = b"") -> bytes:
    """What ``ffmpeg -y ARGUMENTS`` writes to ``-`` (its standard output); ``input`` is read as ``-i -``.

    One thread and bit-exact containers, so that a file is the same each time. Raises RuntimeError with what ffmpeg says
    where it fails.
    """
    command = [ffmpeg_path(), "-nostdin", "-v", "error", "-y", "-threads", "1", "-fflags", "+bitexact"]
    command += [str(argument) for argument in arguments]
    done = subprocess.run(command, input=input, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
