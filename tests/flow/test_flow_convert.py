"""Conversions undo each other, clamp where told, and carry experts over from other schedules exactly."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.flow import convert, path
from archipel.flow.exact import GaussianMixture

_G = torch.Generator().manual_seed(20)
randn, rand = partial(torch.randn, generator=_G), partial(torch.rand, generator=_G)


def nothing(rows: int) -> Conditioning:
    return Conditioning(torch.zeros(rows, 1, 2), torch.zeros(rows, 1, dtype=torch.bool), torch.zeros(rows, 2))


@pytest.fixture
def state() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(6, 2, 1, 3, 3, generator=g).double(), torch.randn(6, 2, 1, 3, 3, generator=g).double()
    t = torch.tensor([0.02, 0.1, 0.4, 0.6, 0.9, 0.98]).double()
    return x0, eps, t, path.interpolate(x0, eps, t)


def test_velocity_gives_clip_and_noise_and_back(state: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x0, eps, t, x = state
    v = eps - x0
    torch.testing.assert_close(convert.x0_from_velocity(x, v, t), x0)
    torch.testing.assert_close(convert.eps_from_velocity(x, v, t), eps)
    torch.testing.assert_close(convert.velocity_from_x0(x, x0, t), v)
    torch.testing.assert_close(convert.velocity_from_eps(x, eps, t), v)
    torch.testing.assert_close(convert.x0_from_eps(x, eps, t), x0)
    torch.testing.assert_close(convert.eps_from_x0(x, x0, t), eps)


def test_exact_clip_gives_exact_velocity_also_close_to_the_clip() -> None:
    x0, eps = randn(3, 4), randn(3, 4)
    t = torch.tensor([convert.T_FLOOR, 0.01, 1.0])
    v = convert.velocity_from_x0(path.interpolate(x0, eps, t), x0, t)
    torch.testing.assert_close(v, eps - x0, rtol=1e-3, atol=1e-3)
    at_zero = convert.velocity_from_x0(x0, x0 + 1e-6, torch.zeros(3))
    assert bool(at_zero.isfinite().all())


def test_clamped_clip_velocity_and_state_agree() -> None:
    x, t = torch.full((1, 4), 30.0), torch.tensor([0.999])
    wild = torch.full((1, 4), -500.0)
    v = convert.velocity_from_eps(x, wild, t)
    held = convert.x0_from_velocity(x, v, t)
    torch.testing.assert_close(held, torch.full((1, 4), convert.X0_BOUND))
    # alpha is held above its floor: 1 - t = 0.001 does not blow the clip up a thousandfold
    unheld = convert.x0_from_eps(torch.ones(1, 4), torch.zeros(1, 4), t)
    torch.testing.assert_close(unheld, torch.full((1, 4), 100.0))
    bounded = convert.velocity_from_x0(torch.zeros(1, 2), torch.full((1, 2), 9.0), torch.tensor([0.5]), bound=1.0)
    torch.testing.assert_close(bounded, torch.full((1, 2), -2.0))


@pytest.mark.parametrize("kind", ["cosine", "table"])
def test_noise_expert_of_another_schedule_has_the_exact_velocity(kind: str) -> None:
    """The best noise prediction on alpha', sigma' is known for one Gaussian; converted, it must be its exact velocity."""
    mean, spread = 0.7, 0.3
    steps = np.arange(1000)
    table = np.cos((steps + 1) / 1002 * math.pi / 2) ** 2
    match = convert.cosine_match if kind == "cosine" else convert.table_match(table)

    def predict(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if kind == "cosine":
            alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        else:
            squared = torch.from_numpy(np.interp(t.numpy(), steps, table)).to(t)
            alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        alpha, sigma = path.over_rows(alpha, x), path.over_rows(sigma, x)
        return sigma * (x - alpha * mean) / (alpha**2 * spread + sigma**2)

    one = GaussianMixture(torch.full((1, 5), mean), torch.tensor([spread]), torch.ones(1))
    x, t = randn(5, 5, dtype=torch.float64), torch.tensor([0.05, 0.2, 0.5, 0.8, 0.97]).double()
    found = convert.NoiseExpert(predict, match)(x, t, nothing(5))
    close = 1e-6 if kind == "cosine" else 2e-3
    torch.testing.assert_close(found, one.velocity(x, t, nothing(5)), rtol=close, atol=close)


def test_cosine_match_meets_the_signal_to_noise_ratio() -> None:
    t = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    own, sigma = convert.cosine_match(t)
    torch.testing.assert_close(torch.cos(own * math.pi / 2) / torch.sin(own * math.pi / 2), (1 - t) / t)
    torch.testing.assert_close(sigma, torch.sin(own * math.pi / 2))


def test_table_match_refuses_what_is_no_schedule_and_holds_the_ends() -> None:
    for bad in (np.array([0.1, 0.5]), np.array([0.5]), np.array([1.0, 0.5]), np.array([0.5, 0.0])):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            convert.table_match(bad)
    own, _ = convert.table_match(np.linspace(0.99, 0.01, 100))(torch.tensor([0.0, 1.0]))
    assert own.tolist() == [0.0, 99.0]
