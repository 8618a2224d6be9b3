"""A study's table: every measure of every arm of a prompt set, with intervals over content groups and seeds.

    whole = table(prompts, data, judges.identity, primary="efficientnet-appearance", probed=["transnet"])
    store.write_json(path, whole.rows)

Rows of table.json: {"arm", "metric", "value", "low", "high", "n", "groups", "seeds", "protocol", "set", "unit"}. n: clips
of all seeds together; seeds: how many (0 for real clips and the codec, which no seed changes); bounds that could not be
computed are null. Two rows may be compared only if their protocols are equal (``evaluation.protocol.require_same``),
which name the prompt set and the seeds; arms of different seeds are compared over the common ones
(``study.comparing``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from archipel.evaluation.inputs import CODEC, REAL
from archipel.evaluation.intervals import FEW_GROUPS, Interval
from archipel.evaluation.measure import clean
from archipel.evaluation.verdicts import TOO_FEW
from archipel.partition.kmeans import one_thread
from archipel.progress import Progress, StopFlag
from archipel.study import statistics
from archipel.study.measuring import Bench, Kind, Part, PromptSet, StudyData
from archipel.study.statistics import FEW_SEEDS, Estimate

__all__ = ["Paired", "PromptSet", "Scores", "StudyData", "Table", "table"]
PCA = 32  # as evaluate.pca


@dataclass(frozen=True)
class Paired:
    """A score of one arm over seeds, with all that differences and ratios to other arms need.

    estimate: leave-out values of every seed, or None where there is nothing to pair (the floor of KID). protocol: without
    the seeds, which ``row`` adds.
    """

    arm: str
    metric: str
    estimate: Estimate | None
    interval: Interval
    n: int
    groups: int
    protocol: dict[str, Any]
    set: str
    kind: Kind = "mean"
    unit: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return () if self.estimate is None else self.estimate.seeds

    def row(self) -> dict[str, Any]:
        """The row of table.json; bounds that could not be computed are null."""
        return {
            "arm": self.arm,
            "metric": self.metric,
            **clean(self.interval),
            "n": self.n,
            "groups": self.groups,
            "seeds": len(self.seeds),
            "protocol": {**self.protocol, "seeds": list(self.seeds)},
            "set": self.set,
            "unit": self.unit,
        }

    def over(self, seeds: tuple[int, ...]) -> Paired:
        """The same score from fewer seeds."""
        if self.estimate is None or not self.seeds or seeds == self.seeds:
            return self
        per_seed = self.n // len(self.seeds)
        some = self.estimate.only(seeds)
        found = _interval(some, self.kind, per_seed * len(seeds))
        return replace(self, estimate=some, interval=found, n=per_seed * len(seeds))


Scores = Mapping[tuple[str, str], Paired]


@dataclass(frozen=True)
class Table:
    """All scores of a prompt set by (arm, metric), in the table's order, and what does not fit into rows.

    facts: "left_out", "pca", "uncorrected_excess", "probe" (withheld or not, its table of real, static and reversed clips)
    and "notes" (sentences that belong under the table). bench: the real side, for measures of single clips.
    """

    set: str
    scores: dict[tuple[str, str], Paired]
    facts: dict[str, Any] = field(default_factory=dict)
    bench: Bench | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [one.row() for one in self.scores.values()]


def table(
    prompts: PromptSet,
    data: StudyData,
    identity: Mapping[str, Mapping[str, Any]],
    *,
    primary: str,
    probed: Sequence[str] = (),
    pca: int = PCA,
    seed: int = 0,
    stop: StopFlag | None = None,
) -> Table:
    """Score every arm of ``data``: the codec first, then real clips, then the others in their order.

    identity: of the judges, ``Judges.identity``. primary: the extractor by which copying and coverage are judged. probed:
    extractors that the text-video probe reads (those that did not make the partition). pca: ``evaluate.pca``. seed: of
    halves and folds, the same for every arm. Features are looked at one arm and seed at a time.
    Raises ArchipelError for features or scalars that do not fit the prompts, Stopped between arms where ``stop`` is set.
    """
    names = [name for name in dict.fromkeys([CODEC, *data.features]) if name in data.features and name != REAL]
    scores: dict[tuple[str, str], Paired] = {}
    # On one thread: the numbers do not depend on the machine's cores, and small matrices are no faster on more.
    with one_thread(), Progress(f"study: scores, {prompts.name}", len(names) + 1) as bar:
        bench = Bench(prompts, data, identity, copying=primary, probed=probed, pca=pca, seed=seed)
        for name in [*names[: names[:1] == [CODEC]], REAL, *(one for one in names if one != CODEC)]:
            if stop:
                raise stop.error("the study")
            found = _real(bench, prompts, data) if name == REAL else _arm(bench, prompts, data, name)
            scores |= {(one.arm, one.metric): one for one in found}
            bar.advance(note=name)
    bench.facts["notes"] = _notes(prompts, data, bench, scores)
    return Table(prompts.name, scores, bench.facts, bench)


def _arm(bench: Bench, prompts: PromptSet, data: StudyData, name: str) -> list[Paired]:
    gathered: dict[str, list[Part]] = {}
    seeds = tuple(sorted(data.features[name]))[: 1 if name == CODEC else None]
    for seed in seeds:
        scalars = data.scalars.get(name, {}).get(seed, {})
        for part in [*bench.parts(name, seed, data.features[name][seed]), *bench.scalar_parts(name, seed, scalars)]:
            gathered.setdefault(part.metric, []).append(part)
    found = []
    for metric, parts in gathered.items():
        if not np.isfinite(parts[0].left[0]):
            bench.facts["left_out"].append(f"{metric} of {name}: too few clips or content groups")
            continue
        if len(parts) < len(seeds):
            bench.facts["left_out"].append(f"{metric} of {name}: only {len(parts)} of {len(seeds)} seeds have it")
            continue
        found.append(_paired(prompts, name, parts, () if name == CODEC else seeds))
        if parts[0].kind == "excess":
            plain = float(np.mean([part.left[0] for part in parts]))
            bench.facts["uncorrected_excess"].setdefault(metric.removeprefix("excess-"), {})[name] = plain
    return found


def _real(bench: Bench, prompts: PromptSet, data: StudyData) -> list[Paired]:
    """Real clips: their distances are the floors; by the other measures they are scored like an arm that no seed changes."""
    found = []
    for part, interval in bench.floors():
        one = _paired(prompts, REAL, [part], ())
        found.append(one if interval is None else replace(one, estimate=None, interval=interval))
    features = {name: np.asarray(rows[prompts.rows]) for name, rows in data.real.items()}
    scalars = {name: np.asarray(values[prompts.rows]) for name, values in data.real_scalars.items()}
    parts = [*bench.clip_parts(features), *bench.scalar_parts(REAL, 0, scalars)]
    return found + [_paired(prompts, REAL, [part], ()) for part in parts]


def _paired(prompts: PromptSet, arm: str, parts: Sequence[Part], seeds: tuple[int, ...]) -> Paired:
    one = parts[0]
    estimate = Estimate(np.stack([part.left for part in parts]), seeds, one.kind == "excess")
    n = sum(part.n for part in parts)
    found = _interval(estimate, one.kind, n)
    return Paired(arm, one.metric, estimate, found, n, one.groups, one.protocol, prompts.name, one.kind, one.unit)


def _interval(estimate: Estimate, kind: Kind, clips: int) -> Interval:
    if kind == "share":
        return statistics.share_interval(estimate, clips)
    found = statistics.mean_interval(estimate)
    if kind == "raw" and found.low < 0:  # a Frechet distance is not negative
        return Interval(found.value, 0.0, found.high)
    return found


# --- notes -----------------------------------------------------------------------------------------------------------


def _notes(prompts: PromptSet, data: StudyData, bench: Bench, scores: Scores) -> list[str]:
    """Sentences that belong under the table."""
    said = []
    if prompts.groups < FEW_GROUPS:
        said.append(f"{TOO_FEW}: {prompts.groups} content groups, at least {FEW_GROUPS} are needed")
    for name, pca in bench.facts["pca"].items():
        if pca["dims"] < pca["asked"]:
            said.append(
                f"excess-{bench.title(name)}: {pca['dims']} PCA dimensions instead of {pca['asked']}, which is what "
                f"{len(data.train)} training clips and {len(bench.passes[0])} captions support"
            )
    by_seeds = _by_seeds(scores.values())
    if by_seeds.get(1):
        said.append(f"one seed, so that the interval covers content groups alone: {', '.join(by_seeds[1])}")
    for count in range(2, FEW_SEEDS):
        if by_seeds.get(count):
            said.append(
                f"{count} seeds, of which intervals at 95 % held the truth 86 to 99 times in 100 in simulations: "
                f"{', '.join(by_seeds[count])}"
            )
    if bench.facts["probe"].get("withheld"):
        said.append(f"text-video probe withheld: {bench.facts['probe']['reason']}")
    if prompts.split == "train":
        said.append("copying is not judged on training captions: the real clips held against are training clips")
    return said + [f"left out: {one}" for one in bench.facts["left_out"]]


def _by_seeds(scores: Iterable[Paired]) -> dict[int, list[str]]:
    found: dict[int, dict[str, None]] = {}
    for one in scores:
        if one.seeds:
            found.setdefault(len(one.seeds), {})[one.arm] = None
    return {count: list(names) for count, names in found.items()}
