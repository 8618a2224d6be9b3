"""How an arm's clips are made: the velocity that the sampler follows, for the rules that are no plain strategy as well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel.backbones.cluster import with_cluster
from archipel.contracts import Conditioning, Posterior, Velocity
from archipel.ensemble import strategies
from archipel.ensemble.pipeline import Archipelago, Parts, Settings
from archipel.ensemble.strategies import Mixture, Trace, Weighting
from archipel.errors import ArchipelError
from archipel.flow import draws, samplers
from archipel.routing.calibration import identity
from archipel.routing.router import CalibratedRouter, load_router
from archipel.run import MONOLITH, Run
from archipel.study.plan import Arm

_NOT_SAMPLING = ("temperature", "missing")  # settings of an arm that are none of the sampler
HIGH = 0.5  # "high noise" is t above this
_SCHEDULE = re.compile(r"(first|alternate)-(\d+)-(\d+)")
_STRATEGIES = ("top", "full", "threshold", "ancestral", "oracle", "uniform", "random", "expert", MONOLITH)


class Tempered:
    """p^(1 / temperature), rows summing to 1: above 1 more even, below 1 sharper. A ``Posterior``."""

    def __init__(self, router: Posterior, temperature: float) -> None:
        self._router, self._temperature = router, temperature

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        p = self._router(x, t, cond).double().clamp(min=1e-300)
        return (p.log() / self._temperature).softmax(1).to(x.dtype)


class Switched:
    """One weighting while t > ``at``, another from there on."""

    def __init__(self, above: Weighting, below: Weighting, at: float) -> None:
        self._above, self._below, self._at = above, below, at

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]:
        high = bool(len(t)) and float(t[0]) > self._at
        return (self._above if high else self._below)(x, t, cond, null)

    def needed(self) -> list[int] | None:
        one, two = self._above.needed(), self._below.needed()
        return None if one is None or two is None else sorted({*one, *two})


class Alternating:
    """Two weightings in turns, the first one first; a time that is asked for again belongs to the same turn."""

    def __init__(self, one: Weighting, two: Weighting) -> None:
        self._pair, self._turn, self._last = (one, two), -1, float("nan")

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]:
        if len(t) and float(t[0]) != self._last:
            self._turn, self._last = self._turn + 1, float(t[0])
        return self._pair[self._turn % 2](x, t, cond, null)

    def needed(self) -> list[int] | None:
        one, two = (weighting.needed() for weighting in self._pair)
        return None if one is None or two is None else sorted({*one, *two})


@dataclass(frozen=True)
class Batch:
    """Captions to follow: cond of B rows, one seed per clip, and the cluster of each caption's real clip (B,)."""

    cond: Conditioning
    seeds: Sequence[int]
    clusters: np.ndarray


