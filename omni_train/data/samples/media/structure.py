"""Detection of files that were cut off, by the lengths that they give; decoders often take the cut for the end."""

from __future__ import annotations

import re
import zlib

UNKNOWN_RIFF_SIZE = 0x7FFF0000  # and above: of a writer that could not go back to fill it in
UNKNOWN_SIZE = 1 << 62  # the same of eight bytes
SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
BLOCKS = b"\xa3\xa0"
ID3 = re.compile(rb"ID3[\2-\4]\0[\0-\xf0]([\0-\x7f]{4})")  # version, flags, size
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"mfra", b"meta")

MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
SAMPLES_A_BYTE = 64  # more of a file than any codec has


def breaks_off(data: bytes) -> bool:
    """Whether a file ends before its own structure does: RIFF (WAV, WebP) and its kin, CAF, Ogg, Matroska, MP4 (M4A).

    Of Ogg also whether a page is damaged or lost, of MP4 whether it promises what it cannot hold. False for every other
    kind of file, and where the file does not say how long it is.
    """
    if data[:4] == b"RIFF":
        return len(data) < int.from_bytes(data[4:8], "little") < UNKNOWN_RIFF_SIZE
    if data[:4] == b"FORM":
        return len(data) < int.from_bytes(data[4:8]) < UNKNOWN_RIFF_SIZE
    if data[:4] in (b"RF64", b"BW64") and data[12:16] == b"ds64":
        return len(data) < int.from_bytes(data[20:28], "little") < UNKNOWN_SIZE
    if data[:4] == b"riff":  # W64
        return len(data) < int.from_bytes(data[16:24], "little") < UNKNOWN_SIZE
    if data[:4] == b"caff":
        return _caf_breaks_off(data)
    if data[:4] == b"OggS":
        return _ogg_breaks_off(data)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_breaks_off(data)
    if data[4:8] == b"ftyp" and _mp4_breaks_off(data):
        return True
    return data[4:8] in MP4_BOXES and _mp4_lies(data)


def _caf_breaks_off(data: bytes) -> bool:
    """Whether a CAF file breaks off: its chunks must follow each other to the end of the file."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 12])
        if size >= UNKNOWN_SIZE:  # -1 is to the end of the file
            return False
        at += 12 + size
    return at > len(data)


def is_joined(data: bytes) -> bool:
    """Whether an Ogg or Matroska file has a second beginning, as files that were written one after the other have."""
    if data[:4] == b"OggS":
        second = re.search(rb"OggS\0[\0\1\4\5]", data)  # a page that begins no stream
        return second is not None and data.find(b"OggS\0\2", second.start()) >= 0
    return data.find(b"\x1a\x45\xdf\xa3", 4) >= 0


def without_inner_tags(data: bytes) -> bytes:
    """MP3 or ADTS file without the ID3 tags in its middle, with which files begin that were joined to the first."""
    if data[:3] != b"ID3" and not (data[:1] == b"\xff" and data[1] & 0xE0 == 0xE0):
        return data
    kept, end, at = [], 0, 10 + _synchsafe(data[6:10]) if data[:3] == b"ID3" else 1
    while tag := ID3.search(data, at):
        kept.append(data[end : tag.start()])
        end = at = tag.end() + _synchsafe(tag[1])
    return b"".join([*kept, data[end:]]) if kept else data


def _synchsafe(size: bytes) -> int:
    """Synchsafe size of an ID3 tag: four bytes of seven bits each."""
    return sum((byte & 127) << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=False))


def mp3_samples(data: bytes) -> int | None:
    """Number of samples that the first frame of an MP3 file promises (Xing, Info or VBRI); None where it does not."""
    at = 10 + _synchsafe(data[6:10]) if data[:3] == b"ID3" else 0
    frame = data[at : at + 192]
    if len(frame) < 192 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # layer III
        return None
    long = bool(frame[1] & 8)  # MPEG 1
    mono = frame[3] >> 6 == 3
    tag = 4 + ((17 if mono else 32) if long else (9 if mono else 17))
    if frame[tag : tag + 4] in (b"Xing", b"Info") and frame[tag + 7] & 1:
        frames = int.from_bytes(frame[tag + 8 : tag + 12])
    elif frame[36:40] == b"VBRI":
        frames = int.from_bytes(frame[50:54])
    else:
        return None
    return frames * (1152 if long else 576)


def ogg_checksum(page: bytes) -> int:
    """CRC of an Ogg page whose own is set to 0: that of zlib with all bits reversed, and from 0."""
    reflected = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reflected.to_bytes(4, "little").translate(REVERSED))


def _ogg_breaks_off(data: bytes) -> bool:
    """Whether an Ogg file breaks off: whole pages must follow each other; only the flag of the last may be missing."""
    at = 0
    while data[at : at + 4] == b"OggS":
        number = data[at + 26] if at + 27 <= len(data) else 0  # of segments, which may be none
        size = 27 + number + sum(data[at + 27 : at + 27 + number])
        if at + size > len(data):
            return True
        page = data[at : at + size]
        if ogg_checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            return True
        at += size
    return data.find(b"OggS", at) >= 0


def _matroska_breaks_off(data: bytes) -> bool:
    """Whether a Matroska file breaks off: after the header, elements must fill its one segment, and its clusters."""
    size, begin = _matroska_size(data, 4)
    segment = begin + size
    if data[segment : segment + 4] != SEGMENT:
        return segment >= len(data)
    size, at = _matroska_size(data, segment + 4)
    end = at + size if size else len(data)
    if end > len(data):
        return True
    while at < end:
        if data[at] in BLOCKS and at + 3 < end and data[at + 1] & 0xC0 == 0x40:  # nearly all: of two bytes of length
            at += 3 + ((data[at + 1] & 0x3F) << 8 | data[at + 2])
            continue
        width = 9 - data[at].bit_length()
        if width > 4:
            return True
        known, begin = _matroska_size(data, at + width)
        at = begin if data[at : at + width] in (SEGMENT, CLUSTER) else begin + known
    return at > end and size > 0


def _matroska_size(data: bytes, at: int) -> tuple[int, int]:
    """Size that is written in one to eight bytes at an offset, 0 if unknown, and the offset behind it."""
    length = 9 - data[at].bit_length() if at < len(data) else 1
    ones = (1 << 7 * length) - 1
    size = int.from_bytes(data[at : at + length]) & ones
    return (0 if size == ones else size), at + length


def _mp4_breaks_off(data: bytes) -> bool:
    """Whether an MP4 file breaks off: top-level boxes must follow each other to the end of the file."""
    at = 0
    while data[at + 4 : at + 8] in MP4_BOXES:
        size = int.from_bytes(data[at : at + 4])
        if size == 1:  # too large for four bytes
            size = int.from_bytes(data[at + 8 : at + 16])
        if size < 8:  # 0 is to the end of the file
            return False
        at += size
    return at > len(data)


def _mp4_lies(data: bytes) -> bool:
    """Whether the sample tables of an MP4 file promise more samples than there can be.

    FFmpeg allocates room for all of them, where a table says once how large each is.
    """
    at, samples = 0, 0
    while at + 8 <= len(data):
        size, kind, body = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:  # too large for four bytes
            size, body = int.from_bytes(data[at + 8 : at + 16]), at + 16
        if kind in (b"stsz", b"stz2", b"trun"):
            count = body + (4 if kind == b"trun" else 8)
            samples += int.from_bytes(data[count : count + 4])
        if kind in MP4_PARENTS:
            at = body  # its boxes follow, and then those beside it
        elif at + size >= body:
            at += size
        else:
            break
    return samples > SAMPLES_A_BYTE * len(data)
