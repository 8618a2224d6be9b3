"""What one server takes on, in one place. Every number is a bound that a request or a stranger can run into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and counts; the defaults suit a small public server."""

    prompt: int = 2000  # characters
    steps: int = 200  # solver steps of a clip
    side: int = 1024  # pixels of the longer side of a clip as it is delivered
    body: int = 12 << 20  # bytes of a request
    small_body: int = 64 << 10  # bytes of a request that needs no turn: larger ones are read ``uploads`` at a time
    uploads: int = 8
    image_pixels: int = 1 << 25  # of an uploaded picture, looked at before it is decoded
    body_seconds: float = 30.0  # for a request to arrive, once its head is there
    head_seconds: float = 10.0  # for the head of a request to arrive
    stall_seconds: float = 15.0  # in which a client takes at least 16 KiB of what is sent to it
    connections: int = 1024
    streams: int = 256  # of progress at once
    queue: int = 64  # jobs that wait
    batch: int = 16  # clips generated together
    attempts: int = 3  # starts of one job: one that takes the process down with it is given up
    keep_seconds: float = 7 * 86400.0  # of a finished clip
    keep_bytes: int = 10 << 30  # of all finished clips
    session_seconds: float = 12 * 3600.0  # of a login in a browser
