"""A network that is told the clip's cluster beside its caption (``monolith.condition = "cluster"``, a control)."""

from __future__ import annotations

import torch
from torch import Tensor

from archipel.contracts import Conditioning, Velocity


def add_cluster(cond: Conditioning, clusters: Tensor, count: int) -> Conditioning:
    """The cluster (B,) int64 of each row behind its pooled vector: (B, P) -> (B, P + ``count``).

    One-hot with mean square 1, as the pooled text has; zeros where the text is the null text: both are dropped together.
    """
    told = torch.nn.functional.one_hot(clusters, count).to(cond.pooled) * count**0.5
    told = told * cond.mask.any(1)[:, None].to(told.dtype)
    return Conditioning(cond.tokens, cond.mask, torch.cat([cond.pooled, told], 1), cond.image)


class _WithCluster:
    def __init__(self, velocity: Velocity, clusters: Tensor, count: int) -> None:
        self._velocity, self._clusters, self._count = velocity, clusters, count

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        times, over = divmod(len(cond), len(self._clusters))
        if over:
            raise ValueError(f"{len(cond)} rows for {len(self._clusters)} clusters: give whole batches only")
        clusters = self._clusters.to(x.device).repeat(times)  # guidance asks for both branches one after the other
        return self._velocity(x, t, add_cluster(cond, clusters, self._count))


def with_cluster(denoiser: Velocity, clusters: Tensor, count: int = 0) -> Velocity:
    """A cluster-conditioned network as a ``Velocity`` of captions alone: clip i of a batch belongs to ``clusters[i]``.

    clusters (B,) int64 in [0, K), for batches of B clips, or of 2 B where both branches of guidance are asked for at
    once; ``count``: K, where ``denoiser`` does not know it. The null branch is told no cluster.
    Raises ValueError for a network that takes no cluster, or a cluster outside.
    """
    count = count or int(getattr(denoiser, "clusters", 0))
    if not count:
        raise ValueError("this network takes no cluster: it was trained with monolith.condition = 'none'")
    if len(clusters) and not 0 <= int(clusters.min()) <= int(clusters.max()) < count:
        raise ValueError(f"clusters must lie in 0 to {count - 1}")
    return _WithCluster(denoiser, clusters.to(torch.int64), count)
