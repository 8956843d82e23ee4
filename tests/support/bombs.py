"""Small files that would become large, long or endless, made by hand where no library would write them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from omni_train.data.samples.media.structure import ogg_checksum
from omni_train.data_pipelines.shards import index_shards
from tests.support.media import aac_file, png_chunk, sound_file, video_file

TERABYTE = 1 << 40


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of a tar with the right sum, whatever it says."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    base_256 = (size % 256**12 | (0 if size < 0 else 0x80 << 88)).to_bytes(12)
    block[124:136] = f"{size:011o}\0".encode() if 0 <= size < 8**11 else base_256
    return summed(block)


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def extended(**fields: str) -> bytes:
    """A PAX header with such records for the next member."""
    body = b""
    for key, value in fields.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + len(str(len(record) + 2))
        body += str(length).encode() + record
    return header("pax", len(body), tarfile.XHDTYPE) + padded(body)


def sparse() -> bytes:
    """A file of a terabyte of holes, in one header of the old GNU form."""
    block = bytearray(header("k.0.wav", 0, tarfile.GNUTYPE_SPARSE))
    block[483:495] = b"\x80" + TERABYTE.to_bytes(11, "big")
    return summed(block)


SAMPLE = member("k.json", json.dumps({"text": "one"}).encode())


def shards(folder: Path, sample: bytes, good: bytes = b'{"text": "one"}') -> Path:
    """Indexed shards: a good sample, the bytes given as one, another good one."""
    folder.mkdir()
    first, last = (member(f"{key}.json", good) for key in ("a", "z"))
    (folder / "train-00000.tar").write_bytes(first + SAMPLE + last + bytes(1024))
    index_shards(folder)
    (folder / "train-00000.tar").write_bytes(first + sample + last + bytes(1024))
    end = len(first + sample)
    offsets(folder, 0, len(first), end, end + len(last))
    return folder


def offsets(folder: Path, *numbers: int) -> None:
    """Let the index say that samples begin there, the last one where they end."""
    (folder / "train-00000.tar.idx").write_bytes(struct.pack(f"{len(numbers)}Q", *numbers))


def hours_of_flac() -> bytes:
    """Ten hours of silence in 118 KiB."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 1000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(600_000, np.int16))
    return buffer.getvalue()


def promising_flac() -> bytes:
    """A second of sound whose header says ten hours."""
    data = bytearray(sound_file(np.zeros((16000, 1), np.float32)))
    data[21:26] = (data[21] & 0xF0).to_bytes(1) + (36000 * 16000).to_bytes(4)
    return bytes(data)


def hours_of_opus() -> bytes:
    """Two hours of silence in 120 KB: packets of 120 ms in two bytes each, 250 on a page."""
    head = b"OpusHead\1\1" + struct.pack("<HIhB", 0, 48000, 0, 0)
    pages = [(head,), (b"OpusTags" + bytes(8),), *[(b"\x0b\x06",) * 250] * 240]
    data, granule = b"", 0
    for number, packets in enumerate(pages):
        granule += 5760 * len(packets) if number > 1 else 0
        flags = 2 if number == 0 else 4 if number == len(pages) - 1 else 0
        page = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, 7, number, 0) + bytes([len(packets)])
        page = bytearray(page + bytes(map(len, packets)) + b"".join(packets))
        page[22:26] = struct.pack("<I", ogg_checksum(bytes(page)))
        data += page
    return data


def hours_of(frames: bytes, seconds: float, hours: float) -> bytes:
    return frames * round(hours * 3600 / seconds)


def hours_of_aac() -> bytes:
    """Two hours of silence, each second the same."""
    return hours_of(aac_file(np.zeros((16384, 1), np.float32), container="adts"), 1.088, 2.0)


def hours_of_mp3() -> bytes:
    """Two hours of silence, every ten seconds the same."""
    data = sound_file(np.zeros((160000, 1), np.float32), format="MP3")
    return hours_of(data[data.index(b"\xff", 200) :], 10.0, 2.0)


def png(width: int, height: int, *beside: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
    """A PNG file that is all black, with other chunks before its pixels."""
    lines = zlib.compressobj(9)
    row = bytes(1 + (width * bits * (3 if colour == 2 else 1) + 7) // 8)
    pixels = b"".join(lines.compress(row) for _ in range(height)) + lines.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *beside]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in [*chunks, (b"IDAT", pixels), (b"IEND", b"")])


def inflating(megabytes: int) -> bytes:
    """A zlib stream of so many megabytes in a thousandth of them."""
    stream = zlib.compressobj(9)
    return b"".join(stream.compress(b"x" * (1 << 20)) for _ in range(megabytes)) + stream.flush()


def gif(frames: int, width: int = 16, height: int = 16) -> bytes:
    """An animation of black frames."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0") * frames + b";"


def webp(width: int, height: int) -> bytes:
    """The header of a lossless picture of that size, and too few pixels."""
    bits = (width - 1) | (height - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<I", 64) + b"\x2f" + struct.pack("<I", bits) + bytes(59)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int, directories: int = 1) -> bytes:
    """A picture of that size of which there is one strip, in so many directories."""
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(directories):
        tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width * height}
        last = number == directories - 1
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
        data += struct.pack("<I", 0 if last else len(data) + 4)
    return bytes(data)


def boxes(data: bytes, kind: bytes) -> Iterator[int]:
    at = data.find(kind)
    while at >= 0:
        yield at + 4
        at = data.find(kind, at + 4)


def lying_mp4(count: int = 80_000_000) -> bytes:
    """A video whose table says that it has 80 million frames of a byte each, and its chunks as many."""
    data = bytearray(video_file(np.zeros((4, 32, 32, 3), np.uint8)))
    for at in boxes(data, b"stsz"):
        data[at + 4 : at + 12] = struct.pack(">II", 1, count)
    for at in boxes(data, b"stsc"):
        data[at + 12 : at + 16] = struct.pack(">I", count)
    for at in boxes(data, b"stts"):
        data[at + 8 : at + 12] = struct.pack(">I", count)
    return bytes(data)


def lying_fragment(count: int = 80_000_000) -> bytes:
    """A fragmented video of which one run says that it has 80 million frames, all like the first."""
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    data = bytearray(video_file(frames, options={"movflags": "frag_keyframe+empty_moov"}))
    at = next(boxes(data, b"trun"))
    data[at : at + 8] = struct.pack(">II", 0x000001, count)
    return bytes(data)


def larger_frames(width: int) -> bytes:
    """A video of 64 x 64 pixels, whose frames after the first are as wide and high as is said here."""
    buffer, first, later = io.BytesIO(), png(64, 64), png(width, width)
    with av.open(buffer, "w", format="mov") as output:
        stream = output.add_stream("png", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        for index in range(3):
            packet = av.Packet(later if index else first)
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 8), stream, True
            output.mux(packet)
    return buffer.getvalue()


def codes_of_shape(*shape: int, descr: str = "<u2") -> bytes:
    """What ``numpy.save`` would write of an array of that shape, without the array."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(64)
