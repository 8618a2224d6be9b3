"""Losses per clip: mean over a clip's elements, so that latents of any size weigh alike; (B,) float32.

Source: Flow Matching (arXiv 2210.02747), eq. 23; Decentralized Diffusion Models (arXiv 2501.05450), eq. 6: an expert's
loss is this one with x0 drawn from its own cluster.
"""

from __future__ import annotations

from torch import Tensor

from archipel.flow.path import over_rows, velocity_target

LOSS_T_FLOOR = 0.05


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over elements of (a - b)^2 in float32: (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def velocity_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """|v - (eps - x0)|^2 per clip, (B,). arXiv 2210.02747, eq. 23."""
    return squared_error(v, velocity_target(x0, eps))


def x0_loss(x0_hat: Tensor, x0: Tensor, t: Tensor, floor: float = LOSS_T_FLOOR) -> Tensor:
    """|x0_hat - x0|^2 / max(t, floor)^2 per clip, (B,): the velocity loss of a head that predicts x0.

    Since v - v* = (x0 - x0_hat) / t, it equals ``velocity_loss`` for t >= floor; below it the weight stays bounded
    (Li and He, Back to Basics, arXiv 2511.13720, section 4: x-prediction with v-loss, t clipped at 0.05).
    """
    return squared_error(x0_hat / over_rows(t.clamp(min=floor), x0_hat), x0 / over_rows(t.clamp(min=floor), x0))


def prediction_loss(prediction: str, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The loss of a network's raw output by what it means: ``velocity`` or ``x0``; (B,). ValueError otherwise."""
    if prediction == "velocity":
        return velocity_loss(output, x0, eps)
    if prediction == "x0":
        return x0_loss(output, x0, t)
    raise ValueError(f"prediction must be 'velocity' or 'x0', got {prediction!r}")
