"""Which settings are planned: those of a run, or of a preset as `archipel init` would write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import config as configuration
from archipel import pipeline
from archipel.config import RunConfig
from archipel.data import count_items


@dataclass(frozen=True)
class Asked:
    """``clips``: how many there are, or can be at most; None where the source does not say."""

    config: RunConfig
    clips: int | None
    root: Path | None = None


def of_run(root: Path, sets: Sequence[str]) -> Asked:
    """A run's own settings. Raises what opening it raises, and ConfigError for settings that cannot work together."""
    run = pipeline.open_run(root, sets)
    configuration.check(run.config)
    if run.done(run.clips):
        from archipel.manifest import read_manifest

        return Asked(run.config, len(read_manifest(run.manifest)), run.root)
    return Asked(run.config, count_items(run.config.clips), run.root)


def of_preset(preset: str, sets: Sequence[str], **given: Any) -> Asked:
    """As `archipel init` resolves it, and with its refusals; nothing is written."""
    config = pipeline.resolve(preset=preset, sets=sets, **given)
    return Asked(config, count_items(config.clips))
