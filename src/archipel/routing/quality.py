"""What the router knows: cross-entropy, accuracy and calibration error by time, with and without the caption.

Numbers come from validation clips. Those called calibrated are cross-fitted: the temperatures that a clip is judged
with were fitted on clips of other content groups, so that calibration cannot praise itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from archipel.routing import calibration
from archipel.routing.calibration import Calibration, Draws

FOLDS = 2
BRANCHES = ("with_text", "without_text")


def folds(groups: Sequence[str], count: int = FOLDS) -> np.ndarray:
    """Fold (N,) int64 of every clip by its group's hash: groups stay whole, and no fold depends on the others' clips."""
    return np.array([hashlib.sha256(group.encode()).digest()[0] % count for group in groups], np.int64)


def cross_fitted(draws: Draws, prior: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Calibrated log p (2, M, R, N, K), each clip's temperatures fitted on the other folds."""
    fold = folds(groups)
    log_p = np.empty(draws.logits.shape)
    for which in range(FOLDS):
        inside = np.flatnonzero(fold == which)
        other = calibration.fit(draws.only(np.flatnonzero(fold != which)), prior)
        log_p[:, :, :, inside] = other.log_p(draws.only(inside))
    return log_p


def scores(log_p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Cross-entropy in nats, accuracy, expected calibration error, of log p (n, K) and labels (n,)."""
    return {
        "cross_entropy": calibration.nll(log_p, labels),
        "accuracy": float((log_p.argmax(1) == labels).mean()),
        "ece": calibration.ece(log_p, labels),
    }


def _rows(log_p: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    labels = np.broadcast_to(draws.labels, log_p.shape[:-1]).reshape(-1)
    return log_p.reshape(-1, log_p.shape[-1]), labels


def branch(raw: np.ndarray, fitted: np.ndarray, draws: Draws) -> dict[str, Any]:
    """One branch's numbers over all times and by bin; raw and fitted are log p (M, R, N, K)."""
    bins = []
    edges = np.linspace(0, 1, len(raw) + 1)
    for number in range(len(raw)):
        before, after = (scores(*_rows(values[number], draws)) for values in (raw, fitted))
        bins.append(
            {
                "t": float(edges[number : number + 2].mean()),
                "range": edges[number : number + 2].tolist(),
                **after,
                "uncalibrated": before,
            }
        )
    after = scores(*_rows(fitted, draws))
    return {
        **after,
        "uncalibrated": scores(*_rows(raw, draws)),
        "reliability": calibration.reliability(*_rows(fitted, draws)),
        "mean_probability": np.exp(fitted).mean(axis=(0, 1, 2)).tolist(),
        "bins": bins,
    }


def confusion(log_p: np.ndarray, draws: Draws) -> list[list[int]]:
    """Counts (K, K) over all times: rows are true clusters, columns the likeliest one."""
    rows, labels = _rows(log_p, draws)
    k = rows.shape[1]
    return np.bincount(labels * k + rows.argmax(1), minlength=k * k).reshape(k, k).tolist()


def measure(draws: Draws, prior: np.ndarray, groups: Sequence[str], fitted: Calibration) -> dict[str, Any]:
    """``router/quality.json`` but for the run's marks. Raises nothing: without validation clips it says so."""
    clips = len(draws.labels)
    base: dict[str, Any] = {"n": clips, "groups": len(set(groups)), "draws": int(draws.logits.shape[2])}
    base["t"] = fitted.times.tolist()
    if clips == 0:
        return {**base, "note": "no validation clip: the router is neither calibrated nor measured"}
    log_prior = np.broadcast_to(np.log(prior), (clips, len(prior)))
    base["prior"] = {**scores(log_prior, draws.labels), "shares": prior.tolist()}
    raw = calibration.log_softmax(draws.logits.astype(np.float64))
    after = cross_fitted(draws, prior, groups) if len(set(folds(groups))) == FOLDS else fitted.log_p(draws)
    base["cross_fitted"] = len(set(folds(groups))) == FOLDS
    for number, name in enumerate(BRANCHES):
        base[name] = branch(raw[number], after[number], draws)
    base["confusion"] = {name: confusion(after[number], draws) for number, name in enumerate(BRANCHES)}
    return base
