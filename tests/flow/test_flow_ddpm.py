"""Schedules of released weights against diffusers' own, and a v-prediction on one as a velocity on the linear path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from archipel.contracts import Conditioning
from archipel.errors import ConfigError
from archipel.flow import convert, ddpm, path
from archipel.flow.exact import GaussianMixture

COGVIDEOX = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}  # CogVideoX-2b's
NOBODY = Conditioning(torch.zeros(6, 1, 2), torch.zeros(6, 1, dtype=torch.bool), torch.zeros(6, 2))


def config_of(**settings: object) -> dict[str, object]:
    return dict(CogVideoXDDIMScheduler(**{**COGVIDEOX, **settings}).config) | {"_class_name": "CogVideoXDDIMScheduler"}


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("zero", "shift"), [(False, 3.0), (True, 1.0), (True, 3.0)])
def test_schedules_are_diffusers_own(kind: str, zero: bool, shift: float) -> None:
    settings = {"beta_schedule": kind, "rescale_betas_zero_snr": zero, "snr_shift_scale": shift}
    peer = CogVideoXDDIMScheduler(**{**COGVIDEOX, **settings})
    found = ddpm.alphas_cumprod(ddpm.recipe(config_of(**settings)))
    # diffusers rounds two of the three to float32 on the way
    np.testing.assert_allclose(found, peer.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)
    if kind == "scaled_linear":
        np.testing.assert_allclose(found, peer.alphas_cumprod.numpy(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler'"),
        ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid' is not known"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"beta_end": "a lot"}, "does not describe a schedule"),
        ({"beta_start": 0.5, "beta_end": -0.5}, "does not describe a schedule"),
        ({"snr_shift_scale": float("nan")}, "does not describe a schedule"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ],
)
def test_what_is_no_schedule_is_refused_and_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        ddpm.recipe({**config_of(), **change}, "weights/scheduler_config.json")
    assert "weights/scheduler_config.json" in str(told.value)


def test_clip_noise_and_velocity_of_a_v_prediction() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(6, 2, 3, generator=g).double(), torch.randn(6, 2, 3, generator=g).double()
    t = torch.tensor([0.0, 0.02, 0.4, 0.6, 0.98, 1.0]).double()  # the ends are no exception
    x, angle = path.interpolate(x0, eps, t), torch.atan2(t, 1 - t)
    alpha, sigma = path.over_rows(angle.cos(), x), path.over_rows(angle.sin(), x)
    torch.testing.assert_close(convert.over_size(x, t), alpha * x0 + sigma * eps)
    v = alpha * eps - sigma * x0
    torch.testing.assert_close(convert.x0_from_v(x, v, t), x0)
    torch.testing.assert_close(convert.eps_from_v(x, v, t), eps)
    torch.testing.assert_close(convert.velocity_from_v(x, v, t), eps - x0)


@pytest.mark.parametrize("zero", [False, True])
def test_the_best_v_prediction_becomes_the_exact_velocity(zero: bool) -> None:
    """The best v-prediction on alpha', sigma' is known for one Gaussian; converted, it must be its exact velocity."""
    mean, spread = 0.7, 0.3
    table = ddpm.alphas_cumprod(ddpm.recipe(config_of(rescale_betas_zero_snr=zero)))
    match = convert.angle_match(table)
    steps = torch.tensor([20, 100, 300, 600, 900, 999])
    t = torch.from_numpy(convert.table_times(table))[steps]
    own, sigma = match(t)
    torch.testing.assert_close(own, steps.double())  # a step's own time leads back to it
    torch.testing.assert_close(sigma, (1 - torch.from_numpy(table)[steps]).sqrt())
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = convert.over_size(x, t)
    squared = path.over_rows(torch.from_numpy(np.interp(own.numpy(), np.arange(1000), table)), x)
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    ratio = (scaled - alpha * mean) / (alpha**2 * spread + sigma**2)
    best: Tensor = alpha * sigma * ratio - sigma * (mean + alpha * spread * ratio)
    one = GaussianMixture(
        torch.full((1, 5), mean, dtype=torch.float64), torch.tensor([spread], dtype=torch.float64), torch.ones(1)
    )
    found = convert.velocity_from_v(x, best, t)
    torch.testing.assert_close(found, one.velocity(x, t, NOBODY), rtol=1e-9, atol=1e-9)


def test_angle_match_agrees_with_log_snr_at_the_steps_and_holds_the_ends() -> None:
    table = np.linspace(0.99, 0.01, 100)
    t = torch.from_numpy(convert.table_times(table))
    torch.testing.assert_close(convert.angle_match(table)(t)[0], convert.table_match(table)(t)[0], rtol=0, atol=1e-6)
    assert convert.angle_match(table)(torch.tensor([0.0, 1.0]))[0].tolist() == [0.0, 99.0]
    assert convert.angle_match(np.array([0.5, 0.0]))(torch.tensor([1.0]))[0].tolist() == [1.0]
    for bad in (np.array([0.1, 0.5]), np.array([0.5]), np.array([1.0, 0.5]), np.array([0.5, -0.1])):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            convert.angle_match(bad)


def test_times_without_memory_are_matched_too() -> None:
    match = convert.angle_match(np.linspace(0.99, 0.01, 100))
    with FakeTensorMode():
        step, sigma = match(torch.rand(3))
    assert step.shape == sigma.shape == (3,) and isinstance(step, FakeTensor)
