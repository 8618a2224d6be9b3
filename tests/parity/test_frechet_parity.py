"""Our distances against other people's code on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from archipel.evaluation import distances
from archipel.evaluation.distances import Moments


class Given(torch.nn.Module):
    """Hands features through a metric that expects a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def sets(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(seed))
    mix = draw.normal(size=(d, d)) / d**0.5
    return draw.normal(size=(n, d)) @ mix + 2, 1.3 * draw.normal(size=(n + 40, d)) @ mix.T + 2.2


@pytest.mark.parametrize("d", [3, 32, 100])
def test_frechet_is_scipys_matrix_square_root(d: int) -> None:
    a, b = sets(d, 4 * d + 10, d)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root.real)
    assert distances.frechet(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("d", [8, 64])
def test_frechet_is_torchmetrics(d: int) -> None:
    a, b = sets(100 + d, 5 * d, d)
    metric = FrechetInceptionDistance(feature=Given(d)).set_dtype(torch.float64)
    for features, real in ((a, False), (b, True)):
        for part in np.array_split(features, 3):
            metric.update(torch.from_numpy(part), real=real)
    ours = distances.frechet(Moments.stream(np.array_split(a, 4)), Moments.of(b))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kid_is_torchmetrics_on_one_subset_of_everything() -> None:
    a, b = sets(7, 40, 24)
    b = b[:40]
    metric = KernelInceptionDistance(feature=Given(24), subsets=1, subset_size=40).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=False)
    metric.update(torch.from_numpy(b), real=True)
    assert distances.kid(a, b) == pytest.approx(float(metric.compute()[0]), rel=1e-6)
