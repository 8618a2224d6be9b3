"""Conversions between clip, noise and velocity on the linear path, and experts trained on another schedule.

With x_t = (1 - t) x0 + t eps and v = eps - x0 any one of the three gives the others:
x0 = x_t - t v, eps = x_t + (1 - t) v. All take x (B, ...), t (B,) in [0, 1] and return the shape of x.

Sources: algebra of the path (Rectified Flow, arXiv 2209.03003, eq. 1); experts with another objective: Heterogeneous
Decentralized Diffusion Models (arXiv 2603.06741), its conversion of noise experts and its stabilisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.flow.path import over_rows

T_FLOOR = 1e-3  # what t is held above where it divides; below it a velocity says nothing that x0 does not
ALPHA_FLOOR = 0.01  # arXiv 2603.06741: alpha_safe = max(alpha_t, 0.01)
X0_BOUND = 20.0  # arXiv 2603.06741: x0_hat is held in [-20, 20]


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v."""
    return x - over_rows(t, x) * v


def eps_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps = x_t + (1 - t) v."""
    return x + (1 - over_rows(t, x)) * v


def velocity_from_x0(x: Tensor, x0: Tensor, t: Tensor, bound: float | None = None, floor: float = T_FLOOR) -> Tensor:
    """v = (x_t - x0_hat) / max(t, floor), x0_hat held in [-bound, bound] first where a bound is given.

    Clamping before the division keeps x_t, v and x0_hat in agreement (where x0_hat is clamped, eps_hat is not the noise any more).
    """
    held = x0 if bound is None else x0.clamp(-bound, bound)
    return (x - held) / over_rows(t.clamp(min=floor), x)


def x0_from_eps(x: Tensor, eps: Tensor, t: Tensor, floor: float = ALPHA_FLOOR) -> Tensor:
    """x0 = (x_t - t eps) / max(1 - t, floor)."""
    return (x - over_rows(t, x) * eps) / over_rows((1 - t).clamp(min=floor), x)


def eps_from_x0(x: Tensor, x0: Tensor, t: Tensor, floor: float = T_FLOOR) -> Tensor:
    """eps = (x_t - (1 - t) x0) / max(t, floor)."""
    return (x - (1 - over_rows(t, x)) * x0) / over_rows(t.clamp(min=floor), x)


def velocity_from_eps(x: Tensor, eps: Tensor, t: Tensor, bound: float = X0_BOUND) -> Tensor:
    """v of a noise prediction: x0_hat with both stabilisers of arXiv 2603.06741, then v = (x_t - x0_hat) / t.

    The paper's v = eps - x0_hat is the same where nothing is clamped; where x0_hat is, this form still lands on it.
    """
    return velocity_from_x0(x, x0_from_eps(x, eps, t), t, bound)


def over_size(x: Tensor, t: Tensor) -> Tensor:
    """x_t / n with n^2 = (1 - t)^2 + t^2: the state of a schedule that preserves variance, at the same log-SNR."""
    return x / over_rows(torch.hypot(1 - t, t), x)


def x0_from_v(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 of a v-prediction v = alpha' eps - sigma' x0 (Progressive Distillation, arXiv 2202.00512, appendix D) made at
    ``over_size(x, t)``: x0 = alpha' x' - sigma' v with alpha' = (1 - t) / n, sigma' = t / n."""
    size = torch.hypot(1 - t, t)
    return over_rows((1 - t) / size**2, x) * x - over_rows(t / size, x) * v


