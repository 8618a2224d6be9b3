"""From prompts to clips: a run's text encoder, router, experts and codec behind one ``generate``.

Everything is loaded when it is first needed, so generating with the monolith reads neither experts nor router. Experts
that are missing are left out and named; those that arrive later are used from the next ``generate`` on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from archipel.contracts import Conditioning, Posterior, Velocity
from archipel.ensemble import provenance, strategies, whole
from archipel.ensemble.generated import Generated
from archipel.ensemble.images import check_given, read_frames
from archipel.ensemble.parts import Parts, open_parts
from archipel.ensemble.safety import settled
from archipel.ensemble.settings import (
    MAX_PROMPT,
    Settings,
    check_clusters,
    check_prompts,
    check_seeds,
    first_seed,
    parse_strategy,
)
from archipel.ensemble.sparing import Spared
from archipel.errors import ArchipelError, MissingStageError
from archipel.flow import draws, given, samplers
from archipel.run import DAMAGED, MONOLITH, ROUTER

if TYPE_CHECKING:
    from archipel.ensemble.images import Pictures
    from archipel.ensemble.safety import Safety

__all__ = ["MAX_PROMPT", "Archipelago", "Generated", "Lineup", "Parts", "Settings", "parse_strategy"]

logger = logging.getLogger("archipel")
_ROUTED = ("top", "full", "threshold", "ancestral")


@dataclass(frozen=True)
class Lineup:
    """Who takes part in one ``generate``: settled before it begins, and held to its end whatever arrives meanwhile.

    experts: one velocity per expert of the run (the monolith: one), each loaded at its first call; ``present``: numbers
    of those that are there, None for all; ``router``: None where none is needed or there is none.
    """

    kind: str
    number: int
    experts: list[Velocity]
    present: list[int] | None = None
    router: Posterior | None = None
    warnings: tuple[str, ...] = ()

    def without(self, lost: Mapping[int, Any]) -> Lineup:
        """For the next batch: experts that were lost are not asked again."""
        there = range(len(self.experts)) if self.present is None else self.present
        return replace(self, present=[i for i in there if i not in lost]) if lost else self


class Archipelago:
    """A trained run that generates: ``Archipelago.load("runs/emoji").generate("a red ball bounces", seed=1).save("clip.mp4")``."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config
        parts.available()  # so that ``refresh`` can tell what is new

    @classmethod
    def load(
        cls,
        where: Path | str | None = None,
        *,
        device: str = "cpu",
        run_id: str | None = None,
        memory: int | None = None,
        host: int | None = 0,
    ) -> Archipelago:
        """Open a run's folder, an exported folder, or a bucket (``s3://``, ``gs://``, ``az://``, ``file://``: admitted experts
        only); without ``where``, the model that ships with the package.

        memory: most bytes of experts, monolith, router and base on ``device`` at a time; they are read when they are needed, and
        what was used longest ago makes room. host: on a GPU, most bytes of those that made room which are kept in the host's
        memory instead of being read from disk again (None: all of them). An export is loaded whole.
        Reads ``run.toml`` and which parts there are. Raises ArchipelError where there is no run, or not ``run_id``.
        """
        return cls(open_parts(where, device, run_id=run_id, memory=memory, host=host))

    @property
    def model(self) -> str:
        """How the run is called as a model: its backbone, the number of experts, the beginning of its id."""
        return provenance.model_name(self.config, self.parts.run_id)

    def refresh(self) -> list[str]:
        """Look for parts that became available or were replaced; returns their names ("2", "router", ...).

        ``generate`` looks by itself before it begins: at a folder each time (K + 2 small files), at a bucket at most
        once in ``remote.LOOK_EVERY`` seconds; this looks at once. Weights are read at their first use.
        """
        return self.parts.refresh()

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
        image: Pictures | None = None,
        last_image: Pictures | None = None,
        batch: int = 16,
        seed: int | None = None,
        count: int = 1,
        router_every: int | None = None,
        router_until: float | None = None,
        on_step: samplers.OnStep | None = None,
        safe: Safety | bool | None = None,
    ) -> Generated:
        """Clips for ``prompts``, ``count`` of each. What is not given comes from ``[sample]`` of run.toml.

        seeds: one per clip, or one number s for s, s + 1, ... (default 0), which ``seed`` says as well. A clip's noise (and its draws) are
        functions of its seed only, so they do not depend on its batch mates; the rest of the arithmetic may differ in
        the last bits between batch sizes. Same prompts, seeds, batch, build and threads: same bytes.
        clusters: for ``oracle`` (and a monolith that is told the cluster), each clip's cluster. batch: clips at a time.
        image, last_image: a picture that each clip shall begin or end with, where the run was trained for it
        (``expert.tasks``): a path, a Pillow image or uint8 (h, w, 3), one for all clips or one each; cut as the run's
        clips are.
        router_every, router_until: ask the router less often than at every step, see ``sparing``.
        on_step(i, n, x, t): see samplers.
        safe: True or a ``Safety`` refuses prompts and pictures and withholds clips, see ``safety``; ``Generated.blocked``.
        Any non-empty set of experts will do: shares of missing ones go to the others, ``warnings`` say which.
        Raises ArchipelError naming what cannot be used, MissingStageError naming what has to be trained first.
        """
        given: dict[str, Any] = {"strategy": strategy, "guidance": guidance, "steps": steps, "solver": solver}
        given |= {"shift": shift, "composition": composition, "threshold": threshold}
        given |= {"router_every": router_every, "router_until": router_until}
        pictures = {"image": image, "last_image": last_image}
        numbers = first_seed(seed, seeds)
        return Generated.join(
            [
                *self.batches(
                    prompts, given, numbers, count, batch, clusters=clusters, on_step=on_step, safe=safe, **pictures
                )
            ]
        )

    def batches(
        self,
        prompts: Sequence[str] | str,
        given: Mapping[str, Any] | None = None,
        seeds: Sequence[int] | int | None = None,
        count: int = 1,
        batch: int = 16,
        *,
        clusters: Sequence[int] | None = None,
        image: Pictures | None = None,
        last_image: Pictures | None = None,
        on_step: samplers.OnStep | None = None,
        safe: Safety | bool | None = None,
    ) -> Iterator[Generated]:
        """What ``generate`` returns, a batch at a time as each is finished; ``given``: its settings by name.

        Everything is checked before the first batch is begun, when the first is asked for.
        """
        if batch < 1:
            raise ArchipelError(f"batch = {batch} cannot be used: give 1 or more")
        if count < 1:
            raise ArchipelError(f"count = {count} cannot be used: give 1 or more")
        prompts = [one for one in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(count)]
        check_prompts(prompts)
        numbers = check_seeds(seeds, len(prompts))
        settings = Settings.of(self.config, **(given or {}))
        check_given(self.config, image is not None, last_image is not None)
        first = read_frames(image, len(prompts), self.config.clips)
        last = read_frames(last_image, len(prompts), self.config.clips, "last_image")
        safety = settled(safe)
        if safety is not None:
            safety.check_prompts(prompts)
            safety.check_frames({"image": first, "last_image": last})
        self.parts.refresh(fresh=False)
        lineup = self.lineup(settings, clusters, len(prompts))
        cond, warnings = self.encode(prompts)
        cond = cond.given(self.given(len(prompts), first, last))
        said = [*lineup.warnings, *warnings]
        for begin in range(0, len(prompts), batch):
            part = slice(begin, begin + batch)
            own = None if clusters is None else list(clusters)[part]
            latents, trace = self.sample(
                settings, cond[part], numbers[part], clusters=own, on_step=on_step, lineup=lineup
            )
            lineup, told = lineup.without(trace.lost), trace.told(settings)
            for warning in told:
                logger.warning(warning)
            said = [*said, *told]
            made = Generated.checked(
                safety,
                self.decode(latents),
                self.config.clips.fps,
                prompts[part],
                numbers[part],
                settings,
                None if settings.strategy == MONOLITH else trace.per_step(settings.solver),
                sum(trace.rows.values()),
                said,
                trace.router_rows,
                self.model,
                self.parts.run_id,
            )
            yield replace(made, lost=[trace.steps_lost(settings)] * len(made.seeds))

    def lineup(self, settings: Settings, clusters: Sequence[int] | None, clips: int) -> Lineup:
        """Who can take part. Refuses, before any work, what cannot be done: parts without which a strategy makes no
        sense, an oracle without its clusters. Raises ArchipelError, MissingStageError."""
        k = self.config.partition.k
        kind, number = parse_strategy(settings.strategy, k)
        told = kind == MONOLITH and self.config.monolith.condition == "cluster"
        check_clusters("oracle" if told and clusters is not None else kind, settings.strategy, clusters, clips, k)
        experts = [self.parts.expert(str(i)) for i in range(k)]
        if kind == MONOLITH:
            drawn = told and clusters is None
            self.parts.check([MONOLITH, ROUTER] if drawn else [MONOLITH])
            return Lineup(kind, 0, [self.parts.expert(MONOLITH)], router=self.parts.router if drawn else None)
        if kind in ("expert", "oracle"):
            self.parts.check([f"{number}"] if kind == "expert" else sorted({str(int(c)) for c in clusters or []}))
            return Lineup(kind, number, experts)
        there = self.parts.available()
        present = [i for i in range(k) if str(i) in there]
        if not present:
            self.parts.check([str(i) for i in range(k)] + ([ROUTER] if kind in _ROUTED else []))
        for name in [str(i) for i in present if there[str(i)] == DAMAGED]:
            self.parts.source.folder(name, DAMAGED)  # says what is wrong, before any work
        warnings = [] if len(present) == k else [self._missing(present, k)]
        router: Posterior | None = None
        if kind in _ROUTED and ROUTER in there:
            router = self.parts.router
            if not getattr(router, "fitted", True):
                warnings.append(
                    "the router came without a calibration: its answers are used as they are (temperature 1)"
                )
        elif kind in _ROUTED:
            warnings.append(self._without_router(present, settings.strategy))
            kind, number = "expert", present[0]
        for warning in warnings:
            logger.warning(warning)
        return Lineup(kind, number, experts, None if len(present) == k else present, router, tuple(warnings))

    def _missing(self, present: list[int], k: int) -> str:
        absent = [str(i) for i in range(k) if i not in present]
        return (
            f"{len(absent)} of {k} experts missing: {', '.join(absent)} ({self.parts.source.how(absent)}). Their share goes "
            f"to {'expert' if len(present) == 1 else 'experts'} {', '.join(map(str, present))}; what only they know is not "
            "in these clips"
        )

    def _without_router(self, present: list[int], strategy: str) -> str:
        """What to say where one expert generates without a router; raises MissingStageError where there are several."""
        how = self.parts.source.how([ROUTER])
        if len(present) > 1:
            raise MissingStageError(
                f"strategy = {strategy!r} needs the router to choose among experts {', '.join(map(str, present))}, and "
                f"there is none that can be used in {self.parts.source.where}: {how}, or choose a strategy without "
                f"one: expert-{present[0]}, uniform, random or monolith"
            )
        return f"there is no router ({how}): expert {present[0]}, the only one there, generates alone"

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

    def given(self, clips: int, first: np.ndarray | None, last: np.ndarray | None) -> Tensor | None:
        """``Conditioning.image`` (B, C + 1, T, H, W) of frames uint8 (1 or B, H, W, 3) that ``clips`` = B clips shall begin
        and end with; None where none is given. Raises ArchipelError where the run was not trained for it."""
        task = check_given(self.config, first is not None, last is not None)
        if first is None and last is None:
            return None
        stills = [None if frames is None else self._stills(frames, clips) for frames in (first, last)]
        one, other = (still if still is not None else stills[1 - i] for i, still in enumerate(stills))
        assert one is not None and other is not None  # one of them is given, and stands in where the other is not read
        return given.condition(one, other, torch.full((clips,), task), self.parts.latent_shape()[1])

    def _stills(self, frames: np.ndarray, clips: int) -> Tensor:
        """Latents (B, C, H, W) of frames uint8 (1 or B, H, W, 3), each as a still."""
        from archipel.encoders.codecs import still_latents

        with torch.no_grad():
            parts = [
                still_latents(self.parts.codec, frames[begin : begin + 16], self.config.clips.frames)
                for begin in range(0, len(frames), 16)
            ]
        return torch.cat(parts).expand(clips, -1, -1, -1)

    def sample(
        self,
        settings: Settings,
        cond: Conditioning,
        seeds: Sequence[int],
        *,
        clusters: Sequence[int] | None = None,
        on_step: samplers.OnStep | None = None,
        lineup: Lineup | None = None,
    ) -> tuple[Tensor, strategies.Trace]:
        """Latents float32 (B, C, T, H, W) of one batch, and the trace of its weights; 0 for an expert that is missing.

        ``lineup``: who takes part (default: whoever is there now).
        """
        lineup = lineup or self.lineup(settings, clusters, len(seeds))
        shape = self.parts.latent_shape()
        trace = strategies.Trace()
        cond = cond.to(self.parts.device)
        with torch.no_grad():
            velocity = self.velocity(settings, lineup, cond, shape, seeds, clusters, trace)
            noise = torch.from_numpy(draws.clip_noise(seeds, shape)).to(self.parts.device)
            if whole.possible(velocity, settings):
                return whole.sample(velocity, noise, cond, seeds, settings, trace, on_step), trace
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
        lineup: Lineup,
        cond: Conditioning,
        shape: Sequence[int],
        seeds: Sequence[int],
        clusters: Sequence[int] | None = None,
        trace: strategies.Trace | None = None,
    ) -> strategies.Mixture:
        """The guided velocity of one batch under a strategy: what the sampler follows."""
        kind, k, present, experts = lineup.kind, len(lineup.experts), lineup.present, lineup.experts
        weighting: strategies.Weighting
        if kind == MONOLITH and self.config.monolith.condition == "cluster":
            if lineup.router:  # as whoever has a caption only: one cluster per clip, as ``ancestral`` draws it
                clusters = strategies.draw(strategies.text_posterior(lineup.router, cond, shape), seeds).tolist()
            from archipel.backbones.cluster import with_cluster

            experts = [with_cluster(experts[0], torch.tensor(list(clusters or [])), self.config.partition.k)]
            weighting = strategies.one_each([0] * len(seeds), k)
        elif kind == "ancestral" and lineup.router:
            weighting = strategies.ancestral(lineup.router, cond, shape, seeds, present)
        elif lineup.router:
            selects = {"full": strategies.everyone, "threshold": strategies.at_least(settings.threshold)}
            select = selects[kind] if kind in selects else strategies.top_k(lineup.number)
            weighting = strategies.Routed(lineup.router, select, present)
            if settings.router_every > 1 or settings.router_until is not None:
                calls = 2 if settings.solver == "heun" else 1
                weighting = Spared(weighting, settings.router_every, settings.router_until, calls)
        elif kind == "oracle":
            weighting = strategies.one_each(list(clusters or []), k)
        elif kind == "random":
            weighting = strategies.random_expert(seeds, k, present)
        elif kind == "uniform":
            weighting = strategies.uniform(len(seeds), k, present)
        else:  # the monolith is an ensemble of one; expert-k is one of the ensemble
            weighting = strategies.one_each([lineup.number] * len(seeds), k)
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
