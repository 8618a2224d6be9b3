"""Calibration of the router: one temperature per time bin, with the caption and without it.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2) on validation
clips, with two changes. A router's task changes with t, and it memorises captions (each is unique), so there are
temperatures for bins of t, and one row of them for the null caption. And it is the evidence that is tempered, not the
logits: with pi the clusters' shares,

    log p(k) = log pi_k + (logit_k - log pi_k) / T + constant,

so that a router that knows nothing (T to infinity) answers with the prior instead of equal shares. For equal shares
it is the ordinary form. A temperature never changes the order of experts where shares are equal, and is never negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archipel.errors import DamagedError

BINS = 8
_LOW, _HIGH = float(np.log(0.05)), float(np.log(50.0))
_GRID = 64
_GOLDEN = (5**0.5 - 1) / 2
# Widths (of log T) of the normal priors: the global temperature around 1, a bin's around the global one.
_GLOBAL_WIDTH, _BIN_WIDTH = 1.0, 0.35


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def temper(logits: np.ndarray, prior: np.ndarray, temperature: np.ndarray | float) -> np.ndarray:
    """log p (..., K) of logits (..., K): evidence beyond the prior (K,) divided by ``temperature`` (scalar or (...))."""
    log_prior = np.log(np.asarray(prior, np.float64))
    scale = np.asarray(temperature, np.float64)[..., None]
    return log_softmax(log_prior + (np.asarray(logits, np.float64) - log_prior) / scale)


def shift_prior(logits: np.ndarray, prior: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Logits (..., K) of a router that was trained on cluster shares ``trained`` (K,), for shares ``prior`` (K,).

    Adds log(pi_k / pi'_k): exact for a Bayes-optimal router, since p'(k | x) is proportional to pi'_k p(x | k).
    Saerens et al. 2002, section 2.2; method.md 8.6. Our own batches follow the data, so the correction is zero there.
    """
    return np.asarray(logits, np.float64) + np.log(np.asarray(prior, np.float64) / np.asarray(trained, np.float64))


