"""Reading a run that may be unfinished, half written or of a stranger: what is not there is None, what is broken is noted."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.errors import ArchipelError
from archipel.run import MONOLITH, Run

ARM_LABELS = {
    "real": "Real clips",
    "codec": "Codec only",
    "monolith": "Monolith",
    "top1": "top-1",
    "top2": "top-2",
    "full": "full mixture",
    "threshold": "threshold",
    "ancestral": "ancestral",
    "oracle": "oracle",
}
ARM_NOTES = {
    "real": "held-out clips, as they are",
    "codec": "the same clips through encoder and decoder: what the codec alone costs",
    "monolith": "one model trained on everything",
    "top1": "at every step the most likely expert alone",
    "top2": "at every step the two most likely experts, weighted",
    "full": "at every step all experts, weighted by the router",
    "threshold": "at every step the experts above a share, weighted",
    "ancestral": "one expert drawn per clip from the caption, followed to the end",
    "oracle": "the expert of the real clip's own cluster, which no prompt gives: a reference, not a method",
}


def finite(value: Any) -> float | None:
    """A finite number, or None (missing, text, NaN, infinite, bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def floats(value: Any) -> list[float]:
    """A list of numbers with NaN where an entry is none; [] where ``value`` is no list."""
    if not isinstance(value, (list, tuple)):
        return []
    return [math.nan if (one := finite(entry)) is None else one for entry in value]


def arm_label(arm: str, primary: str) -> str:
    """The name that people read: the primary strategy is 'Archipelago'."""
    label = ARM_LABELS.get(arm, arm)
    return f"Archipelago ({label})" if arm == primary and arm != MONOLITH else label


def arm_tone(arm: str, primary: str) -> str:
    """CSS class of an arm's colour."""
    if arm in ("real", "codec", MONOLITH):
        return {"real": "real", "codec": "codec", MONOLITH: "mono"}[arm]
    return "arch" if arm == primary else "other"


class Reader:
    """Optional files of one run. ``problems`` gathers what could not be read, in names relative to the run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.problems: list[str] = []
        self.name = run.root.resolve().name or "RUN"

    def command(self, stage: str, *more: str) -> str:
        """What to type to get a missing part. Only the folder's name: a report is passed on, a home directory is not."""
        return " ".join(["archipel", stage, shlex.quote(self.name), *more])

    def relative(self, path: Path) -> str:
        return path.relative_to(self.run.root).as_posix()

    def note(self, path: Path, error: Exception) -> None:
        text = str(error).replace(str(self.run.root) + "/", "").replace(str(self.run.root.resolve()) + "/", "")
        entry = text if self.relative(path) in text else f"{self.relative(path)}: {text}"
        if entry not in self.problems:
            self.problems.append(entry)

    def json(self, path: Path) -> Any:
        """Parsed JSON, or None where the file is missing or (noted) unreadable."""
        if not path.is_file():
            return None
        try:
            return store.read_json(path)
        except (ArchipelError, OSError) as error:
            self.note(path, error)
            return None

    def card(self, folder: Path) -> Mapping[str, Any] | None:
        """The folder's card where this run committed it, else None."""
        try:
            card = store.read_card(folder)
        except (ArchipelError, OSError) as error:
            self.note(folder / "card.json", error)
            return None
        if card is None:
            return None
        if card.get("run") not in (None, self.run.id):
            self.note(folder / "card.json", ValueError("was written for another run and is left out"))
            return None
        return card

    def lines(self, path: Path) -> list[dict[str, Any]]:
        try:
            return store.read_jsonl(path)
        except OSError as error:
            self.note(path, error)
            return []

    def tensors(self, path: Path) -> dict[str, np.ndarray] | None:
        """Memory-mapped tensors, or None where the file is missing or (noted) damaged."""
        if not path.is_file():
            return None
        try:
            return store.map_tensors(path)
        except (ArchipelError, OSError) as error:
            self.note(path, error)
            return None

    @property
    def protocol(self) -> str:
        """Whose samples and scores are shown: the configured split, else the only one there is."""
        wanted: str = self.run.config.evaluate.split
        for split in (wanted, "validation", "test"):
            if self.run.samples(split).is_dir() or self.run.scores(split).is_file():
                return split
        return wanted
