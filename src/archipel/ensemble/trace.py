"""What a mixture did on the way from noise to clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from archipel.flow.samplers import time_grid

if TYPE_CHECKING:
    from archipel.ensemble.settings import Settings


@dataclass
class Trace:
    """What a mixture did: per velocity call its time and weights (B, K) float32 on the CPU; rows computed per expert, and
    rows that went through the router; experts that were lost on the way, each with the time t and why."""

    times: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    router_rows: int = 0
    lost: dict[int, tuple[float, str]] = field(default_factory=dict)

    def per_step(self, solver: str) -> np.ndarray:
        """Weights at the beginning of every solver step, float32 (B, S, K). Heun calls twice per step but the last."""
        return torch.stack(self.weights[:: 2 if solver == "heun" else 1], dim=1).numpy()

    def steps_lost(self, settings: Settings) -> dict[str, int]:
        """Experts that were lost -> the first step, counted from 1, that was made without them."""
        grid = time_grid(settings.steps, settings.shift)
        return {str(k): int((grid > t + 1e-6).sum()) + 1 for k, (t, _) in self.lost.items()}

    def told(self, settings: Settings) -> list[str]:
        """A sentence for each expert that was lost."""
        return [
            f"expert {k} was lost at step {step} of {settings.steps} ({self.lost[int(k)][1]}): sampling went on without it"
            for k, step in self.steps_lost(settings).items()
        ]
