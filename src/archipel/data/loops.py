"""Animated WebP and PNG taken apart, so that only those frames are decoded that leave a trace in a wanted one.

A frame of such a file is a picture of its own that is laid into a rectangle of the canvas; what later frames cover, or
clear away, need not be decoded. Pillow decodes the pictures (each as a file of one frame) and, where a file asks for
anything else than laying and clearing (blending, going back to an earlier canvas), the whole animation: ``read`` then
gives None. Formats: WebP container specification (ANMF), as libwebp's WebPAnimDecoder reads it; PNG, third edition,
11.3.6 (acTL, fcTL, fdAT).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the canvas

MOST_FRAMES = 10_000  # of a file that is taken apart
MOST_COVERS = 64  # rectangles that are remembered while looking back; more would only spare more decoding
_PNG = b"\x89PNG\r\n\x1a\n"


class _OtherError(Exception):
    """The file asks for what is not done here."""


@dataclass(frozen=True)
class Piece:
    """One frame as the file stores it. ``clear``: its box is transparent again once the frame has been shown."""

    box: Box
    clear: bool
    milliseconds: float
    encoded: Callable[[], bytes]  # a picture file of this frame alone


@dataclass(frozen=True)
class Loop:
    """``pieces`` in order, for a canvas of ``size`` (width, height); ``mode`` is RGBA, or RGB without transparency."""

    mode: str
    size: tuple[int, int]
    pieces: tuple[Piece, ...]

    def frames(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """The canvas at each of the ``numbers`` (ascending, no doubles). It is changed by the next: use it at once."""
        from PIL import Image

        canvas = Image.new("RGBA", self.size)
        at = -1
        for number in numbers:
            drawn = set(traces(self.pieces[at + 1 : number + 1]))
            for i in range(at + 1, number + 1):
                if i > 0 and self.pieces[i - 1].clear:
                    canvas.paste((0, 0, 0, 0), self.pieces[i - 1].box)
                if i - at - 1 in drawn:
                    canvas.paste(_picture(self.pieces[i]), self.pieces[i].box)
            at = number
            yield number, canvas if self.mode == "RGBA" else canvas.convert("RGB")


def traces(pieces: Sequence[Piece]) -> list[int]:
    """Places of those pieces that can still be seen, at least in part, once the last of them is shown."""
    seen: list[int] = []
    covers: list[Box] = []
    for i in reversed(range(len(pieces))):
        one = pieces[i]
        last = i == len(pieces) - 1
        if _covered(one.box, covers):
            continue
        if last or not one.clear:
            seen.append(i)
        if len(covers) < MOST_COVERS:
            covers.append(one.box)
    return seen[::-1]


def _inside(box: Box, cover: Box) -> bool:
    return cover[0] <= box[0] and cover[1] <= box[1] and box[2] <= cover[2] and box[3] <= cover[3]


def _covered(box: Box, covers: Sequence[Box]) -> bool:
    """Whether nothing of the box is left outside all of the covers."""
    rest = [box]
    for cover in covers:
        rest = [part for one in rest for part in _outside(one, cover)]
    return not rest


def _outside(box: Box, cover: Box) -> list[Box]:
    """The box without the cover, as rectangles: above and below it, then left and right of it."""
    left, top, right, bottom = box
    high, low = max(top, cover[1]), min(bottom, cover[3])
    start, stop = max(left, cover[0]), min(right, cover[2])
    if high >= low or start >= stop:
        return [box]
    parts = [(left, top, right, high), (left, low, right, bottom), (left, high, start, low), (stop, high, right, low)]
    return [(a, b, c, d) for a, b, c, d in parts if a < c and b < d]


def _picture(piece: Piece) -> Image.Image:
    from PIL import Image

    left, top, right, bottom = piece.box
    with Image.open(io.BytesIO(piece.encoded()), formats=["WEBP", "PNG"]) as image:
        if image.size != (right - left, bottom - top):
            raise ValueError("a frame is not as large as it says")
        return image.convert("RGBA")


def read(data: bytes, image: Any) -> Loop | None:
    """What Pillow has opened as ``image``, taken apart; None where that is left to Pillow."""
    try:
        if image.format == "WEBP":
            pieces = _webp_pieces(data, image)
        elif image.format == "PNG":
            pieces = _png_pieces(data, image)
        else:
            return None
    except (_OtherError, IndexError):
        return None
    width, height = image.size
    whole = (0, 0, width, height)
    if not pieces or len(pieces) != image.n_frames or not all(_inside(one.box, whole) for one in pieces):
        return None
    return Loop(image.mode, (width, height), tuple(pieces))


# --- WebP ------------------------------------------------------------------------------------------------------------


def _little(data: bytes, at: int, size: int = 3) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _riff(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, where it ends) of every chunk."""
    while at + 8 <= end:
        size = _little(data, at + 4, 4)
        if at + 8 + size > end:
            raise _OtherError
        yield data[at : at + 4], at + 8, at + 8 + size
        at += 8 + size + size % 2


