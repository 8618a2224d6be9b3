"""Samplers against closed forms: order of convergence, times asked for, state and callbacks."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.flow import convert, draws, samplers
from archipel.flow.exact import GaussianMixture

_G = torch.Generator().manual_seed(20)
randn, rand = partial(torch.randn, generator=_G), partial(torch.rand, generator=_G)


NOBODY = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1))


def gaussian(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The exact velocity of one Gaussian clip distribution N(2, 0.25), in the dtype of x."""
    mix = GaussianMixture(torch.full((1, 1), 2.0), torch.tensor([0.25]), torch.ones(1))
    return mix.velocity(x, t, cond)


def truth(eps: Tensor) -> Tensor:
    """That flow keeps quantiles: noise z ends at 2 + 0.5 z."""
    return 2 + 0.5 * eps


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0)])
def test_order_of_convergence(solver: str, order: float) -> None:
    eps = torch.tensor([[-1.5], [0.5], [2.0]])
    errors = [
        float((samplers.sample(gaussian, eps, NOBODY, steps=n, solver=solver) - truth(eps)).abs().max())
        for n in (16, 32, 64)
    ]
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert rates == pytest.approx([order, order], abs=0.25), errors


def test_straight_paths_need_one_step() -> None:
    eps = draws.clip_noise([0, 1], (2, 1, 3, 3))
    x0 = torch.full(eps.shape, 0.5)
    noise = torch.from_numpy(eps)
    for solver in samplers.SOLVERS:
        found = samplers.sample(lambda x, t, c: noise - x0, noise, NOBODY, steps=1, solver=solver)
        torch.testing.assert_close(found, x0)


def test_a_head_that_predicts_the_clip_lands_on_it_and_is_never_asked_at_zero() -> None:
    asked: list[float] = []
    x0 = randn(2, 3)

    def head(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert t.shape == (2,) and t.dtype == torch.float32 and x.dtype == torch.float32
        asked.append(float(t[0]))
        return convert.velocity_from_x0(x, x0, t)

    for solver, calls in (("euler", 5), ("heun", 9)):
        asked.clear()
        found = samplers.sample(head, randn(2, 3), NOBODY, steps=5, solver=solver, shift=2.0)
        torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
        assert len(asked) == calls and min(asked) > 0


def test_callback_sees_every_state_and_the_last_is_the_result() -> None:
    seen: list[tuple[int, int, Tensor, float]] = []
    noise = randn(3, 1)
    found = samplers.sample(gaussian, noise, NOBODY, steps=4, on_step=lambda *state: seen.append(state))
    assert [(i, n) for i, n, _, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [t for *_, t in seen] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert torch.equal(seen[-1][2], found)


def test_state_stays_in_float32_whatever_the_velocity_returns() -> None:
    velocity = lambda x, t, c: gaussian(x, t, c).to(torch.bfloat16)  # noqa: E731
    found = samplers.sample(velocity, torch.zeros(1, 1).to(torch.float64), NOBODY, steps=8)
    assert found.dtype == torch.float32


def test_heun_samples_have_the_mixture_s_weights_and_moments() -> None:
    mix = GaussianMixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.25, 0.04]), torch.tensor([0.3, 0.7]))
    noise = torch.from_numpy(draws.clip_noise(range(6000), (1,)))
    found = samplers.sample(mix.velocity, noise, NOBODY, steps=48, solver="heun").flatten()
    left, right = found[found < 0], found[found >= 0]
    assert len(left) / 6000 == pytest.approx(0.3, abs=0.02)
    assert float(left.mean()) == pytest.approx(-3, abs=0.05) and float(left.std()) == pytest.approx(0.5, abs=0.05)
    assert float(right.mean()) == pytest.approx(3, abs=0.05) and float(right.std()) == pytest.approx(0.2, abs=0.03)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="euler, heun"):
        samplers.sample(gaussian, torch.zeros(1, 1), NOBODY, steps=2, solver="rk4")
    for steps in (0, -3):
        with pytest.raises(ValueError, match="at least one step"):
            samplers.time_grid(steps)
    assert np.all(np.diff(samplers.time_grid(10, 2.5).numpy()) < 0)
