"""From kept files to the table: every prompt set scored, the baseline chosen, the archipelago compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archipel import FORMAT, cache, store
from archipel.config import FEATURE_NETWORK
from archipel.errors import ArchipelError
from archipel.evaluation.inputs import REVERSED, STATIC, probe_extractors
from archipel.evaluation.intervals import Interval
from archipel.evaluation.verdicts import crossing
from archipel.manifest import Clip, read_manifest, rows_of
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run
from archipel.study import comparing, sampling, statistics
from archipel.study.members import Members, folder
from archipel.study.plan import MIXED, TEST, TRAIN, VALIDATION
from archipel.study.prompts import Prompts, data_seed, there_are
from archipel.study.sampling import CODEC, JudgeSpec, Kept, read_kept, reference_path, sample_path
from archipel.study.scores import PromptSet, StudyData, Table, table

BASELINES = (MONOLITH, "small-batch")


class _BySeed(Mapping[int, Mapping[str, np.ndarray]]):
    """Features (or scalars) of an arm by seed, read from its files when asked for."""

    def __init__(self, paths: Mapping[int, Path], part: Callable[[Kept], dict[str, np.ndarray]]) -> None:
        self._paths, self._part = paths, part

    def __getitem__(self, seed: int) -> Mapping[str, np.ndarray]:
        return self._part(read_kept(self._paths[seed]))

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@dataclass(frozen=True)
class MixedScores:
    """Probe scores of clips of mixed captions: per arm the cosine with the whole caption, its subject, its action."""

    of: Callable[[str], tuple[Interval, Interval, Interval]]
    whole: Callable[[str], np.ndarray]
    groups: np.ndarray

    def __call__(self, arm: str) -> tuple[Interval, Interval, Interval]:
        return self.of(arm)

    def gap(self, arm: str, other: str) -> Interval:
        """Whole caption, arm less other, paired over captions and seeds; the interval covers content groups and seeds."""
        return over_seeds(self.whole(arm) - self.whole(other), self.groups)


@dataclass(frozen=True)
class Result:
    """A scored study. rows: of table.json; extra: baseline, comparisons, copying and paired values for study.json."""

    members: Members
    tables: dict[str, Table]
    sets: dict[str, Prompts]
    rows: list[dict[str, Any]]
    extra: dict[str, Any]
    notes: list[str]
    said: list[str]

    @property
    def baseline(self) -> str:
        """The monolith that the archipelago is compared with: ``monolith`` or ``small-batch``."""
        return str(self.extra["baseline"]["chosen"])

    def interval(self, prompts: str, arm: str, metric: str) -> Interval | None:
        """A score, or None where it was not measured."""
        found = self.tables[prompts].scores.get((arm, metric)) if prompts in self.tables else None
        return None if found is None else found.interval

    def common(self, prompts: str, arms: Sequence[str], metric: str) -> dict[str, Interval]:
        """Scores of several arms over the seeds that all of them have, so that none has more luck than another."""
        scores = self.tables[prompts].scores if prompts in self.tables else {}
        found = {arm: scores[arm, metric] for arm in arms if (arm, metric) in scores}
        seeds = [set(one.seeds) for one in found.values() if one.seeds]
        shared = tuple(sorted(set.intersection(*seeds))) if seeds else ()
        return {arm: one.over(shared).interval for arm, one in found.items()} if shared else {}

    def difference(self, prompts: str, arm: str, other: str, metric: str) -> Interval | None:
        """arm - other, paired over content groups and the seeds that both have."""
        return comparing.difference(self.tables[prompts].scores, metric, arm, other)

    def ratio(self, prompts: str, arm: str, other: str, metric: str) -> Interval | None:
        """arm / other, paired; None where the lower bound of other is not above 0."""
        return comparing.ratio(self.tables[prompts].scores, metric, arm, other)

    def per_seed(self, prompts: str, arm: str, metric: str) -> dict[int, float]:
        found = self.tables[prompts].scores.get((arm, metric))
        if found is None or found.estimate is None:
            return {}
        return dict(zip(found.seeds, found.estimate.values.tolist(), strict=True))

    @property
    def probe_withheld(self) -> str:
        return str(self.tables[TEST].facts.get("probe", {}).get("reason", ""))

    def similarity(self, prompts: str) -> Callable[[str, int], np.ndarray] | None:
        """(arm, seed) -> the text-video probe's cosine of each clip with its caption (N,); None where it is withheld."""
        bench, run = self.tables[prompts].bench, self.members.run
        if bench is None or self.probe_withheld:
            return None

        def of(arm: str, seed: int) -> np.ndarray:
            values = bench.similarity(read_kept(sample_path(run, prompts, seed, arm)).features)
            assert values is not None  # the probe is not withheld
            return values

        return of

    def parts(self, prompts: str) -> MixedScores | None:
        """Scores of mixed captions by the probe of the test set; None where that is withheld."""
        bench, run = self.tables[TEST].bench, self.members.run
        if bench is None or bench.probe is None:
            return None
        probe, mixed = bench.probe.fitted, self.sets[prompts]
        cond = mixed.cond(run).pooled.numpy()
        from archipel.encoders.text import open_text

        encoder = open_text(run.config.text, run.text)
        texts = [cond, *(encoder.encode([pair[i] for pair in mixed.parts]).pooled.numpy() for i in (0, 1))]
        targets = [probe.captions(text) for text in texts]
        _, groups = np.unique(mixed.groups, return_inverse=True)

        def cosines(arm: str) -> np.ndarray:
            found = []
            for seed in range(self.members.plan.arm(arm).seeds):
                features = read_kept(sample_path(run, prompts, seed, arm)).features
                shown = probe(bench.join(features))
                found.append([(shown * target).sum(1) for target in targets])
            return np.array(found)  # (S, 3, N)

        def of(arm: str) -> tuple[Interval, Interval, Interval]:
            values = cosines(arm)
            one, two, three = (over_seeds(values[:, i], groups) for i in range(3))
            return one, two, three

        return MixedScores(of, lambda arm: cosines(arm)[:, 0], groups)