class ArmSampler:
    """Makes an arm's latents. ``experts``: the member's run; ``router``: the run whose router is asked.

    ``present``: numbers of the experts that are there (None: all), for what happens where some are missing.
    """

    def __init__(
        self,
        arm: Arm,
        experts: Run,
        router: Run | None = None,
        *,
        device: str = "cpu",
        present: list[int] | None = None,
    ) -> None:
        self.arm, self.device, self._present = arm, device, present
        self.archipelago = Archipelago(Parts(experts, device))
        self._router_run = router or experts
        self.config = experts.config
        plain = arm.how if _is_strategy(arm.how) else MONOLITH if arm.how == "cluster" else "full"
        own = {name: value for name, value in arm.settings.items() if name not in _NOT_SAMPLING}
        self.settings = Settings.of(self.config, strategy=plain, **own)
        self._made: CalibratedRouter | None = None

    @property
    def router(self) -> CalibratedRouter:
        if self._made is None:
            self._made = load_router(self._router_run).to(self.device)
        return self._made

    @torch.no_grad()
    def sample(self, batch: Batch) -> tuple[Tensor, Trace]:
        """Latents float32 (B, C, T, H, W), and the trace of the weights."""
        shape, trace = self.archipelago.parts.latent_shape(), Trace()
        cond = batch.cond.to(self.device)
        velocity = self.velocity(cond, shape, batch, trace)
        noise = torch.from_numpy(draws.clip_noise(list(batch.seeds), shape)).to(self.device)
        s = self.settings
        return samplers.sample(velocity, noise, cond, steps=s.steps, shift=s.shift, solver=s.solver), trace

    def velocity(self, cond: Conditioning, shape: Sequence[int], batch: Batch, trace: Trace | None = None) -> Velocity:
        """The guided velocity that the sampler follows."""
        parts, k = self.archipelago.parts, self.config.partition.k
        s = self.settings
        if self.arm.how in (MONOLITH, "cluster"):
            network = parts.expert(MONOLITH)
            if self.arm.how == "cluster":
                # As a user would, who has no cluster: k ~ p(k | text), once per clip.
                drawn = strategies.draw(strategies.text_posterior(self.router, cond, shape), batch.seeds)
                network = with_cluster(parts.denoiser(MONOLITH), torch.from_numpy(drawn))
            return Mixture([network], strategies.one_each([0] * len(cond), 1), s.guidance, s.composition, trace)
        experts = [parts.expert(str(i)) for i in range(k)]
        return Mixture(experts, self.weighting(cond, shape, batch), s.guidance, s.composition, trace)

    def weighting(self, cond: Conditioning, shape: Sequence[int], batch: Batch) -> Weighting:
        """The rule of the arm. Raises ArchipelError for one that is not known."""
        how, k, there, seeds = self.arm.how, self.config.partition.k, self._present, list(batch.seeds)
        scheduled = _SCHEDULE.fullmatch(how)
        if scheduled:
            one, two = (strategies.one_each([int(n)] * len(seeds), k) for n in scheduled.groups()[1:])
            return Switched(one, two, HIGH) if scheduled[1] == "first" else Alternating(one, two)
        if how == "tempered":
            tempered = Tempered(self.router, float(self.arm.settings["temperature"]))
            return strategies.Routed(tempered, strategies.everyone, there)
        if how == "uncalibrated":
            plain = CalibratedRouter(self.router.network, identity(np.full(k, 1 / k)), fitted=False)
            return strategies.Routed(plain, strategies.everyone, there)
        if how == "oracle":
            return strategies.one_each([int(c) for c in batch.clusters], k)
        if how == "uniform":
            return strategies.uniform(len(seeds), k, there)
        if how == "random":
            return strategies.random_expert(seeds, k, there)
        if how.startswith("expert-"):
            return strategies.one_each([int(how.removeprefix("expert-"))] * len(seeds), k)
        if how in ("ancestral", "ancestral-top1"):
            drawn = strategies.ancestral(self.router, cond, shape, seeds, there)
            if how == "ancestral":
                return drawn
            return Switched(drawn, strategies.Routed(self.router, strategies.top_k(1), there), HIGH)
        selects = {"full": strategies.everyone, "threshold": strategies.at_least(self.settings.threshold)}
        if how not in selects and not re.fullmatch(r"top\d+", how):
            raise ArchipelError(f"arm {self.arm.name!r}: {how!r} is no rule that a study knows")
        select = selects[how] if how in selects else strategies.top_k(int(how.removeprefix("top")))
        return strategies.Routed(self.router, select, there)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, T, H, W) -> clips uint8 (B, F, H, W, 3)."""
        return self.archipelago.decode(latents)


def _is_strategy(how: str) -> bool:
    """Whether ``ensemble`` itself knows the rule by this name."""
    return bool(re.fullmatch(r"top\d+|expert-\d+", how)) or how in _STRATEGIES


def experts_called(arm: Arm, k: int) -> float:
    """Expert calls per evaluation and guidance branch: what sampling costs; an upper bound for ``threshold``."""
    if arm.how in ("full", "tempered", "uncalibrated", "threshold", "uniform"):
        return float(k)
    return float(min(int(arm.how.removeprefix("top")), k)) if re.fullmatch(r"top\d+", arm.how) else 1.0


def asks_router(arm: Arm) -> str:
    """How often a router is asked: "steps" (at each evaluation), "once" (before the first one), or "" (never)."""
    if arm.how in ("full", "tempered", "uncalibrated", "threshold") or re.fullmatch(r"top\d+", arm.how):
        return "steps"
    if arm.how == "ancestral-top1":
        return "half"
    return "once" if arm.how in ("ancestral", "cluster") else ""


def arm_of(values: Mapping[str, Any]) -> Arm:
    """An ``Arm`` back from plan.json."""
    return Arm(**{**values, "sets": tuple(values["sets"]), "settings": dict(values["settings"])})
