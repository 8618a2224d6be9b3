"""A trained and calibrated router against the exact posterior of a Gaussian mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archipel import store
from archipel.contracts import Conditioning
from archipel.errors import DamagedError
from archipel.flow.exact import GaussianMixture
from archipel.routing import calibration
from archipel.routing.objective import RouterObjective, answer, chosen
from archipel.routing.router import CalibratedRouter
from archipel.training.batches import Clips, Shard
from archipel.training.loop import Settings, fit

K, SHAPE = 3, (2, 1, 1, 2)


class TinyRouter(nn.Module):
    """A router's signature on a small perceptron."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = int(np.prod(SHAPE)) + 1 + K
        self.body = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, K))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.body(torch.cat([x.flatten(1), t[:, None], cond.pooled], 1))


def mixture() -> GaussianMixture:
    # Equal weights: the captions below are symmetric, so that the null condition's posterior is exact as well.
    means = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.5, -1.0, 0.0], [-1.0, 0.0, 0.0, 1.0]]).reshape(K, *SHAPE)
    return GaussianMixture(means, torch.tensor([0.5, 0.3, 0.8]), torch.ones(K))


def write_split(path: Path, count: int, seed: int) -> None:
    """Captions are log-weights of the clusters; the cluster follows the caption, the clip follows the cluster."""
    exact, generator = mixture(), np.random.default_rng(seed)
    pooled = generator.normal(size=(count, K))
    p = np.exp(calibration.log_softmax(pooled))
    cluster = np.minimum((p.cumsum(1) < generator.random((count, 1))).sum(1), K - 1)
    noise = generator.normal(size=(count, 4)) * exact.variances.sqrt().numpy()[cluster]
    x0 = exact.means.numpy()[cluster] + noise
    store.write_tensors(
        path,
        {
            "latents": x0.reshape(count, *SHAPE).astype(np.float32),
            "tokens": np.zeros((count, 2, 3), np.float32),
            "mask": np.ones((count, 2), bool),
            "pooled": pooled.astype(np.float32),
            "cluster": cluster.astype(np.int64),
            "row": np.arange(count, dtype=np.int64) + seed * 100_000,
        },
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    folder = tmp_path_factory.mktemp("shard")
    for split, count, seed in (("train", 6000, 1), ("validation", 256, 2)):
        write_split(folder / f"{split}.safetensors", count, seed)
    return Shard(Clips(folder / "train.safetensors"), Clips(folder / "validation.safetensors"))


def exact_draws(found: calibration.Draws, clips: Clips, rows: np.ndarray) -> np.ndarray:
    """Exact log p at the very clips, times and noise that a router was asked about."""
    exact = mixture()

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return exact.posterior(x.double(), t, cond).log()

    again = answer(network, clips, rows, seed=7)
    assert np.array_equal(again.times, found.times)
    return again.logits


@pytest.mark.slow
def test_trained_and_calibrated_it_approaches_the_exact_posterior(shard: Shard, tmp_path: Path) -> None:
    objective = RouterObjective(TinyRouter(0), shard, K, seed=0, batch=128, text_dropout=0.2)
    settings = Settings(
        steps=400, lr=1e-2, warmup=20, cooldown=0.6, ema=0.05, validate_every=100, checkpoint_every=400, keep="best"
    )
    outcome = fit(objective, settings, tmp_path, run_id="r", label="router")
    assert outcome.best is not None
    rows = chosen(shard.validation)
    found = answer(objective.model, shard.validation, rows, seed=7)
    fitted = calibration.fit(found, np.full(K, 1 / K))
    log_p, exact = fitted.log_p(found), exact_draws(found, shard.validation, rows)
    labels = np.broadcast_to(found.labels, found.times.shape).reshape(-1)
    prior = float(np.log(K))
    for branch, most in ((0, 0.03), (1, 0.05)):
        mine = calibration.nll(log_p[branch].reshape(-1, K), labels)
        best = calibration.nll(exact[branch].reshape(-1, K), labels)
        assert best < 0.8 * prior  # there is something to know
        assert mine - best < most, (branch, mine, best)
    # Probabilities themselves, not only their cross-entropy.
    assert np.abs(np.exp(log_p) - np.exp(exact)).mean() < 0.05


def test_the_exact_posterior_needs_no_calibration(shard: Shard) -> None:
    exact = mixture()
    rows = chosen(shard.train)
    found = answer(lambda x, t, c: exact.posterior(x.double(), t, c).log(), shard.train, rows, seed=3)
    fitted = calibration.fit(found, np.full(K, 1 / K))
    assert (np.abs(np.log(fitted.temperatures)) < 0.4).all()
    assert np.abs(np.log(fitted.temperatures)).mean() < 0.15
    labels = np.broadcast_to(found.labels, found.times.shape).reshape(-1)
    assert calibration.ece(found.logits[0].reshape(-1, K), labels) < 0.05


def test_times_fill_each_bin_and_draws_do_not_depend_on_the_company(shard: Shard) -> None:
    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.stack([x.sum((1, 2, 3, 4)), t, cond.pooled.sum(1)], 1)

    rows = np.arange(100)
    found = answer(network, shard.validation, rows, seed=7, bins=4)
    edges = np.linspace(0, 1, 5)
    for number in range(4):
        assert (found.times[number] >= edges[number]).all()
        assert (found.times[number] <= edges[number + 1]).all()
    assert found.logits.shape == (2, 4, found.times.shape[1], 100, 3)
    assert not found.logits[1, ..., 2].any()  # the null branch has no caption
    # 60 to 99 alone: other chunks, same numbers (repeats are a function of how many are asked: same here)
    some = answer(network, shard.validation, np.arange(0, 100)[::-1].copy(), seed=7, bins=4)
    assert np.array_equal(some.logits[:, :, :, ::-1], found.logits)


def test_batches_follow_the_data_and_drop_text_as_configured(shard: Shard) -> None:
    objective = RouterObjective(TinyRouter(0), shard, K, seed=0, batch=600, text_dropout=0.25)
    batches = [objective.batch(step) for step in range(10)]  # one epoch
    seen = torch.cat([batch.cluster for batch in batches])
    truth = np.asarray(store.map_tensors(shard.train.path)["cluster"])
    assert np.bincount(seen.numpy()).tolist() == np.bincount(truth).tolist()
    null = torch.cat([~batch.cond.mask.any(1) for batch in batches])
    assert float(null.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not torch.cat([batch.cond.pooled for batch in batches])[null].any()


def test_validation_weighs_both_branches_as_training_does(shard: Shard) -> None:
    objective = RouterObjective(TinyRouter(0), shard, K, seed=0, batch=8, text_dropout=0.25)
    found = objective.validate()
    assert found["loss"] == pytest.approx(0.75 * found["with_text"] + 0.25 * found["without_text"])
    assert found == objective.validate()
    assert found["with_text"] == pytest.approx(np.mean(found["bins"]))


def test_labels_outside_the_experts_are_refused(shard: Shard) -> None:
    with pytest.raises(DamagedError, match="clusters outside 0 to 1"):
        RouterObjective(TinyRouter(0), shard, 2, seed=0, batch=64)


def test_calibrated_router_is_a_posterior_that_knows_null_rows() -> None:
    prior = np.array([0.6, 0.3, 0.1])
    fitted = calibration.Calibration(np.array([[2.0, 4.0], [1.0, 1.0]]), np.array([0.25, 0.75]), prior)
    router = CalibratedRouter(TinyRouter(1), fitted)
    x, t = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.25, 0.75, 1.0])
    cond = Conditioning(torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool), torch.ones(4, K))
    p = router(x, t, cond)
    assert p.dtype == x.dtype
    torch.testing.assert_close(p.sum(1), torch.ones(4))
    logits = router.logits(x, t, cond).double().numpy()
    np.testing.assert_allclose(p.numpy(), np.exp(calibration.temper(logits, prior, np.array([2, 2, 4, 4]))), rtol=1e-5)
    both = Conditioning.cat([cond, cond.null()])
    mixed = router(torch.cat([x, x]), torch.cat([t, t]), both)
    torch.testing.assert_close(mixed[:4], p)
    null = router.logits(x, t, cond.null()).double().numpy()
    np.testing.assert_allclose(mixed[4:].numpy(), np.exp(calibration.log_softmax(null)), rtol=1e-5)
    assert not p.requires_grad
