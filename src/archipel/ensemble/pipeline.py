"""From prompts to clips: a run's text encoder, router, experts and codec behind one ``generate``.

Everything is loaded when it is first needed, so generating with the monolith reads neither experts nor router.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from archipel.config import STRATEGIES, RunConfig
from archipel.contracts import Codec, Conditioning, Posterior, TextEncoder, Velocity
from archipel.ensemble import strategies
from archipel.ensemble.guidance import COMPOSITIONS, Composition
from archipel.errors import ArchipelError, MissingStageError
from archipel.flow import draws, samplers
from archipel.run import MONOLITH, ROUTER, Run

logger = logging.getLogger("archipel")
MAX_PROMPT = 2000  # characters; what does not fit the text encoder's tokens below that is cut with a warning
MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
CONTROLS = ("uniform", "random", "expert-0")  # beside the strategies of run.toml; top3, ..., expert-1, ... as well


class Parts:
    """What a run trained and fitted, loaded on demand. A missing part names the command that makes it."""

    def __init__(self, run: Run, device: str = "cpu") -> None:
        self.run, self.device = run, device
        self._denoiser = lru_cache(maxsize=None)(self._load_denoiser)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @cached_property
    def codec(self) -> Codec:
        from archipel.encoders.codecs import load_codec

        self.run.need(self.run.codec, "prepare")
        return cast(Codec, load_codec(self.run.codec))

    @cached_property
    def text(self) -> TextEncoder:
        from archipel.encoders.text import open_text

        return open_text(self.config.text)

    @cached_property
    def router(self) -> Posterior:
        from archipel.routing.router import load_router

        return load_router(self.run).to(self.device)

    def expert(self, name: str) -> Velocity:
        """An expert or the monolith; loaded when it is first called."""

        def velocity(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return self._denoiser(name)(x, t, cond)

        return velocity

    def _load_denoiser(self, name: str) -> Velocity:
        from archipel.backbones.flux import load_denoiser

        self.check([name])
        return cast(Velocity, load_denoiser(self.run.expert(name)).eval().to(self.device))

    def check(self, names: Sequence[str]) -> None:
        """Raise MissingStageError naming every one of ``names`` that is not trained, and how to train it."""
        missing = [name for name in names if not self.run.done(self.run.expert(name))]
        if missing:
            commands = "; ".join(
                f"`archipel route {self.run.root}`" if n == ROUTER else f"`archipel train {self.run.root} {n}`"
                for n in missing
            )
            raise MissingStageError(f"not trained yet in {self.run.root}: {', '.join(missing)}: run {commands} first")
        if ROUTER in names:
            from archipel.routing.router import read_calibration

            if read_calibration(self.run) is None:
                raise MissingStageError(
                    f"the router of {self.run.root} is not calibrated: run `archipel route {self.run.root}` first"
                )

    def latent_shape(self) -> tuple[int, int, int, int]:
        clips = self.config.clips
        return self.codec.latent_shape(clips.frames, clips.size, clips.size)


@dataclass(frozen=True)
class Settings:
    """How to sample, checked. ``of`` fills what is not given from ``[sample]`` of run.toml."""

    strategy: str
    steps: int
    guidance: float
    solver: str
    shift: float
    composition: Composition
    threshold: float

    @classmethod
    def of(cls, config: RunConfig, **given: object) -> Settings:
        """Raises ArchipelError naming the value that cannot be used."""
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ArchipelError(f"{unknown[0]} is not a sampling setting: {', '.join(cls.__dataclass_fields__)}")
        values = {
            name: given[name] if given.get(name) is not None else getattr(config.sample, name)
            for name in cls.__dataclass_fields__
        }
        settings = cls(**values)  # type: ignore[arg-type]
        settings._check(config.partition.k)
        return settings

    def _check(self, k: int) -> None:
        parse_strategy(self.strategy, k)
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise ArchipelError(f"steps = {self.steps} cannot be used: give a whole number from 1 to {MAX_STEPS}")
        if not (math.isfinite(self.guidance) and 0 <= self.guidance <= MAX_GUIDANCE):
            raise ArchipelError(
                f"guidance = {self.guidance} cannot be used: give a number from 0 to {MAX_GUIDANCE:g}; 1 is off"
            )
        if self.solver not in samplers.SOLVERS:
            raise ArchipelError(f"solver = {self.solver!r} is not known: {' or '.join(samplers.SOLVERS)}")
        if self.composition not in COMPOSITIONS:
            raise ArchipelError(f"composition = {self.composition!r} is not known: {' or '.join(COMPOSITIONS)}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ArchipelError(f"shift = {self.shift} cannot be used: give a number above 0; 1 is off")
        if not 0 < self.threshold < 1:
            raise ArchipelError(f"threshold = {self.threshold} cannot be used: give a number between 0 and 1")


def parse_strategy(name: str, k: int) -> tuple[str, int]:
    """``top3`` -> ("top", 3), ``expert-1`` -> ("expert", 1), ``full`` -> ("full", 0).

    Raises ArchipelError for a strategy that is not known (naming the nearest) or not possible with ``k`` experts.
    """
    numbered = re.fullmatch(r"(top|expert-)(\d{1,4})", name)
    if numbered:
        kind, number = numbered[1].rstrip("-"), int(numbered[2])
        if kind == "top" and not 1 <= number <= k:
            raise ArchipelError(
                f"strategy = {name!r} asks for {number} experts, but this run has {k}: top1 to top{k} work"
            )
        if kind == "expert" and number >= k:
            raise ArchipelError(f"strategy = {name!r}: this run has experts 0 to {k - 1}")
        return kind, number
    plain = (*STRATEGIES, *CONTROLS)
    if name not in plain:
        near = difflib.get_close_matches(name, plain, n=1, cutoff=0.3)
        raise ArchipelError(
            f"strategy = {name!r} is not known"
            + (f"; the nearest is {near[0]!r}" if near else "")
            + f" (there are {', '.join(plain)})"
        )
    return name, 0


@dataclass(frozen=True)
class Generated:
    """Clips uint8 (N, F, H, W, 3), frames per second, and how they came about.

    weights: float32 (N, S, K), the share of each expert at the beginning of each step; None for the monolith.
    expert_rows: rows that went through an expert, both guidance branches counted: the cost of sampling.
    """

    clips: np.ndarray
    fps: float
    prompts: list[str]
    seeds: list[int]
    settings: Settings
    weights: np.ndarray | None = None
    expert_rows: int = 0
    warnings: list[str] = field(default_factory=list)


class Archipelago:
    """A trained run that generates: ``Archipelago.load("runs/emoji").generate(["a red ball bounces"])``."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> Archipelago:
        """Open a run's folder; reads ``run.toml`` only. Raises ArchipelError where there is no run."""
        return cls(Parts(Run.open(folder), device))

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        strategy: str | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        seeds: Sequence[int] | int | None = None,
        solver: str | None = None,
        shift: float | None = None,
        composition: str | None = None,
        threshold: float | None = None,
        clusters: Sequence[int] | None = None,
        batch: int = 16,
        on_step: samplers.OnStep | None = None,
    ) -> Generated:
        """Clips for ``prompts``, one each. What is not given comes from ``[sample]`` of run.toml.

        seeds: one per prompt, or one number s for s, s + 1, ... (default 0). A clip's noise (and its draws) are
        functions of its seed only, so they do not depend on its batch mates; the rest of the arithmetic may differ in
        the last bits between batch sizes. Same prompts, seeds, batch, build and threads: same bytes.
        clusters: for ``oracle``, each clip's cluster. batch: clips at a time. on_step(i, n, x, t): see samplers.
        Raises ArchipelError naming what cannot be used, MissingStageError naming what has to be trained first.
        """
        if batch < 1:
            raise ArchipelError(f"batch = {batch} cannot be used: give 1 or more")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_prompts(prompts)
        numbers = check_seeds(seeds, len(prompts))
        given = {"strategy": strategy, "guidance": guidance, "steps": steps, "solver": solver, "shift": shift}
        settings = Settings.of(self.config, **given, composition=composition, threshold=threshold)
        self.check(settings, clusters, len(prompts))
        cond, warnings = self.encode(prompts)
        pieces, traces, rows = [], [], 0
        for begin in range(0, len(prompts), batch):
            part = slice(begin, begin + batch)
            own = None if clusters is None else list(clusters)[part]
            latents, trace = self.sample(settings, cond[part], numbers[part], clusters=own, on_step=on_step)
            pieces.append(self.decode(latents))
            traces.append(trace.per_step(settings.solver))
            rows += sum(trace.rows.values())
        weights = None if settings.strategy == MONOLITH else np.concatenate(traces)
        fps = self.config.clips.fps
        return Generated(np.concatenate(pieces), fps, prompts, numbers, settings, weights, rows, warnings)

    def check(self, settings: Settings, clusters: Sequence[int] | None, clips: int) -> None:
        """Refuse, before any work, what cannot be done: untrained parts, an oracle without its clusters."""
        kind, number = parse_strategy(settings.strategy, self.config.partition.k)
        experts = [str(k) for k in range(self.config.partition.k)]
        if kind == "oracle":
            if clusters is None:
                raise ArchipelError(
                    "strategy = 'oracle' needs each clip's true cluster (clusters=...): "
                    "from a prompt alone use top1, ancestral or full"
                )
            if len(clusters) != clips:
                raise ArchipelError(f"{len(clusters)} clusters were given for {clips} prompts")
            strategies.one_each(list(clusters), len(experts))
            experts = sorted({str(int(c)) for c in clusters})
        elif clusters is not None:
            raise ArchipelError(f"clusters are for strategy = 'oracle', not for {settings.strategy!r}")
        alone = {MONOLITH: [MONOLITH], "expert": [f"{number}"]}
        needs_router = kind not in (MONOLITH, "expert", "oracle", "uniform", "random")
        self.parts.check(alone.get(kind, experts) + ([ROUTER] if needs_router else []))

    def encode(self, prompts: Sequence[str]) -> tuple[Conditioning, list[str]]:
        """Prompts -> Conditioning of N rows, and a warning per prompt that is longer than the text encoder takes."""
        text = self.parts.text
        truncated: Callable[[list[str]], list[int]] = getattr(text, "truncated", lambda _: [])
        warnings = [
            f"prompt {row + 1} of {len(prompts)} is longer than the {text.tokens} tokens that this run's text encoder takes: "
            f"only its first {text.tokens} tokens were used ({prompts[row][:40]!r}...)"
            for row in truncated(list(prompts))
        ]
        for warning in warnings:
            logger.warning(warning)
        return text.encode(list(prompts)), warnings

    def sample(
        self,
        settings: Settings,
        cond: Conditioning,
        seeds: Sequence[int],
        *,
        clusters: Sequence[int] | None = None,
        on_step: samplers.OnStep | None = None,
    ) -> tuple[Tensor, strategies.Trace]:
        """Latents float32 (B, C, T, H, W) of one batch, and the trace of its weights."""
        shape = self.parts.latent_shape()
        trace = strategies.Trace()
        cond = cond.to(self.parts.device)
        with torch.no_grad():
            velocity = self.velocity(settings, cond, shape, seeds, clusters, trace)
            noise = torch.from_numpy(draws.clip_noise(seeds, shape)).to(self.parts.device)
            latents = samplers.sample(
                velocity,
                noise,
                cond,
                steps=settings.steps,
                shift=settings.shift,
                solver=settings.solver,
                on_step=on_step,
            )
        return latents, trace

    def velocity(
        self,
        settings: Settings,
        cond: Conditioning,
        shape: Sequence[int],
        seeds: Sequence[int],
        clusters: Sequence[int] | None = None,
        trace: strategies.Trace | None = None,
    ) -> Velocity:
        """The guided velocity of one batch under a strategy: what the sampler follows."""
        k = self.config.partition.k
        kind, number = parse_strategy(settings.strategy, k)
        experts = [self.parts.expert(MONOLITH)] if kind == MONOLITH else [self.parts.expert(str(i)) for i in range(k)]
        weighting: strategies.Weighting
        if kind == "top":
            weighting = strategies.Routed(self.parts.router, strategies.top_k(number))
        elif kind == "full":
            weighting = strategies.Routed(self.parts.router, strategies.everyone)
        elif kind == "threshold":
            weighting = strategies.Routed(self.parts.router, strategies.at_least(settings.threshold))
        elif kind == "ancestral":
            weighting = strategies.ancestral(self.parts.router, cond, shape, seeds)
        elif kind == "oracle":
            weighting = strategies.one_each(list(clusters or []), k)
        elif kind == "random":
            weighting = strategies.random_expert(seeds, k)
        elif kind == "uniform":
            weighting = strategies.uniform(len(seeds), k)
        else:  # the monolith is an ensemble of one; expert-k is one of the ensemble
            weighting = strategies.one_each([number] * len(seeds), len(experts))
        return strategies.Mixture(experts, weighting, settings.guidance, settings.composition, trace)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, T, H, W) -> clips uint8 (B, F, H, W, 3)."""
        from archipel.encoders.codecs import to_uint8

        if not bool(torch.isfinite(latents).all()):
            raise ArchipelError(
                "sampling gave numbers that are not finite: use more steps or less guidance, or train on"
            )
        with torch.no_grad():
            return to_uint8(self.parts.codec.decode(latents.cpu()))


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ArchipelError where there is no prompt, or one is empty, not text, or far too long."""
    if not prompts:
        raise ArchipelError("no prompt was given: say what the clip shall show, for example 'a red ball bounces'")
    for number, prompt in enumerate(prompts, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not isinstance(prompt, str) or not prompt.strip():
            raise ArchipelError(f"{which} is empty: say what the clip shall show, for example 'a red ball bounces'")
        if len(prompt) > MAX_PROMPT:
            raise ArchipelError(
                f"{which} has {len(prompt)} characters, at most {MAX_PROMPT} are taken: shorten it to a caption"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ArchipelError(f"{which} holds characters that are not text ({error.reason})") from error


def check_seeds(seeds: Sequence[int] | int | None, count: int) -> list[int]:
    """One seed per prompt: s means s, s + 1, ...; None means 0, 1, .... Raises ArchipelError where one is unusable."""
    first = 0 if seeds is None else seeds
    numbers = [first + i for i in range(count)] if isinstance(first, int) else [int(seed) for seed in first]
    if len(numbers) != count:
        raise ArchipelError(
            f"{len(numbers)} seeds were given for {count} prompts: give one each, or a single first seed"
        )
    wrong = [seed for seed in numbers if not 0 <= seed < 2**63]
    if wrong:
        raise ArchipelError(f"seed = {wrong[0]} cannot be used: give a whole number from 0 to {2**63 - 1}")
    return numbers
