"""Images without the contents beside their pixels: texts, profiles, thumbnails, a missing end."""

from __future__ import annotations

import zlib

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PNG_KEPT = (b"tRNS", b"eXIf")  # beside the critical chunks: what is transparent, and which way is up
JPEG_DROPPED = {*range(0xE2, 0xEE), 0xEF, 0xFE}  # all but JFIF, EXIF (which way is up), Adobe's (what the colours are)
MORE_PIXELS = b"\x5a" * 64  # bits that any scan takes for coefficients


def bare_versions(data: bytes) -> list[bytes]:
    """Versions of an image file without contents that its pixels do not need, equal in pixels if none is missing.

    A JPEG file that was cut off would be filled up with grey; where that begins, the two versions differ. None for
    formats whose readers pass over what they do not need.
    """
    if data.startswith(PNG):
        return [_bare_png(data)]
    if data.startswith(JPEG):
        bare = _bare_jpeg(data).rstrip(b"\xff")
        return [bare + end + b"\xff\xd9" for end in (b"", MORE_PIXELS)]
    return []


def _bare_png(data: bytes) -> bytes:
    kept, at = [data[: len(PNG)]], len(PNG)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        critical = not kind[0] & 0x20
        if critical or (kind in PNG_KEPT and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])):
            kept.append(chunk)
        at += 12 + length
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    """JPEG file without those segments before its scans that the pixels do not need."""
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        length = 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] not in JPEG_DROPPED:
            kept.append(data[at : at + length])
        at += length
    return b"".join([*kept, data[at:]])
