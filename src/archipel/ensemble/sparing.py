"""Asking the router less often than at every step: at every n-th only, and of a clip no more once it is certain.

Both are approximations, off by default. Between two questions the last posterior stays; a strategy chooses from it as always.
As a clip becomes visible its posterior only sharpens (p(k | x_t, t, c) goes to 0 or 1 as t goes to 0, where clusters do not
overlap), so that a clip that is certain seldom changes its mind: bench/sampling.py says what that costs and saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble.strategies import Routed, renormalise


class Spared:
    """``Routed`` weights of one batch from its first step to its last; a state of its own, so it is not used again.

    every: ask at steps 0, every, 2 every, ...; until: a clip whose likeliest expert has reached this probability is not asked
    about again (None: never settled); calls: velocity evaluations per step (Heun: 2, of which the second asks only where every
    = 1, as it does without sparing).
    """

    def __init__(self, routed: Routed, every: int = 1, until: float | None = None, calls: int = 1) -> None:
        self._routed, self._every, self._until, self._calls = routed, every, until, calls
        self._evaluations = 0
        self._p: Tensor | None = None
        self._q: Tensor | None = None
        self._settled: Tensor | None = None

    @property
    def asked(self) -> int:
        """Rows that went through the router."""
        return self._routed.asked

    def needed(self) -> list[int] | None:
        return self._routed.needed()

    def lose(self, k: int) -> bool:
        """The last posterior stays, over the experts that are left; the evaluation in which one was lost counts once."""
        self._evaluations = max(0, self._evaluations - 1)
        if not self._routed.lose(k):
            return False
        if self._p is not None:
            left = torch.ones_like(self._p, dtype=torch.bool)
            left[:, k] = False
            self._p = renormalise(self._p, left & (self._p > 0))
        return True

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]:
        step, part = divmod(self._evaluations, self._calls)
        self._evaluations += 1
        if self._p is None or self._settled is None:
            self._p, self._q = self._routed.posteriors(x, t, cond, null)
            self._settled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        elif self._every == 1 or (step % self._every == 0 and part == 0):
            rows = (~self._settled).nonzero()[:, 0]
            if len(rows):
                p, q = self._routed.posteriors(x[rows], t[rows], cond[rows], null)
                self._p = self._p.index_copy(0, rows, p)
                self._q = None if self._q is None or q is None else self._q.index_copy(0, rows, q)
        if self._until is not None:
            self._settled = self._settled | (self._p.amax(1) >= self._until)
        return self._routed.weights(self._p, self._q)