def over_seeds(values: np.ndarray, groups: np.ndarray) -> Interval:
    """The mean of values (S, N), clips of S seeds in content groups (N,), with its interval over groups and seeds."""
    left = np.stack([statistics.leave_out(one, groups) for one in values])
    return statistics.mean_interval(statistics.Estimate(left, tuple(range(len(values)))))


def score(members: Members, judges: JudgeSpec, stop: StopFlag) -> Result:
    """Score all prompt sets of a sampled study. The baseline is chosen on validation, before test scores are compared.

    Raises Stopped between arms.
    """
    run = members.run
    sets = {name: Prompts.of(run, name) for name in there_are(run)}
    if any(MIXED in arm.sets for arm in members.plan.arms):
        sets[MIXED] = Prompts.of(run, MIXED)
    tables = {VALIDATION: table_of(members, judges, sets[VALIDATION], stop)}
    chosen = _baseline(members, tables[VALIDATION])  # settled before a test clip is scored
    tables |= {name: table_of(members, judges, sets[name], stop) for name in (TEST, TRAIN)}
    crossed = crossing(run.config)
    metric = run.config.evaluate.primary
    arm = members.plan.primary
    circles = comparing.same_as_partition(judges.open(run).features, FEATURE_NETWORK.get(run.config.partition.features))
    if run.config.partition.features == "text":  # what the probe is fitted to
        circles.append(comparing.PROBE)
    if run.config.partition.method == "random":
        circles = []
    compared, copying, paired = [], {}, []
    for name in (TEST, TRAIN):
        if name not in tables:
            continue
        scores = tables[name].scores
        copying[name] = comparing.copying(scores, arm, chosen["chosen"])
        # Training captions cannot say whether clips are copies: test captions speak for them as well.
        copied = copying.get(TEST, copying[name])["grew"]
        compared += comparing.comparisons(scores, arm, chosen["chosen"], primary=metric, circles=circles, copied=copied)
        points = comparing.per_seed(scores, metric, arm, chosen["chosen"])
        paired.append({"set": name, "metric": metric, "arm": arm, "baseline": chosen["chosen"], "points": points})
    headline = [one["verdict"] for one in compared if one["primary"] and one["set"] == TEST]
    facts = {name: {k: v for k, v in one.facts.items() if k != "notes"} for name, one in tables.items()}
    extra = {
        "baseline": chosen, "comparisons": compared, "copying": copying, "paired": paired, "facts": facts, "extractors": crossed,
    }  # fmt: skip
    notes = [note for one in tables.values() for note in one.facts.get("notes", [])]
    rows = [_marked(members, row) for name in (TEST, TRAIN, VALIDATION) for row in tables[name].rows]
    return Result(members, tables, sets, rows, extra, list(dict.fromkeys(notes)), [*headline, chosen["verdict"]])


