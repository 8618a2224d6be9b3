"""What the router learns: which cluster a noisy clip is from.

loss = cross-entropy of r(x_t, t, c) against k(x0), over all clips, with x_t made exactly as the experts' inputs are
(Decentralized Diffusion Models, arXiv 2501.05450, section 3; method.md 8.3). Batches run through epochs of all clips, so
they follow the data's cluster shares, and the minimum is p(k | x_t, t, c) without a correction of the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archipel.config import RunConfig
from archipel.errors import DamagedError
from archipel.flow import draws, given
from archipel.flow.path import interpolate
from archipel.routing.calibration import BINS, Draws
from archipel.routing.router import Logits
from archipel.training.batches import Batch, Clips, Shard, training_batch, validation_batches

TIMES = 5  # validation times of training: midpoints of equal shares of the training law
CLIPS = 256  # validation clips at most, in training and in calibration
_ANSWERS = 512  # a calibration bin has about so many noisy clips, at least _DRAWS[0] and at most _DRAWS[1] per clip
_DRAWS = (2, 8)
_CHUNK = 128
# Purposes (see flow.draws) of the noise and the times that the router is calibrated on.
_NOISE, _TIME, _TASK = 102, 103, 105


def dropout(config: RunConfig) -> float:
    """How often the router's caption is dropped: as often as the experts' pooled vector, which is all that it reads."""
    part = config.expert
    return part.text_dropout if part.pooled_dropout < 0 else part.pooled_dropout


def tasks(config: RunConfig) -> tuple[float, ...] | None:
    """The mix that the router's given frames are drawn from, the experts'; None where it is given none."""
    return config.expert.tasks if config.router.reads_image else None


class RouterObjective:
    """Cross-entropy on ``shards/all``; text is dropped as often as the experts'. Raises DamagedError for labels outside
    [0, experts).

    Times are uniform (DDM, section 3), not the experts' law: a sampler asks the router at t = 1 first, where that law
    has next to no clips, and top-1 stays with what it hears there. ``tasks``: as in training.objective, for a router that
    reads given frames; it is validated and calibrated on the mix.
    """

    def __init__(
        self,
        model: nn.Module,
        shard: Shard,
        experts: int,
        *,
        seed: int,
        batch: int,
        text_dropout: float = 0.0,
        tasks: Sequence[float] | None = None,
        device: str = "cpu",
    ) -> None:
        clusters = (
            shard.train.clusters
        )  # all of them, once: a look at each batch would make the host wait for the device
        if len(clusters) and not 0 <= clusters.min() <= clusters.max() < experts:
            raise DamagedError(f"{shard.train.path} names clusters outside 0 to {experts - 1}: partition again")
        self.model, self.shard, self.experts = model.to(device), shard, experts
        self._seed, self.size, self._device = seed, batch, device
        self._dropout, self._tasks = text_dropout, tasks
        self._times = [(number + 0.5) / TIMES for number in range(TIMES)]

    def batch(self, step: int, part: slice | None = None) -> Batch:
        return training_batch(
            self.shard.train,
            self._seed,
            step,
            self.size,
            shift=None,
            text_dropout=self._dropout,
            tasks=self._tasks,
            device=self._device,
            part=part,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy per clip in nats, (B,)."""
        return F.cross_entropy(self.model(batch.x_t, batch.t, batch.cond).float(), batch.cluster, reduction="none")

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """{"loss", "with_text", "without_text", "accuracy", "times", "bins"}, or {} without validation clips.

        ``loss`` is what training minimises, on validation clips: with_text (1 - dropout) + without_text dropout. The
        weights that are best by it are kept, since every caption is unique and a router soon knows them by heart.
        """
        bins, without, right = [], [], []
        for number, t in enumerate(self._times):
            text, null = [], []
            for batch in validation_batches(
                self.shard.validation,
                self._seed,
                t,
                bin_number=number,
                limit=CLIPS,
                tasks=self._tasks,
                device=self._device,
            ):
                logits = self.model(batch.x_t, batch.t, batch.cond).float()
                text.append(F.cross_entropy(logits, batch.cluster, reduction="none"))
                right.append((logits.argmax(1) == batch.cluster).float())
                blind = self.model(batch.x_t, batch.t, batch.cond.null()).float()
                null.append(F.cross_entropy(blind, batch.cluster, reduction="none"))
            if not text:
                return {}
            bins.append(float(torch.cat(text).mean()))
            without.append(float(torch.cat(null).mean()))
        with_text, without_text = sum(bins) / len(bins), sum(without) / len(without)
        return {
            "loss": (1 - self._dropout) * with_text + self._dropout * without_text,
            "with_text": with_text,
            "without_text": without_text,
            "accuracy": float(torch.cat(right).mean()),
            "times": [round(t, 6) for t in self._times],
            "bins": bins,
        }


