"""Files that were cut off, seen from the lengths that they themselves give; decoders often take the cut for the end."""

from __future__ import annotations

UNKNOWN_RIFF_SIZE = 0x7FFF0000  # and above: of a writer that could not go back to fill it in
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"mfra", b"meta")


def breaks_off(data: bytes) -> bool:
    """Whether a RIFF (WAV, WebP), Ogg, Matroska (WebM) or MP4 (M4A) file ends before its own structure does.

    False for every other kind of file, and where the file does not say how long it is.
    """
    if data[:4] == b"RIFF":
        return len(data) < int.from_bytes(data[4:8], "little") < UNKNOWN_RIFF_SIZE
    if data[:4] == b"OggS":
        return _ogg_breaks_off(data)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_breaks_off(data)
    return data[4:8] == b"ftyp" and _mp4_breaks_off(data)


def _ogg_breaks_off(data: bytes) -> bool:
    """The last page must be whole, and flagged as the last of its stream."""
    page = data[data.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return not segments or len(page) < 27 + len(segments) + sum(segments) or not page[5] & 4


def _matroska_breaks_off(data: bytes) -> bool:
    """All data lie in one segment, after the header."""
    size, begin = _matroska_size(data, 4)
    segment = begin + size
    if data[segment : segment + 4] != b"\x18\x53\x80\x67":
        return segment >= len(data)
    size, begin = _matroska_size(data, segment + 4)
    return len(data) < begin + size


def _matroska_size(data: bytes, at: int) -> tuple[int, int]:
    """The size at an offset, written in one to eight bytes, and where what it measures begins; 0 if unknown."""
    length = 9 - data[at].bit_length() if at < len(data) else 1
    ones = (1 << 7 * length) - 1
    size = int.from_bytes(data[at : at + length]) & ones
    return (0 if size == ones else size), at + length


def _mp4_breaks_off(data: bytes) -> bool:
    """Top-level boxes follow each other to the end of the file."""
    at = 0
    while data[at + 4 : at + 8] in MP4_BOXES:
        size = int.from_bytes(data[at : at + 4])
        if size == 1:  # too large for four bytes
            size = int.from_bytes(data[at + 8 : at + 16])
        if size < 8:  # 0 is to the end of the file
            return False
        at += size
    return at > len(data)
