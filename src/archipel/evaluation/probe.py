"""Text-video similarity without a text-video model: a ridge probe from video features to caption embeddings.

Fitted on real training clips only; its penalty is chosen by cross-validation over content groups. It says how much of
a caption can be read from a clip, and is shown beside retrieval on real, reconstructed, static and reversed clips: where
real clips are not retrieved well above chance, the probe knows nothing and its numbers are withheld.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archipel.errors import ArchipelError

PENALTIES = tuple(10.0**power for power in range(-6, 4))
FOLDS = 5
DUAL = 4096
TIMES_CHANCE = 3.0


@dataclass(frozen=True)
class Probe:
    """A fitted probe: standardised video features @ ``weight`` = centred caption embedding.

    mean, scale: (D,); weight (D, P); text_mean (P,); penalty: chosen ridge penalty per training clip; score: mean
    cosine of held-out groups in cross-validation.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    text_mean: np.ndarray
    penalty: float
    score: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Video features (n, D) -> predicted, centred caption embeddings (n, P), each of length 1."""
        rows = (np.asarray(features, np.float64) - self.mean) / self.scale
        return _unit(rows @ self.weight)

    def captions(self, text: np.ndarray) -> np.ndarray:
        """Caption embeddings (n, P), centred as in training, each of length 1."""
        return _unit(np.asarray(text, np.float64) - self.text_mean)


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features of several extractors side by side: (n, sum of D) float64."""
    return np.concatenate([np.asarray(part, np.float64) for part in parts], 1)


def _solve(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    """Ridge weights (D, P) for every penalty (times the number of clips), by one eigen-decomposition of x x^T, or of
    x^T x, which gives the same weights to rounding, where there are more than ``DUAL`` clips and more clips than features."""
    if len(x) > max(DUAL, x.shape[1]):
        values, vectors = np.linalg.eigh(x.T @ x)
        projected = vectors.T @ (x.T @ y)
        return [vectors @ (projected / (np.clip(values, 0, None) + p * len(x))[:, None]) for p in penalties]
    values, vectors = np.linalg.eigh(x @ x.T)
    projected = vectors.T @ y
    return [x.T @ (vectors @ (projected / (np.clip(values, 0, None) + p * len(x))[:, None])) for p in penalties]


def fold_of(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each clip (n,) int; whole content groups go to one fold."""
    _, labels = np.unique(groups, return_inverse=True)
    count = int(labels.max()) + 1
    fold = np.empty(count, np.int64)
    fold[np.random.Generator(np.random.PCG64([seed, count])).permutation(count)] = np.arange(count) % min(folds, count)
    return np.asarray(fold[labels])


def fit(features: np.ndarray, text: np.ndarray, groups: np.ndarray, seed: int = 0) -> Probe:
    """Fit on real training clips: features (n, D), caption embeddings (n, P), content groups (n,) of any labels.

    Raises ArchipelError below two content groups (nothing could be held out).
    """
    x, y = np.asarray(features, np.float64), np.asarray(text, np.float64)
    fold = fold_of(groups, FOLDS, seed)
    if fold.max() < 1:
        raise ArchipelError("the text-video probe needs training clips of at least 2 content groups")
    cosines = np.zeros((len(PENALTIES), len(x)))
    for held in range(int(fold.max()) + 1):
        inside, outside = fold != held, fold == held
        mean, scale, text_mean = _statistics(x[inside], y[inside])
        target = _unit(y[outside] - text_mean)
        for row, weight in enumerate(_solve((x[inside] - mean) / scale, y[inside] - text_mean, PENALTIES)):
            cosines[row, outside] = (_unit((x[outside] - mean) / scale @ weight) * target).sum(1)
    best = int(cosines.mean(1).argmax())
    mean, scale, text_mean = _statistics(x, y)
    weight = _solve((x - mean) / scale, y - text_mean, [PENALTIES[best]])[0]
    return Probe(mean, scale, weight, text_mean, PENALTIES[best], float(cosines[best].mean()))


def _statistics(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and scale of features and mean of captions; one scale for all penalties: features to unit total variance."""
    spread = x.std(0)
    return x.mean(0), np.where(spread > 1e-8, spread, 1.0) * np.sqrt(x.shape[1]), y.mean(0)


@dataclass(frozen=True)
class Retrieval:
    """Per-clip results: similarity (n,) cosine with the own caption; top1, top5 (n,) in [0, 1]; chances of both."""

    similarity: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    pool: int

    @property
    def chance1(self) -> float:
        return 1 / self.pool

    @property
    def chance5(self) -> float:
        return min(5, self.pool) / self.pool


def retrieve(probe: Probe, features: np.ndarray, own: np.ndarray, pool: np.ndarray) -> Retrieval:
    """Find each clip's caption among the pool of different captions.

    features (n, D); own (n,) int: the row of each clip's caption in ``pool`` (Q, P), the embeddings of the different
    captions. Ties share the credit, so that a constant prediction scores exactly chance.
    """
    scores = probe(features) @ probe.captions(pool).T
    mine = scores[np.arange(len(scores)), own]
    above = (scores > mine[:, None] + 1e-12).sum(1)
    tied = (np.abs(scores - mine[:, None]) <= 1e-12).sum(1)  # includes the clip's own caption
    share = [np.clip((top - above) / tied, 0, 1) for top in (1, 5)]
    return Retrieval(mine, share[0], share[1], len(pool))


def trusted(real: Retrieval) -> bool:
    """Whether the probe may be shown: retrieval@1 of real clips is at least three times chance."""
    return bool(real.top1.mean() >= TIMES_CHANCE * real.chance1)


def static(clips: np.ndarray) -> np.ndarray:
    """The first frame repeated: (N, F, H, W, 3) like ``clips``."""
    return np.ascontiguousarray(np.broadcast_to(clips[:, :1], clips.shape))


def backwards(clips: np.ndarray) -> np.ndarray:
    """The frames in reverse order: (N, F, H, W, 3) like ``clips``."""
    return np.ascontiguousarray(clips[:, ::-1])
