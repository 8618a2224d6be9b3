"""How far a packed run is from its original: velocities at the same places, clips from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel.ensemble.parts import Parts
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError
from archipel.flow import draws
from archipel.run import MONOLITH, ROUTER, Run
from archipel.training.batches import Clips

TOLERANCE = 0.01
"""Most root mean square difference of velocities, relative to the original's; of the router's probabilities, absolute."""
_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_CLIPS = 16
_MOST_PSNR = 70.0  # dB: what differs by less than 8 bits can show


def velocities(run: Run, packed: Run) -> dict[str, Any]:
    """{"velocity": {expert: difference}, "router": difference, "tolerance"}: the largest over the times, on validation clips of the
    run with their captions and noise of their own. Raises ArchipelError above ``TOLERANCE``."""
    held = Clips(run.shard(MONOLITH) / "validation.safetensors")
    rows = np.arange(min(_CLIPS, len(held)))
    if not len(rows):
        raise ArchipelError(f"{run.root} has no validation clips to compare velocities on")
    clips, cond, *_ = held.take(rows)
    noise = torch.from_numpy(draws.clip_noise([int(row) for row in rows], tuple(clips.shape[1:])))
    found: dict[str, float] = {}
    one, other = Parts(run), Parts(packed)
    for name in (*run.expert_names, ROUTER):
        worst = 0.0
        for time in _TIMES:
            t, x = torch.full((len(rows),), time), (1 - time) * clips + time * noise
            with torch.no_grad():
                pair = [part.router if name == ROUTER else part.expert(name) for part in (one, other)]
                was, now = (network(x, t, cond).double() for network in pair)
            gap = float((now - was).abs().max()) if name == ROUTER else float((now - was).norm() / was.norm())
            worst = max(worst, gap)
        if not worst <= TOLERANCE:
            raise ArchipelError(
                f"{name} in half precision differs by {worst:.3%} from the original; {TOLERANCE:.0%} is allowed"
            )
        found[name] = worst
    return {
        "velocity": {name: found[name] for name in run.expert_names},
        "router": found[ROUTER],
        "tolerance": TOLERANCE,
    }


@dataclass(frozen=True)
class Made:
    """Clips uint8 (N, F, H, W, 3) for the same captions from the same noise."""

    packed: np.ndarray
    original: np.ndarray
    monolith: np.ndarray


def clips(run: Run, packed: Path, captions: list[str], seed: int, strategy: str) -> Made:
    """Every caption from the noise of ``seed``, by the packed run, the original and its monolith."""
    seeds = [seed] * len(captions)
    original = Archipelago.load(run.root)
    return Made(
        Archipelago.load(packed).generate(captions, seeds=seeds, strategy=strategy).clips,
        original.generate(captions, seeds=seeds, strategy=strategy).clips,
        original.generate(captions, seeds=seeds, strategy=MONOLITH).clips,
    )


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, float | int]:
    """PSNR in dB of clips uint8 (N, F, H, W, 3), peak 255, per clip: mean, least, how many; 70 dB at most."""
    error = np.square(one.astype(np.float64) - other).mean(axis=(1, 2, 3, 4))
    found = np.minimum(_MOST_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))
    return {"mean": round(float(found.mean()), 2), "min": round(float(found.min()), 2), "n": len(found)}
