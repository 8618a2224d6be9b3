"""The closed-form mixture is right itself: against brute force, against its own parts, in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from archipel.contracts import Conditioning
from archipel.flow.exact import GaussianMixture
from archipel.flow.path import interpolate

_G = torch.Generator().manual_seed(20)
randn, rand = partial(torch.randn, generator=_G), partial(torch.rand, generator=_G)


def caption(rows: int, pooled: torch.Tensor | None = None, width: int = 4) -> Conditioning:
    pooled = torch.zeros(rows, width) if pooled is None else pooled
    return Conditioning(torch.zeros(rows, 1, 2), torch.zeros(rows, 1, dtype=torch.bool), pooled)


def mixture(diagonal: bool = True) -> GaussianMixture:
    g = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(4, 2, 1, 1, 1, generator=g)
    spread = 0.1 + torch.rand((4, 2, 1, 1, 1) if diagonal else (4,), generator=g)
    return GaussianMixture(means, spread, torch.tensor([1.0, 2.0, 3.0, 4.0]), clusters=[0, 1, 1, 2])


@pytest.mark.parametrize("diagonal", [True, False])
def test_velocity_and_posterior_are_what_the_definition_says(diagonal: bool) -> None:
    """E[eps - x0 | x_t] and p(k | x_t) by importance weighting of half a million draws of x0."""
    mix = mixture(diagonal)
    x0, cluster = mix.sample(500_000, np.random.Generator(np.random.PCG64(0)))
    x0 = x0.double().flatten(1)
    x, t = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.6
    eps = (x - (1 - t) * x0) / t  # the noise that leads from x0 to x
    weight = torch.softmax(-0.5 * eps.square().sum(1), 0)
    brute = (weight[:, None] * (eps - x0)).sum(0)
    at, time = x.reshape(1, 2, 1, 1, 1), torch.tensor([t]).double()
    torch.testing.assert_close(mix.velocity(at, time, caption(1)).flatten(), brute, rtol=0.02, atol=0.02)
    shares = torch.stack([weight[cluster == k].sum() for k in range(3)])
    torch.testing.assert_close(mix.posterior(at, time, caption(1))[0], shares, rtol=0.03, atol=0.01)


def test_clusters_regroup_to_the_marginal() -> None:
    mix = mixture()
    x, t = randn(64, 2, 1, 1, 1, dtype=torch.float64), rand(64, dtype=torch.float64)
    cond = caption(64, randn(64, 4))
    p = mix.posterior(x, t, cond)
    torch.testing.assert_close(p.sum(1), torch.ones(64).double())
    parts = torch.stack([expert(x, t, cond) for expert in mix.experts()], 1)
    torch.testing.assert_close((p[:, :, None, None, None, None] * parts).sum(1), mix.velocity(x, t, cond))


def test_posterior_is_the_prior_at_pure_noise_and_certain_at_the_clip() -> None:
    mix = mixture()
    cond = caption(5, randn(5, 4))
    noise = randn(5, 2, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(mix.posterior(noise, torch.ones(5).double(), cond), mix.cluster_prior(cond))
    torch.testing.assert_close(mix.cluster_prior(caption(1))[0], torch.tensor([0.1, 0.5, 0.4]).double())
    far = GaussianMixture(torch.tensor([[-50.0], [50.0]]), torch.ones(2), torch.ones(2))
    sure = far.posterior(torch.tensor([[49.0]]), torch.zeros(1), caption(1))
    torch.testing.assert_close(sure, torch.tensor([[0.0, 1.0]]))


def test_captions_of_another_width_say_nothing() -> None:
    mix = mixture()
    x, t = randn(2, 2, 1, 1, 1), rand(2)
    torch.testing.assert_close(mix.velocity(x, t, caption(2, randn(2, 7))), mix.velocity(x, t, caption(2)))


def test_noised_draws_have_the_moments_of_the_path() -> None:
    mix = mixture()
    rng = np.random.Generator(np.random.PCG64(2))
    x0, _ = mix.sample(200_000, rng)
    eps = torch.from_numpy(rng.standard_normal(x0.shape)).float()
    x = interpolate(x0, eps, torch.full((len(x0),), 0.5)).flatten(1)
    weights = mix.log_weights.exp()
    mean = (weights[:, None] * mix.means).sum(0) * 0.5
    second = (weights[:, None] * (0.25 * (mix.variances + mix.means**2) + 0.25)).sum(0)
    torch.testing.assert_close(x.double().mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.double().square().mean(0), second, atol=0.03, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="same components"):
        GaussianMixture(torch.zeros(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="positive"):
        GaussianMixture(torch.zeros(2, 3), torch.tensor([1.0, 0.0]), torch.ones(2))
    with pytest.raises(ValueError, match="cluster 5"):
        mixture().expert(5)