def nll(log_p: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats of log p (n, K) at labels (n,)."""
    return float(-np.take_along_axis(log_p, labels[:, None], 1).mean())


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, prior: np.ndarray, *, clips: float, around: float = 1.0, width: float
) -> float:
    """The temperature that minimises the NLL plus its own log prior: T ~ log-normal(log ``around``, ``width``).

    logits (n, K), labels (n,). ``clips`` is how many independent clips stand behind the n rows (a clip's several draws
    of noise are not independent): with few the answer stays near ``around``. A grid over T in [0.05, 50], then golden
    sections around its best point.
    """

    def cost(u: float) -> float:
        penalty = (u - np.log(around)) ** 2 / (2 * width**2 * clips)
        return nll(temper(logits, prior, float(np.exp(u))), labels) + float(penalty)

    grid = np.linspace(_LOW, _HIGH, _GRID)
    best = int(np.argmin([cost(float(u)) for u in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    cost_a, cost_b = cost(a), cost(b)
    for _ in range(30):
        if cost_a <= cost_b:
            high, b, cost_b = b, a, cost_a
            a = high - _GOLDEN * (high - low)
            cost_a = cost(a)
        else:
            low, a, cost_a = a, b, cost_b
            b = low + _GOLDEN * (high - low)
            cost_b = cost(b)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Draws:
    """A router's answers on labelled noisy clips, in bins of t.

    logits: (2, M, R, N, K), first axis caption, null; times: (M, R, N); labels: (N,); M bins, R draws of noise.
    """

    logits: np.ndarray
    times: np.ndarray
    labels: np.ndarray

    def only(self, clips: np.ndarray) -> Draws:
        """Some clips: index or bool (N,)."""
        return Draws(self.logits[:, :, :, clips], self.times[:, :, clips], self.labels[clips])

    def flat(self, branch: int, number: int | slice) -> tuple[np.ndarray, np.ndarray]:
        """logits (n, K) and labels (n,) of one branch and one bin or several."""
        logits = self.logits[branch, number]
        labels = np.broadcast_to(self.labels, logits.shape[:-1])
        return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


@dataclass(frozen=True)
class Calibration:
    """temperatures (2, M): with caption, without; at ``times`` (M,), ascending; ``prior`` (K,): shares of the clusters."""

    temperatures: np.ndarray
    times: np.ndarray
    prior: np.ndarray

    def at(self, t: np.ndarray, null: np.ndarray) -> np.ndarray:
        """Temperature of each row: t (...) in [0, 1], null (...) bool. log T is linear between bins, level beyond."""
        both = [np.exp(np.interp(t, self.times, np.log(row))) for row in self.temperatures]
        return np.asarray(np.where(null, both[1], both[0]))

    def log_p(self, draws: Draws) -> np.ndarray:
        """Calibrated log p of every draw, (2, M, R, N, K)."""
        return np.stack(
            [
                temper(draws.logits[b], self.prior, self.at(draws.times, np.full(draws.times.shape, bool(b))))
                for b in (0, 1)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "form": "log p(k) = log prior_k + (logit_k - log prior_k) / T + constant; log T linear in t between bins",
            "t": self.times.tolist(),
            "temperature": self.temperatures[0].tolist(),
            "temperature_null": self.temperatures[1].tolist(),
            "prior": self.prior.tolist(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Calibration:
        """Raises DamagedError for anything but ascending times, positive temperatures and shares that sum to 1."""
        try:
            temperatures = np.array([value["temperature"], value["temperature_null"]], np.float64)
            times, prior = np.array(value["t"], np.float64), np.array(value["prior"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"{where} is not a calibration ({error!r}): run `archipel route` to make it anew"
            ) from error
        fits = times.ndim == 1 and len(times) > 0 and temperatures.shape == (2, len(times)) and prior.ndim == 1
        if not (
            fits
            and np.isfinite(temperatures).all()
            and (temperatures > 0).all()
            and (np.diff(times) > 0).all()
            and (prior > 0).all()
            and abs(prior.sum() - 1) < 1e-6
        ):
            raise DamagedError(f"{where} holds impossible numbers: run `archipel route` to make it anew")
        return cls(temperatures, times, prior)


def identity(prior: Sequence[float] | np.ndarray, bins: int = BINS) -> Calibration:
    """Temperature 1 everywhere: where there is no validation clip to fit on."""
    return Calibration(np.ones((2, bins)), centres(bins), np.asarray(prior, np.float64))


def centres(bins: int) -> np.ndarray:
    """Middles of equal bins of [0, 1], (M,)."""
    return np.asarray((np.arange(bins) + 0.5) / bins)


def fit(draws: Draws, prior: np.ndarray) -> Calibration:
    """A global temperature per branch, pulled towards 1; then one per bin, pulled towards the global one.

    How hard it pulls is the number of clips against the likelihood (a maximum a posteriori estimate), so a handful of
    validation clips, or a bin in which every answer is right, cannot push a temperature to an extreme.
    """
    clips, bins = len(draws.labels), draws.logits.shape[1]
    if clips == 0:
        return identity(prior, bins)
    fitted = np.ones((2, bins))
    for branch in (0, 1):
        logits, labels = draws.flat(branch, slice(None))
        overall = fit_temperature(logits, labels, prior, clips=clips, width=_GLOBAL_WIDTH)
        for number in range(bins):
            logits, labels = draws.flat(branch, number)
            fitted[branch, number] = fit_temperature(
                logits, labels, prior, clips=clips, around=overall, width=_BIN_WIDTH
            )
    return Calibration(fitted, centres(bins), np.asarray(prior, np.float64))


# --- how well calibrated ---------------------------------------------------------------------------------------------


def reliability(log_p: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """By equal bins of the highest probability: {"confidence", "accuracy", "share"}; empty bins are left out.

    log_p (n, K), labels (n,). Guo et al., arXiv 1706.04599, section 2.
    """
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    rows = []
    for which in np.unique(number):
        here = number == which
        rows.append(
            {
                "confidence": float(confidence[here].mean()),
                "accuracy": float(right[here].mean()),
                "share": float(here.mean()),
            }
        )
    return rows


def ece(log_p: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: sum over bins of share |accuracy - confidence|, in [0, 1].

    arXiv 1706.04599, eq. 3. Biased upwards in few samples: state n beside it.
    """
    return float(
        sum(row["share"] * abs(row["accuracy"] - row["confidence"]) for row in reliability(log_p, labels, bins))
    )
