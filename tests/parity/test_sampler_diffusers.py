"""Euler against diffusers' FlowMatchEulerDiscreteScheduler on the same grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from archipel.contracts import Conditioning
from archipel.flow import samplers
from archipel.flow.exact import GaussianMixture

NOBODY = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1))


def scheduler(steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Given sigmas: the default grid would be shifted twice, at construction and again when steps are set."""
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return made


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_is_diffusers_euler(steps: int, shift: float) -> None:
    peer = scheduler(steps, shift)
    np.testing.assert_allclose(samplers.time_grid(steps, shift).numpy(), peer.sigmas.numpy(), atol=1e-6)
    g = torch.Generator().manual_seed(0)
    mix = GaussianMixture(torch.randn(3, 2, 2, 2, 2, generator=g), torch.full((3,), 0.2), torch.ones(3))
    noise = torch.randn(4, 2, 2, 2, 2, generator=g)
    x = noise.clone()
    for t in peer.timesteps:
        v = mix.velocity(x, (t / 1000).expand(4), NOBODY)  # diffusers counts time to 1000
        x = peer.step(v, t, x, return_dict=False)[0]
    ours = samplers.sample(mix.velocity, noise, NOBODY, steps=steps, shift=shift)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
