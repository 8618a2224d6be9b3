"""Does a clip begin with the frame that it was given? PSNR of generated first frames against the given ones.

Metric "PSNR-first-frame", in dB, the mean over clips: of the arms that were given the real clips' first frames; of arm
``codec``, the real clips through the codec, above which no arm can be expected. "PSNR-first-frame-text-only" is what the same
arms score that were given the caption and the noise, but no frame: what is no gain. The frames are the real clips' own, so
this says nothing about what follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from archipel import store
from archipel.errors import DamagedError
from archipel.evaluation import intervals
from archipel.evaluation.inputs import CODEC, REAL
from archipel.evaluation.measure import Frame, Score
from archipel.flow.given import TASKS
from archipel.run import MONOLITH, Run

if TYPE_CHECKING:
    from pathlib import Path

METRIC = "PSNR-first-frame"
TEXT_ONLY = f"{METRIC}-text-only"
NOTE = (
    f"{METRIC} is of clips that were given the real clip's first frame (the codec's row: what the codec alone keeps of it); "
    f"{TEXT_ONLY} is of the same arms without it"
)
# Rounding to 8 bits has this mean square in units of the range: equal frames get 58.9 dB and not infinity.
_ROUNDING = 1 / 255**2 / 12


def gives_first_frames(run: Run) -> bool:
    """Whether the run's networks can be given a first frame."""
    return run.config.expert.tasks[TASKS.index("head")] > 0


def folder(run: Run) -> Path:
    """Samples of the evaluated split that were given their first frame."""
    return run.begun(run.config.evaluate.split)


def psnr(frames: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 frames (N, H, W, 3) against ``wanted``, each over all its numbers: (N,).

    10 log10(1 / max(MSE, rounding)) with values in [0, 1]. Raises ValueError for frames of unequal shapes.
    """
    if frames.shape != wanted.shape:
        raise ValueError(f"frames of {frames.shape} and {wanted.shape} cannot be compared")
    found = np.empty(len(frames))
    for row, (one, other) in enumerate(zip(frames, wanted, strict=True)):
        error = (one.astype(np.float64) - other) / 255
        found[row] = -10 * np.log10(max(float(np.square(error).mean()), _ROUNDING))
    return found


def first_frame_scores(frame: Frame) -> Iterator[Score]:
    """PSNR of first frames, of a run that was trained to be given them; nothing for any other."""
    inputs = frame.inputs
    if not gives_first_frames(inputs.run):
        return
    wanted = inputs.arms[REAL].clips[:, 0]
    strategy = inputs.run.config.sample.strategy
    for arm in dict.fromkeys([strategy, MONOLITH]):
        yield _score(frame, arm, METRIC, _begun(inputs.run, arm, len(wanted)), wanted)
    for arm, metric in ((CODEC, METRIC), *((arm, TEXT_ONLY) for arm in dict.fromkeys([strategy, MONOLITH]))):
        if arm in inputs.arms:
            yield _score(frame, arm, metric, inputs.arms[arm].clips[:, 0], wanted)


def _score(frame: Frame, arm: str, metric: str, frames: np.ndarray, wanted: np.ndarray) -> Score:
    values = psnr(frames, wanted)
    estimator = "mean PSNR of the first frame against the real clip's, dB; " + (
        "the caption alone was given" if metric == TEXT_ONLY else "of what was given it"
    )
    protocol = replace(frame.protocol(estimator, reference=len(wanted)), frames=1)
    left = intervals.leave_out_means(values, frame.group, frame.count)
    return Score(arm, metric, intervals.mean_interval(values, frame.group), len(values), frame.groups, protocol, left)


def _begun(run: Run, arm: str, count: int) -> np.ndarray:
    """First frames uint8 (N, H, W, 3) of an arm's clips that were given them."""
    path = folder(run) / f"{arm}.safetensors"
    found = store.map_tensors(path).get("clips") if path.is_file() else None
    if found is None or found.dtype != np.uint8 or found.ndim != 5 or len(found) != count:
        shape = "no clips" if found is None else f"{found.dtype} {found.shape}"
        raise DamagedError(f"{path} holds {shape}, expected uint8 clips ({count}, F, H, W, 3): generate the arm again")
    return found[:, 0]
