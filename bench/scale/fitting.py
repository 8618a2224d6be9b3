"""Power laws through measured points, and what they say of points that were not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

LAST = 3  # points that the law goes through: the largest, where constants no longer hide the power


@dataclass(frozen=True)
class Law:
    """y = factor * x^power; residual: the largest relative error over the points it was fitted to; points: how many."""

    factor: float
    power: float
    residual: float
    points: int

    def __call__(self, x: float) -> float:
        return float(self.factor * x**self.power)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def fit(x: Sequence[float], y: Sequence[float]) -> Law | None:
    """Least squares in logarithms over the last ``LAST`` points above zero; None where there are fewer."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a > 0 and b > 0][-LAST:]
    if len(pairs) < LAST:
        return None
    logs = np.log(np.array(pairs, np.float64))
    power, constant = np.polyfit(logs[:, 0], logs[:, 1], 1)
    apart = np.exp(constant + power * logs[:, 0] - logs[:, 1]) - 1
    return Law(float(np.exp(constant)), float(power), float(np.abs(apart).max()), len(pairs))
