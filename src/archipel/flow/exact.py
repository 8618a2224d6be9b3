"""A Gaussian mixture whose velocity, cluster velocities and posterior on the linear path are known in closed form.

It is the yardstick for everything that mixes experts: Decentralized Diffusion Models (arXiv 2501.05450), eq. 4, regroups the
marginal flow as u_t(x) = sum_k p(k | x, t) u_t^{(k)}(x); here every term is exact.

Component m is N(mu_m, diag s_m). Along x_t = (1 - t) x0 + t eps it is N((1 - t) mu_m, V_m) with
V_m = (1 - t)^2 s_m + t^2, and with r = (x - (1 - t) mu_m) / V_m, by Gaussian conditioning,
    E[x0 | x, m] = mu_m + (1 - t) s_m r,   E[eps | x, m] = t r,   v_m = E[eps - x0 | x, m].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from archipel.contracts import Conditioning, Velocity


class GaussianMixture:
    """Components with means (M, *shape), variances (M,) (isotropic) or (M, *shape) (diagonal), weights (M,).

    ``clusters`` (M,) says which of K clusters (experts) a component belongs to; default: one cluster each.
    A caption may speak for components: where ``cond.pooled`` is (B, M), it is added to the log-weights, so the null
    condition (zeros) is the plain mixture and every caption is another one. Any other width: captions are ignored.
    All arithmetic is in float64; results have the dtype of x. Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self, means: Tensor, variances: Tensor, weights: Tensor, clusters: Sequence[int] | None = None
    ) -> None:
        self.shape = tuple(means.shape[1:])
        self.means = means.double().flatten(1)
        count, size = self.means.shape
        spread = variances.double().flatten(1) if variances.ndim > 1 else variances.double()[:, None].repeat(1, size)
        self.clusters = torch.tensor(list(range(count) if clusters is None else clusters))
        if spread.shape != self.means.shape or weights.shape != (count,) or self.clusters.shape != (count,):
            raise ValueError("means, variances, weights and clusters must describe the same components")
        if (spread <= 0).any() or (weights <= 0).any():
            raise ValueError("variances and weights must be positive")
        self.variances = spread
        self.log_weights = (weights.double() / weights.double().sum()).log()
        self.k = int(self.clusters.max()) + 1

    def _log_prior(self, cond: Conditioning | None, rows: int) -> Tensor:
        """log of component weights given the caption, (B, M), not normalised (nothing here needs it to be)."""
        prior = self.log_weights.expand(rows, -1)
        if cond is not None and cond.pooled.shape[1] == len(self.log_weights):
            prior = prior + cond.pooled.double().cpu()
        return prior

    def _components(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> tuple[Tensor, Tensor]:
        """Per component: log joint density (B, M) up to a constant per row, and velocity (B, M, D)."""
        flat, time = x.detach().double().cpu().flatten(1), t.detach().double().cpu()[:, None, None]
        spread = (1 - time) ** 2 * self.variances + time**2
        centred = flat[:, None, :] - (1 - time) * self.means
        ratio = centred / spread
        density = -0.5 * (centred * ratio + spread.log() + math.log(2 * math.pi)).sum(-1)
        velocity = time * ratio - self.means - (1 - time) * self.variances * ratio
        return self._log_prior(cond, len(flat)) + density, velocity

    def _mean(self, joint: Tensor, velocity: Tensor, x: Tensor) -> Tensor:
        return (joint.softmax(1)[:, :, None] * velocity).sum(1).reshape(x.shape).to(x)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The exact marginal velocity E[eps - x0 | x_t = x, c], like x. A ``Velocity``. arXiv 2210.02747, eq. 8."""
        joint, velocity = self._components(x, t, cond)
        return self._mean(joint, velocity, x)

    def expert(self, k: int) -> Velocity:
        """The exact velocity of cluster k alone: the data-expert flow of arXiv 2501.05450, eq. 4."""
        outside = self.clusters != k
        if bool(outside.all()):
            raise ValueError(f"there is no component in cluster {k}")

        def velocity(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            joint, parts = self._components(x, t, cond)
            return self._mean(joint.masked_fill(outside, -math.inf), parts, x)

        return velocity

    def experts(self) -> list[Velocity]:
        return [self.expert(k) for k in range(self.k)]

    def posterior(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The exact p(k | x_t, t, c), (B, K). A ``Posterior``: the router of arXiv 2501.05450, eq. 4."""
        joint, _ = self._components(x, t, cond)
        return (joint.softmax(1) @ self._membership()).to(x)

    def cluster_prior(self, cond: Conditioning) -> Tensor:
        """p(k | c), (B, K) float64: shares of the clusters before anything of the clip is seen."""
        return self._log_prior(cond, len(cond)).softmax(1) @ self._membership()

    def _membership(self) -> Tensor:
        return torch.nn.functional.one_hot(self.clusters, self.k).double()

    def sample(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw clips from the mixture without captions: x0 float32 (count, *shape), cluster int64 (count,)."""
        weights = self.log_weights.exp().numpy()
        component = torch.from_numpy(generator.choice(len(weights), size=count, p=weights / weights.sum()))
        noise = torch.from_numpy(generator.standard_normal((count, self.means.shape[1])))
        x0 = self.means[component] + self.variances[component].sqrt() * noise
        return x0.reshape(count, *self.shape).float(), self.clusters[component]
