"""Path, times, losses and the random streams they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archipel.flow import draws, losses, path, time


def pair(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shape = (rows, 2, 3, 4, 4)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.rand(rows, generator=g)


def test_path_runs_from_clip_to_noise_at_the_speed_of_its_target() -> None:
    x0, eps, t = pair()
    assert torch.equal(path.interpolate(x0, eps, torch.zeros(5)), x0)
    assert torch.equal(path.interpolate(x0, eps, torch.ones(5)), eps)
    x0, eps, t, h = x0.double(), eps.double(), t.double(), 1e-4
    slope = (path.interpolate(x0, eps, t + h) - path.interpolate(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, path.velocity_target(x0, eps), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.rand(4), torch.rand(5, 1)])
def test_times_that_are_not_one_per_row_are_refused(t: torch.Tensor) -> None:
    x0, eps, _ = pair()
    with pytest.raises(ValueError, match="one time per row"):
        path.interpolate(x0, eps, t)


def test_shift_keeps_the_ends_moves_the_middle_and_is_undone_by_its_inverse() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved = time.shift_time(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and bool((moved.diff() > 0).all())
    assert float(moved[5]) == pytest.approx(0.75)
    torch.testing.assert_close(time.shift_time(moved, 1 / 3), t)
    torch.testing.assert_close(time.shift_time(time.shift_time(t, 2.0), 3.0), time.shift_time(t, 6.0))
    for a in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            time.shift_time(t, a)


def test_logit_normal_by_normals_and_by_uniforms_are_the_same_law() -> None:
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    t = time.logit_normal_from_uniform(u)
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-6)
    # Phi(1) of the mass lies below sigmoid(1)
    assert float((t < torch.sigmoid(torch.tensor(1.0))).double().mean()) == pytest.approx(0.841345, abs=1e-4)
    normals = torch.from_numpy(draws.normals(0, [0], (4000,))[0]).double()
    drawn = time.logit_normal(normals)
    for q in (0.1, 0.5, 0.9):
        assert float(drawn.quantile(q)) == pytest.approx(float(t.quantile(q)), abs=0.02)


def test_validation_times_are_fixed_ascending_and_inside() -> None:
    t = time.validation_times(8, shift=3.0)
    assert bool((t.diff() > 0).all()) and float(t[0]) > 0 and float(t[-1]) < 1
    assert float(time.validation_times(8).mean()) == pytest.approx(0.5, abs=1e-6)


def test_streams_are_disjoint_and_noise_is_standard() -> None:
    many = draws.normals(0, range(200), (64,), step=5)
    assert many.dtype == np.float32
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    correlation = np.corrcoef(many[:20])
    assert np.abs(correlation - np.eye(20)).max() < 0.6
    assert not np.array_equal(many[0], draws.normals(0, [0], (64,), step=6)[0])
    assert not np.array_equal(many[0], draws.normals(0, [0], (64,), step=5, purpose=draws.ROUTE)[0])
    # neighbours in every word of the key and the counter begin differently, and long streams do not run into each other
    firsts = [
        draws.generator(*w).random() for w in ((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2))
    ]
    assert len(set(firsts)) == 5
    long = draws.generator(1, 1, 1, 1).random(100_000)
    assert not np.isin(firsts[1:], long).any()


def test_noise_of_a_clip_is_a_function_of_its_seed_only() -> None:
    together = draws.clip_noise([4, 2**40, 9], (3, 2))
    assert np.array_equal(draws.clip_noise([2**40], (3, 2))[0], together[1])
    assert draws.clip_noise([], (3, 2)).shape == (0, 3, 2)
    with pytest.raises(ValueError, match=r"2\^63"):
        draws.generator(-1, draws.NOISE)


def test_losses_are_per_clip_means_and_zero_at_the_target() -> None:
    x0, eps, t = pair()
    assert torch.equal(losses.velocity_loss(eps - x0, x0, eps), torch.zeros(5))
    off = losses.velocity_loss(eps - x0 + 2, x0, eps)
    torch.testing.assert_close(off, torch.full((5,), 4.0))
    torch.testing.assert_close(losses.prediction_loss("velocity", x0, x0, eps, t), losses.velocity_loss(x0, x0, eps))
    with pytest.raises(ValueError, match="prediction"):
        losses.prediction_loss("noise", x0, x0, eps, t)


def test_x0_loss_is_the_velocity_loss_above_the_floor_and_bounded_below_it() -> None:
    x0, eps, _ = pair()
    guess = x0 + 0.3
    t = torch.tensor([0.05, 0.2, 0.5, 0.9, 1.0])
    x = path.interpolate(x0, eps, t)
    v = (x - guess) / path.over_rows(t, x)
    torch.testing.assert_close(losses.x0_loss(guess, x0, t), losses.velocity_loss(v, x0, eps), rtol=1e-4, atol=1e-5)
    tiny = losses.x0_loss(guess, x0, torch.zeros(5))
    torch.testing.assert_close(tiny, torch.full((5,), (0.3 / 0.05) ** 2), rtol=1e-3, atol=0)
