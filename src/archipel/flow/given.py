"""Frames that a clip must begin or end with, as masked clean latents: image-to-video by extra input channels.

The condition of one clip is (C + 1, T, H, W): the clean latents of the given latent frames, zero elsewhere, and behind them
their mask of ones. It is joined to x_t on channels, so that what reads it is columns of the first projection of their own,
which start at zero: the same function as Open-Sora 2.0's separate projection ``cond_in`` (arXiv 2503.09642, and its
configuration ``stage1_i2v``), whose task mix is text 1 : head 5 : loop 1 : tail 1. Nothing is clamped while sampling: the
network is told what the frame is, and learns to begin with it.

Given latents are those of a still: of the one frame, not of the clip, since that is all that there is when a clip is
generated. For a causal autoencoder the first latent frame is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TASKS = ("text", "head", "loop", "tail")
"""Tasks in the order of ``expert.tasks``: nothing is given, the first frame, first and last, the last."""
_FIRST = torch.tensor([False, True, True, False])
_LAST = torch.tensor([False, False, True, True])


def only(task: str) -> tuple[float, ...]:
    """The mix in which every clip has this task."""
    return tuple(float(name == task) for name in TASKS)


def shares(mix: Sequence[float]) -> dict[str, float]:
    """Task -> its share, summing to 1; tasks that a mix does not have are left out. Raises ValueError for what is no mix."""
    if len(mix) != len(TASKS) or min(mix) < 0 or not sum(mix) > 0:
        raise ValueError(f"a mix of tasks is {len(TASKS)} weights of 0 or more, one of them positive, got {tuple(mix)}")
    return {name: weight / sum(mix) for name, weight in zip(TASKS, mix, strict=True) if weight > 0}


def pick(mix: Sequence[float], u: np.ndarray) -> Tensor:
    """The task of each uniform u (B,) in [0, 1), int64 (B,): places in ``TASKS``, by inversion."""
    below = np.cumsum(np.asarray(mix, np.float64))
    place = np.searchsorted(below, np.asarray(u, np.float64) * below[-1], side="right")
    last = max(i for i, weight in enumerate(mix) if weight > 0)  # a product may round up to the sum
    return torch.from_numpy(np.minimum(place, last).astype(np.int64))


def task_of(first: bool, last: bool) -> int:
    """The place in ``TASKS`` of what is given."""
    return next(i for i in range(len(TASKS)) if (bool(_FIRST[i]), bool(_LAST[i])) == (first, last))


def condition(first: Tensor, last: Tensor, tasks: Tensor, frames: int) -> Tensor:
    """The condition (B, C + 1, T, H, W) of clips of T = ``frames`` latent frames.

    first, last (B, C, H, W): latents of their first and last frames as stills, read where the task gives them; tasks (B,)
    int64. Where T is 1 and both are given the last one stays.
    """
    B, C, H, W = first.shape
    made = first.new_zeros(B, C + 1, frames, H, W)
    for frame, place, gives in ((first, 0, _FIRST), (last, frames - 1, _LAST)):
        told = gives.to(tasks.device)[tasks].to(first.device)[:, None, None, None]
        made[:, :C, place] = torch.where(told, frame, made[:, :C, place])
        made[:, C, place] = torch.where(told[:, 0], 1.0, made[:, C, place])
    return made
