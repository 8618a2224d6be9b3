"""Moments and Frechet distances against cd-fvd's own statistics class and Frechet code, whose divisor is n."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from archipel.errors import ArchipelError
from archipel.evaluation import distances
from archipel.evaluation.distances import Moments


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What importing bench says to the environment is undone."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def cdfvd() -> Iterator[Any]:
    from bench import peers

    with peers.cdfvd() as module:
        yield module


def features(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """float32, as cd-fvd keeps them: both sides then sum the very same numbers."""
    draw = np.random.Generator(np.random.PCG64(seed))
    mix = draw.normal(size=(d, d)) / d**0.5
    a, b = draw.normal(size=(n, d)) @ mix + 1.5, 1.2 * draw.normal(size=(n + 30, d)) @ mix.T + 1.7
    return a.astype(np.float32), b.astype(np.float32)


def stats(module: Any, rows: np.ndarray) -> Any:
    kept = module.FeatureStats(capture_mean_cov=True, capture_all=True)
    for part in np.array_split(rows, 3):
        kept.append_torch(torch.from_numpy(part), rank=0, num_gpus=1)
    return kept


def test_streamed_moments_are_cdfvds_feature_stats(cdfvd: Any) -> None:
    a, _ = features(1, 50, 20)
    kept, ours = stats(cdfvd, a), Moments.stream(np.array_split(a, 7))
    mean, cov = kept.get_mean_cov()
    assert ours.n == kept.num_items
    np.testing.assert_allclose(ours.total, kept.raw_mean, rtol=1e-12)
    np.testing.assert_allclose(ours.outer, kept.raw_cov, rtol=1e-12)
    np.testing.assert_allclose(ours.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(ours.covariance_over("n"), cov, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.covariance, cov * 50 / 49, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", [3, 32, 100])
def test_frechet_with_divisor_n_is_cdfvds(cdfvd: Any, d: int) -> None:
    a, b = features(d, 4 * d + 10, d)
    theirs = cdfvd.cdfvd.compute_fvd_from_stats(None, stats(cdfvd, a), stats(cdfvd, b))
    ours = distances.frechet(Moments.of(a), Moments.of(b), divisor="n")
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    assert distances.frechet(Moments.of(a), Moments.of(b)) != pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("divisor", sorted(distances.DIVISORS))
def test_torchmetrics_agrees_with_either_divisor(divisor: str) -> None:
    a, b = features(9, 150, 40)
    ddof = {"n-1": 1, "n": 0}[divisor]
    given = [
        t for rows in (a, b) for t in (rows.mean(0, dtype=np.float64), np.cov(rows.T.astype(np.float64), ddof=ddof))
    ]
    theirs = float(_compute_fid(*(torch.from_numpy(one) for one in given)))
    assert distances.frechet(Moments.of(a), Moments.of(b), divisor) == pytest.approx(theirs, rel=1e-6)


def test_an_unknown_divisor_is_refused() -> None:
    with pytest.raises(ArchipelError, match="n-1, n"):
        Moments.of(np.eye(3)).covariance_over("n+1")


def test_the_stand_in_for_torchvision_is_gone_afterwards() -> None:
    from bench import peers

    def there() -> set[str]:
        return {name for name in sys.modules if name.partition(".")[0] in ("torchvision", "cdfvd")}

    before = there()
    with peers.cdfvd():
        assert {"torchvision", "cdfvd.fvd"} <= there()
    assert there() == before
