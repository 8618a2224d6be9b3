"""Motion: how much consecutive frames differ. Descriptive: more is not better, near the real clips' is."""

from __future__ import annotations

import numpy as np


def motion(clips: np.ndarray) -> np.ndarray:
    """Mean absolute difference of consecutive frames of uint8 clips (N, F, H, W, 3): (N,) float64 in [0, 1].

    A clip of one frame has motion 0. The manifest's ``motion`` is the same number.
    """
    if clips.shape[1] < 2:
        return np.zeros(len(clips))
    values = np.empty(len(clips))
    for row, clip in enumerate(clips):
        frames = clip.astype(np.float32)
        values[row] = np.abs(np.diff(frames, axis=0)).mean(dtype=np.float64) / 255.0
    return values
