"""What experts and routers do on noisy real clips: agreement, accuracy over time, and where a predicted clip would lie.

All of it is on test clips with noise of its own, without guidance. Source of the questions: Expert-Data Alignment
(arXiv 2602.02685): chosen experts' clusters are nearest, chosen experts predict better, quality falls where they disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import cache
from archipel.contracts import Conditioning, Posterior
from archipel.ensemble.pipeline import Parts
from archipel.evaluation.intervals import Interval, mean_interval, share_interval
from archipel.flow import draws
from archipel.flow.convert import x0_from_velocity
from archipel.flow.path import interpolate
from archipel.partition.assignment import load_assignment, nearest
from archipel.routing.router import load_router
from archipel.run import Run
from archipel.study.prompts import Prompts
from archipel.training.machine import pick_device

TIMES = tuple(round(0.05 + 0.1 * step, 2) for step in range(10))
X0_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
X0_CLIPS = 32
_PURPOSE = 0x9B0B  # of the noise that is drawn here
_AT_ONCE = 32


@dataclass(frozen=True)
class Clips:
    """Real clips of a prompt set: latents x0 (N, C, T, H, W), captions, clusters (N,), content groups (N,)."""

    x0: Tensor
    cond: Conditioning
    clusters: np.ndarray
    groups: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, run: Run, prompts: Prompts) -> Clips:
        _, first = np.unique(prompts.rows, return_index=True)
        pick = np.sort(first)
        rows = prompts.rows[pick]
        latents = torch.from_numpy(np.array(cache.open_kind(run.cache, "latents")["latents"][rows]))
        cond = prompts.cond(run)[torch.from_numpy(pick)]
        _, groups = np.unique([prompts.groups[i] for i in pick], return_inverse=True)
        return cls(latents, cond, load_assignment(run)[rows], groups, rows)

    def noisy(self, t: float, seed: int, part: slice) -> tuple[Tensor, Tensor]:
        """x_t (B, C, T, H, W) and t (B,) for the clips of ``part``."""
        items = [int(row) for row in self.rows[part]]
        noise = draws.normals(seed, items, self.x0.shape[1:], step=round(1000 * t), purpose=_PURPOSE)
        times = torch.full((len(items),), t)
        return interpolate(self.x0[part], torch.from_numpy(noise), times), times


def _parts(clips: Clips, count: int | None = None) -> list[slice]:
    total = min(len(clips.rows), count or len(clips.rows))
    return [slice(begin, min(begin + _AT_ONCE, total)) for begin in range(0, total, _AT_ONCE)]


@torch.no_grad()
def router_over_time(router: Posterior, clips: Clips, seed: int) -> list[dict[str, Any]]:
    """Per time: {"t", "accuracy": Interval, "entropy": Interval in nats, "confidence": Interval}, over content groups."""
    found = []
    for t in TIMES:
        answers = []
        for part in _parts(clips):
            x, times = clips.noisy(t, seed, part)
            answers.append(router(x, times, clips.cond[part]).double().cpu())
        p = torch.cat(answers).numpy()
        entropy = -(p * np.log(np.clip(p, 1e-300, None))).sum(1)
        found.append(
            {
                "t": t,
                "accuracy": share_interval((p.argmax(1) == clips.clusters).astype(float), clips.groups),
                "entropy": mean_interval(entropy, clips.groups),
                "confidence": mean_interval(p.max(1), clips.groups),
            }
        )
    return found


@torch.no_grad()
def agreement(run: Run, clips: Clips, seed: int) -> list[dict[str, Any]]:
    """Per time: {"t", "cosine": mean cosine between two experts' velocities, "own": squared error of the expert of the
    clip's cluster, "others": of the other experts (mean), "best": share of clips whose own expert has the least error}."""
    parts = Parts(run, pick_device(None))
    experts = [parts.denoiser(name) for name in run.expert_names]
    k, found = len(experts), []
    for t in TIMES:
        cosines, errors = [], []
        for part in _parts(clips):
            x, times = clips.noisy(t, seed, part)
            target = (x - clips.x0[part]) / t  # eps - x0, since x_t = x0 + t (eps - x0)
            v = torch.stack([_on(parts.device, expert, x, times, clips.cond[part]) for expert in experts], 1)
            flat = v.flatten(2).double()
            unit = flat / flat.norm(dim=2, keepdim=True).clamp(min=1e-12)
            pairs = (unit @ unit.transpose(1, 2)).sum((1, 2)) - k
            cosines.append((pairs / (k * (k - 1))).numpy())
            errors.append(((v - target[:, None]) ** 2).flatten(2).mean(2).double().numpy())
        table = np.concatenate(errors)
        own = table[np.arange(len(table)), clips.clusters]
        others = (table.sum(1) - own) / (k - 1)
        found.append(
            {
                "t": t,
                "cosine": mean_interval(np.concatenate(cosines), clips.groups),
                "own": mean_interval(own, clips.groups),
                "others": mean_interval(others, clips.groups),
                "gap": mean_interval(others - own, clips.groups),
                "best": share_interval((table.argmin(1) == clips.clusters).astype(float), clips.groups),
            }
        )
    return found


def _on(device: str, expert: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    out: Tensor = expert(x.to(device), t.to(device), cond.to(device)).cpu()
    return out


@torch.no_grad()
def predicted_clusters(run: Run, clips: Clips, seed: int) -> list[dict[str, Any]]:
    """Where the predicted x0 lies: per time, the share of clips whose decoded prediction is nearest to the centroid of
    the clip's own cluster, by who predicts: {"t", "own", "router", "other": Interval}.

    own: the expert of the clip's cluster; router: the likeliest expert; other: the next expert after the own one.
    """
    from archipel.encoders.codecs import to_uint8

    parts = Parts(run, pick_device(None))
    experts, router = [parts.denoiser(name) for name in run.expert_names], load_router(run).to(parts.device)
    k, found = len(experts), []
    for t in X0_TIMES:
        hits: dict[str, list[np.ndarray]] = {"own": [], "router": [], "other": []}
        for part in _parts(clips, X0_CLIPS):
            x, times = clips.noisy(t, seed, part)
            cond = clips.cond[part]
            x0 = torch.stack([x0_from_velocity(x, _on(parts.device, e, x, times, cond), times) for e in experts], 1)
            asked = router(x.to(parts.device), times.to(parts.device), cond.to(parts.device)).argmax(1).cpu().numpy()
            truth = clips.clusters[part]
            for who, chosen in (("own", truth), ("router", asked), ("other", (truth + 1) % k)):
                latents = x0[torch.arange(len(truth)), torch.from_numpy(chosen)]
                shown = to_uint8(parts.codec.decode(latents))
                hits[who].append((nearest(run, partition_features(run, shown)) == truth).astype(float))
        groups = clips.groups[: sum(map(len, hits["own"]))]
        found.append({"t": t, **{who: share_interval(np.concatenate(values), groups) for who, values in hits.items()}})
    return found


def partition_features(run: Run, shown: np.ndarray) -> np.ndarray:
    """The features that clusters were made by, of clips uint8 (B, F, H, W, 3): (B, D)."""
    from archipel.encoders.features import extract
    from archipel.partition.stage import FEATURES

    names = FEATURES[run.config.partition.features][1]
    made = extract(names, shown, run.config.evaluate)
    return np.concatenate([made[name].numpy() for name in names], 1)


def as_dict(value: Any) -> Any:
    """Intervals within a finding as JSON."""
    if isinstance(value, Interval):
        return {key: part if np.isfinite(part) else None for key, part in value.as_dict().items()}
    if isinstance(value, dict):
        return {key: as_dict(part) for key, part in value.items()}
    return [as_dict(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
