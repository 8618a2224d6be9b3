"""The learning rate as a function of the step alone: linear warm-up, constant, one linear cooldown at the end.

Source: Haegele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (arXiv 2405.18392),
section 3: a constant rate with a short cooldown matches cosine, and any length can be trained.
"""

from __future__ import annotations


def rate(step: int, *, peak: float, steps: int, warmup: int, cooldown: float) -> float:
    """Learning rate of step ``step`` in [0, steps): (step + 1) / warmup up to ``peak``, then constant, then falling.

    The cooldown takes the last ``cooldown`` share of the steps; the last step still has 1 / (cooldown steps) of the peak.
    """
    up = (step + 1) / warmup if warmup else 1.0
    down = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return peak * min(1.0, up, down)