def chosen(clips: Clips) -> np.ndarray:
    """Rows of at most ``CLIPS`` clips spread over a split, (N,) int64."""
    count = min(CLIPS, len(clips))
    return np.unique(np.linspace(0, len(clips) - 1, count).round().astype(np.int64)) if count else np.empty(0, np.int64)


@torch.no_grad()
def answer(
    network: Logits,
    clips: Clips,
    rows: np.ndarray,
    *,
    seed: int,
    bins: int = BINS,
    tasks: Sequence[float] | None = None,
    device: str = "cpu",
) -> Draws:
    """A router's logits on noisy versions of labelled clips, in equal bins of t, with and without their captions.

    Equal bins, not the training law: a sampler asks at every t. Within a bin a clip's draws are spread evenly. What a
    clip is asked about is a function of (seed, number of the draw, clip) alone; with ``tasks``, which of its frames are
    given as well.
    """
    repeats = int(np.clip(_ANSWERS // max(len(rows), 1), *_DRAWS))
    total = bins * repeats
    _, _, cluster = clips.take(rows)
    # Every (draw, clip) in one long line, cut into chunks: a few clips would make very small batches otherwise.
    number, place = (part.reshape(-1) for part in np.indices((total, len(rows))))
    times, parts = np.empty(len(number)), []
    for begin in range(0, len(number), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        x0, cond, _ = clips.take(rows[place[part]], device)
        if tasks is not None:
            cond = cond.given(_given(clips, number[part], rows[place[part]], tasks, seed).to(device))
        t, noise = _noise(clips, number[part], rows[place[part]], total, seed)
        times[part] = t.double().numpy()
        t, noise = t.to(device), noise.to(device)
        x_t = interpolate(x0, noise, t)
        both = [network(x_t, t, one).double().cpu().numpy() for one in (cond, cond.null())]
        parts.append(np.stack(both))
    shape = (bins, repeats, len(rows))
    logits = np.concatenate(parts, 1) if parts else np.empty((2, 0, 1))
    return Draws(logits.reshape(2, *shape, logits.shape[-1]), times.reshape(shape), cluster.numpy())


def _given(clips: Clips, number: np.ndarray, rows: np.ndarray, tasks: Sequence[float], seed: int) -> Tensor:
    """The frames (B, C + 1, T, H, W) that draw ``number`` of each row is given."""
    pairs = zip(number.tolist(), clips.items(rows), strict=True)
    u = np.array([draws.uniforms(seed, [item], step=step, purpose=_TASK)[0] for step, item in pairs])
    return clips.given(rows, np.zeros(len(rows), np.int64), given.pick(tasks, u))


def _noise(clips: Clips, number: np.ndarray, rows: np.ndarray, total: int, seed: int) -> tuple[Tensor, Tensor]:
    """Times (B,) in [number / total, (number + 1) / total) and noise (B, C, T, H, W) of draw ``number`` of each row."""
    pairs = list(zip(number.tolist(), clips.items(rows), strict=True))
    inside = [draws.uniforms(seed, [item], step=step, purpose=_TIME)[0] for step, item in pairs]
    noise = [draws.normals(seed, [item], clips.latent_shape, step=step, purpose=_NOISE)[0] for step, item in pairs]
    return torch.from_numpy((number + np.array(inside)) / total).float(), torch.from_numpy(np.stack(noise))
