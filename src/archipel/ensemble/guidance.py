"""Classifier-free guidance over one velocity and over a mixture of them.

Guidance (Ho and Salimans, arXiv 2207.12598, eq. 6, written with s = 1 + w): v_g = v(null) + s (v(c) - v(null)).
Over experts v_k with weights w_k = p(k | x, t, c) and n_k = p(k | x, t, null) there are two compositions:

- mixture of guided (default; what Paris 1.0's sampler does): sum_k w_k [v_k(null) + s (v_k(c) - v_k(null))];
- guided mixture: sum_k n_k v_k(null) + s (sum_k w_k v_k(c) - sum_k n_k v_k(null)), which guides the exact marginals.

Both are sum_k a_k v_k(c) + b_k v_k(null), a_k = s w_k, b_k = (1 - s) w_k or (1 - s) n_k: one rule serves both. With sparse
routing one set of experts, chosen by p(k | x, t, c), serves both branches, so both are equal where one expert is chosen,
where s = 1 (no null branch at all), and where the two posteriors agree.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from archipel.contracts import Conditioning, Velocity
from archipel.flow.path import over_rows

Composition = Literal["mixture-of-guided", "guided-mixture"]
COMPOSITIONS: tuple[Composition, ...] = ("mixture-of-guided", "guided-mixture")


def branch_weights(
    weights: Tensor, null_weights: Tensor, scale: float, composition: Composition
) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b), each (B, K), of the conditional and the null velocities; their sum over both is 1 per row.

    ``weights``, ``null_weights``: (B, K), rows sum to 1; ``scale`` = s. Raises ValueError for an unknown composition.
    """
    if composition not in COMPOSITIONS:
        raise ValueError(f"composition must be one of {', '.join(COMPOSITIONS)}, got {composition!r}")
    null = weights if composition == "mixture-of-guided" else null_weights
    return scale * weights, (1 - scale) * null


def doubled(cond: Conditioning) -> Conditioning:
    """The captions' rows, and behind them as many of the null condition."""
    return Conditioning.cat([cond, cond.null()])


def both_branches(
    velocity: Velocity, x: Tensor, t: Tensor, cond: Conditioning, both: Conditioning | None = None
) -> tuple[Tensor, Tensor]:
    """(v(c), v(null)), each like x, from one call with the batch doubled. ``both``: ``doubled(cond)``, where it is at hand."""
    both = doubled(cond) if both is None else both
    conditional, null = velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return conditional, null


def combine(
    velocity: Velocity, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor, both: Conditioning | None = None
) -> Tensor:
    """a v(c) + b v(null), like x, for a, b (B,); a branch whose coefficients are all 0 is not computed. ``both``: as
    ``both_branches``."""
    if not bool(b.any()):
        return over_rows(a, x) * velocity(x, t, cond)
    if not bool(a.any()):
        return over_rows(b, x) * velocity(x, t, cond.null())
    conditional, null = both_branches(velocity, x, t, cond, both)
    return over_rows(a, x) * conditional + over_rows(b, x) * null


class Guided:
    """One velocity under classifier-free guidance of scale s; itself a ``Velocity``. s = 1 costs one branch."""

    def __init__(self, velocity: Velocity, scale: float) -> None:
        self._velocity, self._scale = velocity, scale

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        a = torch.full((x.shape[0],), self._scale, dtype=x.dtype, device=x.device)
        return combine(self._velocity, x, t, cond, a, 1 - a)