def eps_from_v(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps of such a v-prediction: eps = sigma' x' + alpha' v."""
    size = torch.hypot(1 - t, t)
    return over_rows(t / size**2, x) * x + over_rows((1 - t) / size, x) * v


def velocity_from_v(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps - x0 of such a v-prediction: ((2 t - 1) x_t / n + v) / n. Nothing is divided by t or 1 - t, so it needs no
    stabiliser, and the two losses differ by the factor 1 / n only, which lies between 1 and sqrt(2)."""
    size = torch.hypot(1 - t, t)
    return over_rows((2 * t - 1) / size**2, x) * x + over_rows(1 / size, x) * v


Match = Callable[[Tensor], tuple[Tensor, Tensor]]
"""t (B,) on the linear path -> (t' to feed the expert (B,), sigma'(t') (B,)) with alpha'/sigma' = (1 - t)/t at t'."""


def cosine_match(t: Tensor) -> tuple[Tensor, Tensor]:
    """For alpha' = cos(pi t'/2), sigma' = sin(pi t'/2) (Nichol and Dhariwal, arXiv 2102.09672, eq. 17 with s = 0).

    tan(pi t'/2) = t / (1 - t), so t' = (2 / pi) atan2(t, 1 - t).
    """
    angle = torch.atan2(t, 1 - t)
    return angle * (2 / math.pi), torch.sin(angle)


def table_match(alphas_cumprod: np.ndarray) -> Match:
    """For a discrete DDPM schedule: t' is the fractional step whose log-SNR is that of the linear path at t.

    ``alphas_cumprod`` (S,) falls strictly within (0, 1), as in diffusers' schedulers; t' runs over [0, S - 1] and is
    held at the ends. The schedule preserves variance, so equal log-SNR means sigma'^2 = t^2 / (t^2 + (1 - t)^2).
    Raises ValueError for a table that does not fall.
    """
    table = np.asarray(alphas_cumprod, dtype=np.float64)
    if table.ndim != 1 or len(table) < 2 or table.min() <= 0 or table.max() >= 1 or (np.diff(table) >= 0).any():
        raise ValueError("alphas_cumprod must fall strictly within (0, 1)")
    log_snr = np.log(table) - np.log1p(-table)

    def match(t: Tensor) -> tuple[Tensor, Tensor]:
        time = t.detach().cpu().double().clamp(1e-6, 1 - 1e-6).numpy()
        wanted = 2 * (np.log1p(-time) - np.log(time))
        step = np.interp(-wanted, -log_snr, np.arange(len(table), dtype=np.float64))
        sigma = time / np.hypot(time, 1 - time)
        return torch.from_numpy(step).to(t), torch.from_numpy(sigma).to(t)

    return match


def angle_match(alphas_cumprod: np.ndarray) -> Match:
    """As ``table_match``, for schedules that may end in pure noise (zero terminal SNR): falling within [0, 1).

    Between two steps the angle atan2(sigma', alpha') is what is interpolated: it is finite where the log-SNR is not, and
    on the linear path it is atan2(t, 1 - t). Raises ValueError for a table that does not fall.
    """
    table = np.asarray(alphas_cumprod, dtype=np.float64)
    if table.ndim != 1 or len(table) < 2 or table.min() < 0 or table.max() >= 1 or (np.diff(table) >= 0).any():
        raise ValueError("alphas_cumprod must fall strictly within [0, 1)")
    angles = np.arctan2(np.sqrt(1 - table), np.sqrt(table))

    def match(t: Tensor) -> tuple[Tensor, Tensor]:
        time = t.detach().cpu().double()  # float32 is too coarse for steps of a thousandth
        angle = torch.atan2(time, 1 - time)
        known = torch.tensor(angles)  # made here, so that it has no memory where t has none
        after = torch.searchsorted(known, angle).clamp(1, len(angles) - 1)
        share = (angle - known[after - 1]) / (known[after] - known[after - 1])
        return (after - 1 + share.clamp(0, 1)).to(t), torch.sin(angle).to(t)

    return match


def table_times(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The time (S,) float64 on the linear path that has the log-SNR of each step: sigma' / (alpha' + sigma').

    Euler over these times is DDIM (arXiv 2010.02502, eq. 12 with eta = 0) over the steps: both go straight to x0_hat.
    """
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - np.asarray(alphas_cumprod, dtype=np.float64))
    return np.asarray(sigma / (alpha + sigma))


class NoiseExpert:
    """An expert that predicts noise on another schedule, as a velocity on the linear path (after arXiv 2603.06741).

    x' = x_t sigma'(t')/t has the expert's own statistics at t'; its noise is the path's noise, since both describe the
    same mixture of clip and noise. ``predict(x', t', cond)`` -> eps like x'. This is a ``Velocity``.
    """

    def __init__(
        self, predict: Callable[[Tensor, Tensor, Conditioning], Tensor], match: Match, bound: float = X0_BOUND
    ) -> None:
        self._predict, self._match, self._bound = predict, match, bound

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        time = t.clamp(min=T_FLOOR)
        own_time, sigma = self._match(time)
        eps = self._predict(x * over_rows(sigma / time, x), own_time, cond)
        return velocity_from_eps(x, eps, time, self._bound)
