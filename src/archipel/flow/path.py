"""The linear path between clips and noise, and its velocity.

x_t = (1 - t) x0 + t eps, t in [0, 1] with 1 = noise; the conditional velocity is v* = dx_t/dt = eps - x0.

Sources: Lipman et al., Flow Matching (arXiv 2210.02747), eq. 20 to 23 with sigma_min = 0 and time reversed; Liu et al.,
Rectified Flow (arXiv 2209.03003), eq. 1. Decentralized Diffusion Models (arXiv 2501.05450) trains every expert on it.
"""

from __future__ import annotations

from torch import Tensor


def over_rows(t: Tensor, like: Tensor) -> Tensor:
    """Give per-clip numbers ``t`` (B,) the trailing axes that let them multiply ``like`` (B, ...).

    Raises ValueError where ``t`` is not one number per row: broadcasting would otherwise mix rows in silence.
    """
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"expected one time per row of {tuple(like.shape)}, got times of shape {tuple(t.shape)}")
    return t.reshape(-1, *([1] * (like.ndim - 1))).to(like.dtype)


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps for x0, eps (B, ...) and t (B,) in [0, 1]. Rectified Flow, eq. 1."""
    time = over_rows(t, x0)
    return (1 - time) * x0 + time * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v* = eps - x0, what a velocity head regresses on (any shape). Rectified Flow, eq. 1; Paris 2.0, section 3.2."""
    return eps - x0
