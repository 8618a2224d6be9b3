"""Clips as ``generate`` returns them: pixels, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from archipel.ensemble import provenance
from archipel.ensemble.safety import BlockedError, Safety
from archipel.ensemble.settings import Settings


@dataclass(frozen=True)
class Generated:
    """Clips uint8 (N, F, H, W, 3), frames per second, and how they came about.

    weights: float32 (N, S, K), the share of each expert at the beginning of each step; None for the monolith.
    expert_rows: rows that went through an expert, both guidance branches counted: the cost of sampling; router_rows: the same
    of the router (once per clip where it is asked before the first step only, and not counted then).
    blocked: rows that the safety filter withheld (``safety``): black in ``clips``, and never saved.
    lost: for each clip, experts that were lost on the way -> the first step that was made without them.
    notes: what each clip's file shall say of it (see ``provenance``).
    """

    clips: np.ndarray
    fps: float
    prompts: list[str]
    seeds: list[int]
    settings: Settings
    weights: np.ndarray | None = None
    expert_rows: int = 0
    warnings: list[str] = field(default_factory=list)
    router_rows: int = 0
    model: str = ""
    run_id: str = ""
    blocked: list[int] = field(default_factory=list)
    lost: list[dict[str, int]] = field(default_factory=list)

    @property
    def notes(self) -> list[dict[str, Any]]:
        lost = self.lost or [{} for _ in self.seeds]
        return [self._note([seed], one) for seed, one in zip(self.seeds, lost, strict=True)]

    def note(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What a file says that holds the clips of ``seeds``."""
        return self._note(seeds, {k: step for one in self.lost for k, step in one.items()})

    def _note(self, seeds: Sequence[int], lost: dict[str, int]) -> dict[str, Any]:
        made = provenance.of(self.model, self.run_id, seeds, vars(self.settings))
        return {**made, "without": lost} if lost else made

    def save(self, path: Path | str, *, scale: int = 1) -> list[Path]:
        """Write the clips as ``path`` says (.mp4, .webp, .gif, or a folder of PNG frames), numbered where there are several,
        each with its note; those in ``blocked`` are left out. Raises ArchipelError where that cannot be done, or all are."""
        from archipel.ensemble.video import write_clips

        if len(self.blocked) == len(self.clips):
            raise BlockedError(self.withheld())
        return write_clips(path, self.clips, self.fps, scale=scale, notes=self.notes, skip=self.blocked)

    def withheld(self) -> str:
        """A sentence about ``blocked``."""
        seeds = ", ".join(str(self.seeds[row]) for row in self.blocked)
        return f"{len(self.blocked)} of {len(self.seeds)} clips withheld by the safety filter (seeds {seeds})"

    @classmethod
    def checked(cls, safety: Safety | None, clips: np.ndarray, *rest: Any) -> Generated:
        """With what ``safety`` blocks taken out, and a warning that says so."""
        made = cls(clips, *rest)
        blocked = [] if safety is None else safety.blocked(clips)
        if not blocked:
            return made
        shown = clips.copy()
        shown[blocked] = 0
        made = replace(made, clips=shown, blocked=blocked)
        return replace(made, warnings=[*made.warnings, made.withheld()])

    @staticmethod
    def join(parts: Sequence[Generated]) -> Generated:
        """Several batches of one ``generate`` as one."""
        first = parts[0]
        begins = [sum(len(one.seeds) for one in parts[:i]) for i in range(len(parts))]
        weights = [one.weights for one in parts if one.weights is not None]
        return replace(
            first,
            clips=np.concatenate([one.clips for one in parts]),
            prompts=[prompt for one in parts for prompt in one.prompts],
            seeds=[seed for one in parts for seed in one.seeds],
            weights=np.concatenate(weights) if weights else None,
            expert_rows=sum(one.expert_rows for one in parts),
            router_rows=sum(one.router_rows for one in parts),
            lost=[lost for one in parts for lost in one.lost],
            blocked=[begin + row for begin, one in zip(begins, parts, strict=True) for row in one.blocked],
            warnings=list(dict.fromkeys(warning for one in parts for warning in one.warnings)),
        )
