"""What a person asks for, checked before any work: how to sample, the names of strategies, prompts and seeds."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from archipel.config import STRATEGIES, RunConfig
from archipel.ensemble import strategies
from archipel.ensemble.guidance import COMPOSITIONS, Composition
from archipel.errors import ArchipelError
from archipel.flow import samplers

MAX_PROMPT = 2000  # characters; what does not fit the text encoder's tokens below that is cut with a warning
MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
CONTROLS = ("uniform", "random", "expert-0")  # beside the strategies of run.toml; top3, ..., expert-1, ... as well


@dataclass(frozen=True)
class Settings:
    """How to sample, checked. ``of`` fills what is not given from ``[sample]`` of run.toml.

    router_every, router_until: ask the router at every n-th step only, and about a clip no more once its likeliest expert has
    reached this probability (see ``sparing``); off as they stand here. They concern strategies that ask it at every step.
    """

    strategy: str
    steps: int
    guidance: float
    solver: str
    shift: float
    composition: Composition
    threshold: float
    router_every: int = 1
    router_until: float | None = None

    @classmethod
    def of(cls, config: RunConfig, **given: object) -> Settings:
        """Raises ArchipelError naming the value that cannot be used."""
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ArchipelError(f"{unknown[0]} is not a sampling setting: {', '.join(cls.__dataclass_fields__)}")
        values = {
            name: given[name] if given.get(name) is not None else getattr(config.sample, name, about.default)
            for name, about in cls.__dataclass_fields__.items()
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
        every, until = self.router_every, self.router_until
        if not isinstance(every, int) or not 1 <= every <= MAX_STEPS:
            raise ArchipelError(
                f"router_every = {every} cannot be used: give a whole number from 1 (off) to {MAX_STEPS}"
            )
        if until is not None and not 0 < until < 1:
            raise ArchipelError(f"router_until = {until} cannot be used: give a probability between 0 and 1")


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


def first_seed(seed: int | None, seeds: Sequence[int] | int | None) -> Sequence[int] | int | None:
    """``seed`` is the first of s, s + 1, ...; ``seeds`` may be one each. Raises ArchipelError where both are given."""
    if seed is not None and seeds is not None:
        raise ArchipelError("give seed (the first of s, s + 1, ...) or seeds (one each), not both")
    return seeds if seed is None else seed


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


def check_clusters(kind: str, strategy: str, clusters: Sequence[int] | None, clips: int, k: int) -> None:
    """Raise ArchipelError where the oracle has not one cluster per clip, or another strategy was given clusters."""
    if kind == "oracle":
        if clusters is None:
            raise ArchipelError(
                "strategy = 'oracle' needs each clip's true cluster (clusters=...): "
                "from a prompt alone use top1, ancestral or full"
            )
        if len(clusters) != clips:
            raise ArchipelError(f"{len(clusters)} clusters were given for {clips} prompts")
        strategies.one_each(list(clusters), k)
    elif clusters is not None:
        raise ArchipelError(f"clusters are for strategy = 'oracle', not for {strategy!r}")
