"""What every judge of clips has in common, and what is known of it before it has seen any."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

# Raised whenever a judge of this package gives other numbers for the same clips; the packaged networks have their own.
CODE = 1
FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class Measured:
    """features: extractor -> (N, D) float32; scalars: name -> (N,) float64."""

    features: dict[str, np.ndarray] = field(default_factory=dict)
    scalars: dict[str, np.ndarray] = field(default_factory=dict)


class Judge(Protocol):
    """One network (or algorithm) and all that is read from one pass of it.

    features, scalars: names of what ``measure`` returns; identity: by those names, all that decides the numbers apart
    from the clips; least_frames: shorter clips are refused; needs_captions: whether captions are looked at.
    """

    features: tuple[str, ...]
    scalars: tuple[str, ...]
    identity: dict[str, dict[str, Any]]
    least_frames: int
    needs_captions: bool

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        """clips uint8 (N, F, H, W, 3), one caption each where captions are needed -> Measured."""
        ...


def identity(
    *, weights: str, layer: str, resize: int, frames: int, metric: str, code: int = CODE, **more: Any
) -> dict[str, Any]:
    """What a protocol needs to know of a judge. weights: sha256, "" where there are none; resize: pixels of the input's
    side, 0 where clips are taken as they are; frames: frames looked at, 0 for all of a clip; metric: the name under which
    its scores may be shown."""
    return {
        "weights": weights,
        "layer": layer,
        "resize": resize,
        "frames": frames,
        "code": code,
        "metric": metric,
        **more,
    }


def pick_device(device: str | None) -> str:
    """The device asked for; a GPU where there is one and none was asked for, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 stays float32 on a GPU, and the same clips give the same numbers: no TF32, no search for fast kernels."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
