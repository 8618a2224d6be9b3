"""From noise to clips: Euler and Heun over dx/dt = v(x, t, c), from t = 1 to t = 0.

The sampler is one pure function that knows nothing but ``velocity(x, t, cond)``, in the manner of Karras et al., EDM
(arXiv 2206.00364), algorithm 1, with t as in Rectified Flow (arXiv 2209.03003), section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from archipel.contracts import Conditioning, Velocity
from archipel.flow.time import shift_time

OnStep = Callable[[int, int, Tensor, float], None]
"""Called after each step as (i, n, x, t): i of n steps are done and ``x`` (B, ...) is the state at time ``t``."""

SOLVERS = ("euler", "heun")


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times float64 (steps + 1,) from 1 to 0: evenly spaced, then ``shift_time``. Raises ValueError for steps < 1.

    The same numbers as diffusers' FlowMatchEulerDiscreteScheduler given ``sigmas=linspace(1, 1/n, n)`` and ``shift``.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    cond: Conditioning,
    *,
    steps: int,
    shift: float = 1.0,
    solver: str = "euler",
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow ``velocity`` from ``noise`` (B, ...) at t = 1 to a clip at t = 0; float32 like noise.

    ``velocity`` gets t of shape (B,) float32 and is called ``steps`` times (Euler) or ``2 steps - 1`` times (Heun,
    whose last step is an Euler step: EDM, algorithm 1, line 6: a velocity at t = 0 is never asked for, where a head
    that predicts x0 would divide by zero). The state stays in float32 whatever the velocity's dtype.
    Raises ValueError for an unknown solver or steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    grid = time_grid(steps, shift).tolist()
    x = noise.to(torch.float32)

    def at(state: Tensor, t: float) -> Tensor:
        times = torch.full((state.shape[0],), t, dtype=torch.float32, device=state.device)
        return velocity(state, times, cond).to(torch.float32)

    for i in range(steps):
        t, after = grid[i], grid[i + 1]
        v = at(x, t)
        ahead = x + (after - t) * v
        if solver == "heun" and after > 0:
            ahead = x + (after - t) * 0.5 * (v + at(ahead, after))
        x = ahead
        if on_step is not None:
            on_step(i + 1, steps, x, after)
    return x