def _webp_pieces(data: bytes, image: Any) -> list[Piece]:
    if image.mode not in ("RGB", "RGBA") or not image.is_animated:
        raise _OtherError
    whole = (0, 0, *image.size)
    pieces: list[Piece] = []
    empty = False  # whether the canvas is empty before the frame
    for name, begin, end in _riff(data, 12, min(len(data), 8 + _little(data, 4, 4))):
        if name != b"ANMF":
            continue
        if len(pieces) == MOST_FRAMES or end - begin < 24:
            raise _OtherError
        left, top = 2 * _little(data, begin), 2 * _little(data, begin + 3)
        box = (left, top, left + 1 + _little(data, begin + 6), top + 1 + _little(data, begin + 9))
        laid, clear = bool(data[begin + 15] & 2), bool(data[begin + 15] & 1)
        # Blending of what is opaque, or onto nothing, is laying: libwebp's IsKeyFrame in anim_decode.c.
        opaque = laid or not _transparent(data, begin + 16, end)
        if pieces and not opaque and not empty:
            raise _OtherError
        key = not pieces or empty or (opaque and box == whole)
        empty = clear and (box == whole or key)
        pieces.append(Piece(box, clear, float(_little(data, begin + 12)), _still(data, begin, end)))
    return pieces


def _transparent(data: bytes, begin: int, end: int) -> bool:
    """Whether a frame's picture has an alpha channel: an ALPH chunk, or the bit that says so in a VP8L header."""
    return any(
        name == b"ALPH" or (name == b"VP8L" and data[at + 4] >> 4 & 1 == 1) for name, at, _ in _riff(data, begin, end)
    )


def _still(data: bytes, begin: int, end: int) -> Callable[[], bytes]:
    def encoded() -> bytes:
        parts = data[begin + 16 : end]
        head = b"VP8X" + (10).to_bytes(4, "little") + b"\x10\0\0\0" + data[begin + 6 : begin + 12]
        body = b"WEBP" + head + parts + b"\0" * (len(parts) % 2)
        return b"RIFF" + len(body).to_bytes(4, "little") + body

    return encoded


# --- PNG -------------------------------------------------------------------------------------------------------------


def _png_pieces(data: bytes, image: Any) -> list[Piece]:
    """For eight bits a channel, with or without alpha, whose first frame is the picture that old viewers show."""
    header = data[16:29]  # width, height, depth, colour type, compression, filter, interlacing
    if header[8] != 8 or header[9] not in (2, 6) or image.mode not in ("RGB", "RGBA") or "transparency" in image.info:
        raise _OtherError
    found: list[tuple[bytes, list[tuple[int, int]]]] = []
    at = len(_PNG)
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        begin, end = at + 8, at + 8 + size
        if end + 4 > len(data) or len(found) > MOST_FRAMES:
            raise _OtherError
        if name == b"fcTL":
            found.append((data[begin:end], []))
        elif name in (b"IDAT", b"fdAT"):
            if not found:  # a stand-in that is no part of the animation
                raise _OtherError
            found[-1][1].append((begin, end))
        at = end + 4
    pieces = [_png_piece(data, header, about, parts) for about, parts in found]
    if pieces and pieces[0].box != (0, 0, *image.size):
        raise _OtherError
    return pieces


def _png_piece(data: bytes, header: bytes, about: bytes, parts: list[tuple[int, int]]) -> Piece:
    if len(about) != 26 or not parts:
        raise _OtherError
    width, height, left, top = (int.from_bytes(about[i : i + 4], "big") for i in (4, 8, 12, 16))
    part, of = int.from_bytes(about[20:22], "big"), int.from_bytes(about[22:24], "big") or 100
    dispose, blend = about[24], about[25]
    if dispose not in (0, 1) or (blend and header[9] == 6):  # opaque frames are laid either way
        raise _OtherError

    def encoded() -> bytes:
        made = [_PNG, _chunk(b"IHDR", about[4:12] + header[8:])]
        for begin, end in parts:
            name = data[begin - 4 : begin]
            if zlib.crc32(data[begin - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise ValueError("a chunk's checksum is wrong")
            made.append(_chunk(b"IDAT", data[begin + (4 if name == b"fdAT" else 0) : end]))
        return b"".join([*made, _chunk(b"IEND", b"")])

    return Piece((left, top, left + width, top + height), dispose == 1, part / of * 1000, encoded)


def _chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
