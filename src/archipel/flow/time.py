"""Which times are trained on: logit-normal, shifted towards noise for large clips, one function per item.

Sources: Esser et al., Scaling Rectified Flow Transformers (arXiv 2403.03206), section 3.1 (logit-normal) and eq. 23
(shift); Open-Sora 2.0 (arXiv 2503.09642), whose recipe Paris 2.0 (arXiv 2605.26064) follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shift_time(t: Tensor, a: float) -> Tensor:
    """shift_a(t) = a t / (1 + (a - 1) t): keeps 0 and 1, moves the middle towards noise for a > 1. t in [0, 1].

    Scaling Rectified Flow Transformers, eq. 23 (a is the root of the ratio of resolutions there). shift_a and
    shift_{1/a} undo each other, and shifts compose by multiplying. Raises ValueError for a <= 0.
    """
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"the time shift must be a positive number, got {a}")
    return a * t / (1 + (a - 1) * t)


def logit_normal(normals: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std n), n ~ N(0, 1) given: any shape, result in (0, 1). arXiv 2403.03206, section 3.1."""
    return torch.sigmoid(mean + std * normals)


def logit_normal_from_uniform(uniforms: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The same law by its inverse distribution function, for stratified or evenly spaced u in (0, 1).

    t = sigmoid(mean + std Phi^{-1}(u)).
    """
    return logit_normal(torch.special.ndtri(uniforms), mean, std)


def validation_times(count: int, shift: float = 1.0) -> Tensor:
    """``count`` times at the midpoints of equal shares of the training law, float32 (count,), ascending in (0, 1).

    A validation loss over them has no noise from drawing t, so two checkpoints can be compared.
    """
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shift_time(logit_normal_from_uniform(middle), shift).to(torch.float32)