def _baseline(members: Members, validation: Table) -> dict[str, Any]:
    """The better monolith on validation captions. The first choice stands: more seeds are told, but do not turn it over
    after test clips were scored. Every look at the test split is counted in RUN/study/baseline.json."""
    path, metric = folder(members.run) / "baseline.json", members.run.config.evaluate.primary
    now = comparing.better_baseline(validation.scores, BASELINES, metric)
    kept = store.read_json(path) if path.is_file() else {}
    if kept.get("metric") != metric or kept.get("chosen") not in BASELINES:
        kept = {"format": FORMAT, "chosen": now["chosen"], "metric": metric, "verdict": now["verdict"], "looks": []}
    if members.plan.seeds not in kept["looks"]:
        kept["looks"].append(members.plan.seeds)
        store.write_json(path, kept)
    said = now["verdict"]
    if now["chosen"] != kept["chosen"]:
        said = f"{kept['chosen']} was chosen on {kept['looks'][0]} seeds and stands; by now {said}"
    return {**now, "chosen": kept["chosen"], "verdict": said, "looks": kept["looks"]}


def _marked(members: Members, row: dict[str, Any]) -> dict[str, Any]:
    """A row with "circle" where the arm's own clusters were made by the network that judges it."""
    arm = next((one for one in members.plan.arms if one.name == row["arm"]), None)
    if arm is None or arm.how in (MONOLITH, "cluster"):
        return row
    part = members.of(arm.member, 0).config.partition
    network = FEATURE_NETWORK.get(part.features)
    extractor = str(row["protocol"].get("extractor", ""))
    seen = comparing.same_as_partition([extractor], network) if network else []
    circle = part.method == "kmeans" and (bool(seen) or (part.features == "text" and row["metric"] == comparing.PROBE))
    return {**row, "circle": True} if circle else row


def table_of(members: Members, judges: JudgeSpec, prompts: Prompts, stop: StopFlag) -> Table:
    """One prompt set scored."""
    run = members.run
    clips = read_manifest(run.manifest)
    seed = data_seed(run)
    judge = judges.open(run)
    chosen = PromptSet.of(prompts.name, prompts.split, prompts.rows, clips, prompts.digest, seed)
    part = crossing_extractor(run, judge.features)
    probed = [name for name in probe_extractors(run) if name in judge.features]
    return table(
        chosen,
        _data(members, prompts, chosen, clips),
        judge.identity,
        primary=part,
        probed=probed,
        pca=run.config.evaluate.pca,
        seed=seed,
        stop=stop,
    )


def crossing_extractor(run: Run, names: Sequence[str]) -> str:
    """The extractor of the primary metric. Raises ArchipelError where the judges have none of that name."""
    primary = run.config.evaluate.primary
    found = next((name for name in names if primary.endswith(name)), None)
    if found is None:
        raise ArchipelError(f"evaluate.primary = {primary!r}, and the judges are {', '.join(names)}")
    return found


def _data(members: Members, prompts: Prompts, chosen: PromptSet, clips: list[Clip]) -> StudyData:
    run = members.run
    real = read_kept(reference_path(run))
    codec = read_kept(reference_path(run, CODEC))
    place = {int(row): index for index, row in enumerate(codec.scalars["row"])}
    pick = np.array([place[int(row)] for row in prompts.rows])
    features: dict[str, Mapping[int, Mapping[str, np.ndarray]]] = {
        CODEC: {0: {name: table[pick] for name, table in codec.features.items()}}
    }
    scalars: dict[str, Mapping[int, Mapping[str, np.ndarray]]] = {CODEC: {0: _measures(codec, pick)}}
    for arm in members.plan.arms:
        if prompts.name in arm.sets:
            paths = {seed: sample_path(run, prompts.name, seed, arm.name) for seed in range(arm.seeds)}
            features[arm.name] = _BySeed(paths, lambda kept: kept.features)
            scalars[arm.name] = _BySeed(paths, lambda kept: kept.scalars)
    window = run.config.clips.model_dump(mode="json", include={"frames", "fps", "start", "size", "crop", "background"})
    identity = store.sha256_json({"clips": [clips[row].sha256 for row in chosen.reference], "window": window})
    return StudyData(
        features=features,
        scalars=scalars,
        real=real.features,
        train=np.array(rows_of(clips, "train"), np.int64),
        real_scalars=_measures(real, np.arange(len(clips))),
        groups=np.array([clip.group for clip in clips]),
        text=np.asarray(cache.open_kind(run.cache, "text")["pooled"][:]),
        changed=_changed(run) if prompts.name == TEST else {},
        identity=identity,
    )


def _measures(kept: Kept, pick: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[pick] for name, values in kept.scalars.items() if name != "row"}


def _changed(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Features of the test captions' real clips made static and reversed: what the probe must tell apart."""
    return {name: read_kept(sampling.reference_path(run, name)).features for name in (STATIC, REVERSED)}
