"""Judges of clips: the networks and algorithms that scores are computed from, packaged ones and ones that people bring.

    judges = Judges.open(["efficientnet-appearance", "flow", "clip=/models/clip-vit-l14"], config)
    measured = judges.measure(clips, captions)

What a judge is called and what it needs is in ``specs``; nothing is downloaded unless a spec is a hub id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from archipel.config import Evaluate
from archipel.encoders.features import NAMES as PACKAGED
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import specs as naming
from archipel.evaluation.extractors.base import Judge, Measured, pick_device
from archipel.evaluation.extractors.specs import Spec

__all__ = ["Judges", "Measured", "Spec"]
_CLIPS_AT_ONCE = 16


class Judges:
    """Several judges as one.

    features, scalars: names in the order of the specs. identity: name -> {"weights", "layer", "resize", "frames", "code",
    "metric"} and for scalars "unit": all that decides the numbers apart from the clips, for protocols and cache keys.
    metric is the name scores may carry: "FVD" with I3D only, "CLIP" with CLIP only. The numbers of a clip do not depend on
    the clips beside it (to float32 rounding), so that callers may measure in pieces.
    """

    def __init__(self, judges: Sequence[Judge], order: Sequence[str]) -> None:
        """order: names of specs; a judge of several names would otherwise bring them all at once."""
        self._judges = tuple(judges)
        place = {name: number for number, name in enumerate(order)}  # CLIP's score is written in capitals
        self.features = sorted((name for judge in judges for name in judge.features), key=lambda n: place[n.lower()])
        self.scalars = sorted((name for judge in judges for name in judge.scalars), key=lambda n: place[n.lower()])
        made: dict[str, dict[str, Any]] = {}
        for judge in judges:
            made |= judge.identity
        self.identity = {name: made[name] for name in (*self.features, *self.scalars)}
        self.needs_captions = any(judge.needs_captions for judge in judges)

    @classmethod
    def open(
        cls, specs: Sequence[str], config: Evaluate, *, allow_torchscript: bool = False, device: str | None = None
    ) -> Judges:
        """Load what ``specs`` name: ``NAME`` or ``NAME=WHERE[@sha256:HEX]``; () for the packaged networks and ``flow``.

        config: ``frames`` and ``image_size`` of the image networks. device: as torch names it; a GPU where there is one,
        else the CPU (the packaged networks always run on the CPU). Raises ArchipelError for unknown names, missing files
        and packages, another sha256 than given, and TorchScript without ``allow_torchscript`` and a sha256.
        """
        wanted = naming.parse_all(specs)
        return cls(list(_open(wanted, config, allow_torchscript, device)), [spec.name for spec in wanted])

    def require_frames(self, frames: int) -> None:
        """Raises ArchipelError where a judge cannot look at clips of so few frames, before anything is trained for it."""
        for judge in self._judges:
            if frames < judge.least_frames:
                raise ArchipelError(
                    f"{judge.features[0]} needs clips of at least {judge.least_frames} frames, these have {frames}: raise "
                    f"clips.frames, or leave {judge.features[0]} out"
                )

    def measure(self, clips: np.ndarray, captions: Sequence[str] = ()) -> Measured:
        """clips uint8 (N, F, H, W, 3), captions: one per clip (looked at by CLIP only) -> features and scalars.

        Memory is bounded whatever N is, apart from what is returned. Raises ArchipelError for clips of another kind, too
        few frames or captions, and features that are not finite.
        """
        if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] != 3 or not len(clips):
            raise ArchipelError(f"clips must be uint8 (N, F, H, W, 3), N at least 1, not {clips.dtype} {clips.shape}")
        if len(captions) != len(clips) and (self.needs_captions or captions):
            raise ArchipelError(f"{len(clips)} clips need as many captions, not {len(captions)}")
        self.require_frames(clips.shape[1])
        parts: list[dict[str, np.ndarray]] = []
        for begin in range(0, len(clips), _CLIPS_AT_ONCE):
            part = np.array(clips[begin : begin + _CLIPS_AT_ONCE])  # a copy that may be written, as torch wants
            texts = list(captions[begin : begin + _CLIPS_AT_ONCE])
            made: dict[str, np.ndarray] = {}
            for judge in self._judges:
                found = judge.measure(part, texts)
                made |= found.features | found.scalars
            parts.append(made)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in (*self.features, *self.scalars)}
        for name, values in whole.items():
            if not np.isfinite(values).all():
                raise ArchipelError(f"{name} gave numbers that are not finite: its weights are unusable")
        return Measured(
            {name: whole[name].astype(np.float32) for name in self.features},
            {name: whole[name].astype(np.float64) for name in self.scalars},
        )


def _open(specs: Sequence[Spec], config: Evaluate, allow_torchscript: bool, device: str | None) -> Iterator[Judge]:
    """One judge per network: the packaged ones share a pass, and so do CLIP and its aesthetic head."""
    by_name = {spec.name: spec for spec in specs}
    packaged = [name for name in by_name if name in PACKAGED]
    for spec in specs:
        if spec.name in packaged[:1]:
            from archipel.evaluation.extractors.packaged import Packaged

            yield Packaged(packaged, config)
        elif spec.name == naming.FLOW:
            from archipel.evaluation.extractors.flow import Flow

            yield Flow()
        elif spec.name == naming.I3D:
            from archipel.evaluation.extractors.i3d import I3D

            yield I3D(spec, pick_device(device), allow_torchscript=allow_torchscript)
        elif spec.name == naming.VIDEOMAE:
            from archipel.evaluation.extractors.videomae import VideoMAE

            yield VideoMAE(spec, pick_device(device))
        elif spec.name == naming.CLIP:
            from archipel.evaluation.extractors.images import Clip

            yield Clip(spec, config, pick_device(device), by_name.get(naming.AESTHETIC))
        elif spec.name == naming.DINOV2:
            from archipel.evaluation.extractors.images import DinoV2

            yield DinoV2(spec, config, pick_device(device))
