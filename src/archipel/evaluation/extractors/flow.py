"""Motion as optical flow: how many pixels things move from one frame to the next."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from archipel.errors import ArchipelError
from archipel.evaluation.extractors.base import Measured, identity

NAME = "flow"
_LEAST_SIDE = 16  # the method compares patches of 8 pixels on an image pyramid


class Flow:
    """Scalar ``flow`` in px/frame: mean length of the flow vectors over all pixels and all pairs of following frames.

    Dense inverse search (Kroeger et al. 2016) as in OpenCV, medium preset down to single pixels, on grey frames at the
    clip's own resolution: a clip twice as large has twice the value. Where nothing is to be seen (white ground around a
    thing that moves) the method carries the thing's motion outwards, so values are for comparing clips alike in kind, not
    for measuring speed.
    A still clip has 0, and so has a clip of one frame.
    """

    features: tuple[str, ...] = ()
    scalars: tuple[str, ...] = (NAME,)
    least_frames = 1
    needs_captions = False

    def __init__(self) -> None:
        cv2 = _opencv()
        layer = f"OpenCV {cv2.__version__}, dense inverse search, medium preset, finest scale 0, grey"
        self.identity = {NAME: identity(weights="", layer=layer, resize=0, frames=0, metric=NAME, unit="px/frame")}

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        return Measured(scalars={NAME: optical_flow(clips)})


def optical_flow(clips: np.ndarray) -> np.ndarray:
    """uint8 clips (N, F, H, W, 3) -> (N,) float64 in px/frame, see ``Flow``.

    Raises ArchipelError for frames under 16 pixels high or wide, and where OpenCV is not installed.
    """
    cv2 = _opencv()
    if min(clips.shape[2:4]) < _LEAST_SIDE:
        raise ArchipelError(
            f"flow needs frames of at least {_LEAST_SIDE}x{_LEAST_SIDE} pixels, not {clips.shape[2]}x{clips.shape[3]}: "
            "raise clips.size or leave flow out"
        )
    values = np.zeros(len(clips))
    with _one_thread(cv2):  # work is cut into one piece per thread, and where it is cut changes the numbers
        # New for every call, since it keeps settings that it changed for small frames; and to the finest scale, since the
        # preset stops at half the resolution, where shifts of half a pixel came out 8 % too long.
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        search.setFinestScale(0)
        for row, clip in enumerate(clips):
            grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in clip]
            lengths = [
                np.hypot(flow[..., 0], flow[..., 1]).mean(dtype=np.float64)
                for flow in (search.calc(a, b, None) for a, b in itertools.pairwise(grey))
            ]
            values[row] = np.mean(lengths) if lengths else 0.0
    return values


@contextlib.contextmanager
def _one_thread(cv2: Any) -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ArchipelError(
            "optical flow needs OpenCV: `pip install 'archipel[eval]'` brings opencv-python-headless"
        ) from error
    return cv2
