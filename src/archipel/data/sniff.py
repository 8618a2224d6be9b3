"""What a clip's bytes are, told by the bytes and not by the name, and whether the file is whole.

Naming the container ourselves matters for safety: left to probe, FFmpeg would also recognise playlists and
concatenation scripts, which open other files and addresses.
"""

from __future__ import annotations

from archipel.data.base import Rejected

PILLOW_KINDS = ("webp", "gif", "png")
AV_FORMATS = {"mov": "mov", "matroska": "matroska", "avi": "avi"}

_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")


def kind_of(data: bytes) -> str:
    """``webp``, ``gif``, ``png``, ``mov`` (MP4 and MOV), ``matroska`` (WebM and MKV) or ``avi``. Raises Rejected."""
    if not data:
        raise Rejected("no frames: the file is empty")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[4:8] in _MOV_BOXES:
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise Rejected("not a clip: the bytes are not MP4, MOV, WebM, AVI, GIF, WebP or PNG")


def check_whole(data: bytes, kind: str) -> None:
    """Raise Rejected where the container says that it is longer than the file."""
    whole = {
        "webp": _riff_whole,
        "avi": _riff_whole,
        "gif": _gif_whole,
        "png": _png_whole,
        "mov": _mov_whole,
        "matroska": _matroska_whole,
    }[kind](data)
    if not whole:
        raise Rejected("truncated: the file ends before its container does")


def _riff_whole(data: bytes) -> bool:
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")


def _gif_whole(data: bytes) -> bool:
    # The trailer byte ends a GIF; some writers pad with zeros after it.
    return data.rstrip(b"\0")[-1:] == b";"


def _png_whole(data: bytes) -> bool:
    return data.rfind(b"IEND\xaeB`\x82") > 0


def _mov_whole(data: bytes) -> bool:
    """Walk the top-level boxes (ISO/IEC 14496-12, 4.2): size 1 means a 64-bit size follows, 0 means "to the end"."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1 and at + 16 <= len(data):
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:
            return True
        if size < 8:
            return False
        at += size
    return at <= len(data)


def _vint(data: bytes, at: int, keep_marker: bool) -> tuple[int | None, int]:
    """An EBML variable-length integer (RFC 8794, section 4) and where it ends; None for "unknown" and for nonsense."""
    if at >= len(data) or data[at] == 0:
        return None, at + 1
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    if keep_marker:
        return value, at + length
    value &= (1 << 7 * length) - 1
    return (None if value == (1 << 7 * length) - 1 else value), at + length


def _matroska_whole(data: bytes) -> bool:
    at = 0
    while at < len(data):
        _, at = _vint(data, at, keep_marker=True)
        size, at = _vint(data, at, keep_marker=False)
        if size is None:  # a live stream's segment of unknown size: it ends where the file ends
            return True
        at += size
    return at <= len(data)
