"""From inputs to score rows: every metric of every arm, with the leave-out values that comparisons between arms need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from archipel.evaluation import copying, distances, intervals, probe, sides
from archipel.evaluation.inputs import LAYER, NETWORK, REAL, REVERSED, STATIC, Inputs, features_identity
from archipel.evaluation.intervals import Interval
from archipel.evaluation.motion import motion
from archipel.evaluation.protocol import Protocol
from archipel.evaluation.sides import CopyingSide, FrechetSide, KernelSide, ProbeSide
from archipel.manifest import rows_of


def clean(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON: what is not finite is null."""
    return {key: value if np.isfinite(value) else None for key, value in interval.as_dict().items()}


@dataclass(frozen=True)
class Score:
    """One score and its leave-out values over the evaluation's groups (empty where there are none to pair)."""

    arm: str
    metric: str
    interval: Interval
    n: int
    groups: int
    protocol: Protocol
    left: np.ndarray = field(default_factory=lambda: np.empty(0))
    correct: bool = False

    def row(self) -> dict[str, Any]:
        """The row of ``scores/<split>.json``; bounds that could not be computed are null."""
        head = {"arm": self.arm, "metric": self.metric, **clean(self.interval)}
        return {**head, "n": self.n, "groups": self.groups, "protocol": self.protocol.as_dict()}


@dataclass(frozen=True)
class Frame:
    """What all metrics share: content groups as numbers, whole passes over the captions, the run's protocol."""

    inputs: Inputs
    group: np.ndarray
    reference_group: np.ndarray
    count: int
    passes: list[np.ndarray]
    unit: np.ndarray
    plan: distances.HalfPlan | None

    @classmethod
    def of(cls, inputs: Inputs) -> Frame:
        (group, reference), count = intervals.number_groups(inputs.groups(inputs.rows), inputs.groups(inputs.reference))
        seed = inputs.run.config.run.seed
        return cls(inputs, group, reference, count, sides.caption_passes(inputs.rows), *sides.half_plan(count, seed))

    @property
    def groups(self) -> int:
        """Content groups among the generated clips: the units of chance."""
        return len(np.unique(self.group))

    def protocol(
        self, estimator: str, extractor: str = "", *, n: int = 0, reference: int = 0, pca: int = 0
    ) -> Protocol:
        config, inputs = self.inputs.run.config, self.inputs
        identity = features_identity(config.evaluate) if extractor else {}
        network = [NETWORK[name] for name in extractor.split("+")] if extractor else []
        return Protocol(
            estimator=estimator,
            extractor=extractor,
            weights="+".join(identity["weights"][name] for name in dict.fromkeys(network)) if extractor else "",
            layer="; ".join(LAYER[name] for name in extractor.split("+")) if extractor else "",
            resize=0 if not extractor else config.evaluate.image_size if "efficientnet" in network else 27,
            frames=config.evaluate.frames if "efficientnet" in network else config.clips.frames,
            n=n or len(inputs.rows),
            clips=inputs.identity,
            reference=reference,
            groups=self.groups,
            divisor=distances.DIVISOR if estimator.startswith("frechet") else "",
            split=inputs.split,
            prompts=inputs.prompts,
            pca=pca,
        )


# --- distances -------------------------------------------------------------------------------------------------------


def frechet_scores(frame: Frame, extractor: str, facts: dict[str, Any]) -> Iterator[Score]:
    """FD (raw, biased in N; arm "real" is its floor) and excess FD (bias corrected) of every arm."""
    inputs, plan = frame.inputs, frame.plan
    asked = inputs.run.config.evaluate.pca
    passed = frame.passes[0]
    if plan is None or len(inputs.train) < 3:
        facts["left_out"].append(f"FD-{extractor}: {frame.count} content groups are too few for two halves")
        return
    table = inputs.features[extractor]
    pca = distances.fit_pca(table[sides.fitted_rows(inputs.train)], sides.pca_dims(asked, len(passed)))
    facts["pca"][extractor] = {"dims": pca.dims, "asked": asked, "explained": pca.explained}
    real = inputs.arms[REAL].features[extractor]
    side = FrechetSide(
        pca,
        frame.unit,
        plan,
        (table[inputs.reference], frame.reference_group),
        (real[passed], frame.group[passed]),
    )
    half = {"n": len(passed) // 2, "reference": len(inputs.reference) // 2, "pca": pca.dims}
    for name, arm in inputs.arms.items():
        raw = side.floor if name == REAL else side.distances(arm.features[extractor], frame.group, frame.passes)
        used = len(passed) * (1 if name == REAL else len(frame.passes))
        if not np.isfinite(raw).all():
            facts["left_out"].append(f"FD-{extractor} of {name}: a half of the clips holds fewer than two")
            continue
        common = (used, frame.groups)
        raw_protocol = frame.protocol("frechet, disjoint halves of groups", extractor, **half)
        bounds = intervals.jackknife(raw)
        bounds = Interval(bounds.value, max(bounds.low, 0.0) if bounds.low == bounds.low else bounds.low, bounds.high)
        yield Score(name, f"FD-{extractor}", bounds, *common, raw_protocol, raw)
        if name != REAL:
            excess = raw - side.floor
            facts["uncorrected_excess"].setdefault(extractor, {})[name] = float(excess[0])
            protocol = frame.protocol("frechet less its real floor, jackknife bias correction", extractor, **half)
            value = intervals.jackknife(excess, correct=True)
            yield Score(name, f"excess-FD-{extractor}", value, *common, protocol, excess, True)


def kid_scores(frame: Frame, extractor: str, facts: dict[str, Any]) -> Iterator[Score]:
    """KID of every arm over pairs of different groups; arm "real": halves of the real clips against each other."""
    inputs = frame.inputs
    reference = inputs.features[extractor][inputs.reference]
    protocol = frame.protocol("kid, unbiased, pairs of different groups", extractor, reference=len(reference))
    side = KernelSide(reference, frame.reference_group, frame.count)
    for name, arm in inputs.arms.items():
        if name == REAL:
            continue
        left = side.distances(arm.features[extractor], frame.group)
        if not np.isfinite(left[0]):
            facts["left_out"].append(f"KID-{extractor} of {name}: there are no two content groups")
            continue
        yield Score(name, f"KID-{extractor}", intervals.jackknife(left), len(inputs.rows), frame.groups, protocol, left)
    value = side.floor(inputs.run.config.run.seed)
    if value is None:
        return
    floor = frame.protocol(
        "kid, unbiased, between halves of the real clips; bounds: spread over halvings",
        extractor,
        n=len(reference) // 2,
        reference=len(reference) // 2,
    )
    groups = len(np.unique(frame.reference_group))
    yield Score(REAL, f"KID-{extractor}", value, len(reference), groups, floor)


# --- copying and motion ----------------------------------------------------------------------------------------------


def copying_scores(frame: Frame, extractor: str) -> Iterator[Score]:
    """Nearest training and real clips, precision, recall, density, coverage of every arm."""
    inputs = frame.inputs
    table = inputs.features[extractor]
    reference = table[inputs.reference]
    whole = len(reference) * len(inputs.train) <= copying.WHOLE
    train = table[inputs.train] if whole else copying.Chosen(table, inputs.train)
    side = CopyingSide(reference, frame.reference_group, inputs.split, train)
    for name, arm in inputs.arms.items():
        for metric, term in side.terms(arm.features[extractor], frame.group).items():
            value = (intervals.share_interval if term.share else intervals.mean_interval)(term.values, term.group)
            left = intervals.leave_out_means(term.values, term.group, frame.count)
            protocol = frame.protocol(f"{metric}: {term.rule}", extractor, reference=len(reference))
            yield Score(name, metric, value, len(term.values), len(np.unique(term.group)), protocol, left)


def motion_scores(frame: Frame) -> Iterator[Score]:
    """Mean absolute frame difference of every arm; descriptive, to be read beside the real clips'."""
    protocol = frame.protocol("mean absolute difference of consecutive frames, 0 to 1")
    for name, arm in frame.inputs.arms.items():
        values = motion(arm.clips)
        left = intervals.leave_out_means(values, frame.group, frame.count)
        value = intervals.mean_interval(values, frame.group)
        yield Score(name, "motion", value, len(values), frame.groups, protocol, left)


# --- clusters --------------------------------------------------------------------------------------------------------


def cluster_scores(frame: Frame, facts: dict[str, Any]) -> Iterator[Score]:
    """Share of every arm's clips whose features lie nearest to each cluster's centroid."""
    from archipel.partition.assignment import load_assignment, nearest
    from archipel.partition.stage import FEATURES

    inputs = frame.inputs
    part = inputs.run.config.partition
    assigned = load_assignment(inputs.run)

    def data(rows: np.ndarray) -> list[float]:
        return [float((assigned[rows] == k).mean()) if len(rows) else 0.0 for k in range(part.k)]

    whole = np.array(rows_of(inputs.clips, inputs.split), np.int64)
    tables = {
        "data_train": data(inputs.train),
        "data_split": data(whole),
        "captions": data(inputs.rows),
    }
    facts["clusters"] = {**tables, "arms": {}}
    kind, names = FEATURES[part.features]
    if kind != "features" or part.method != "kmeans":
        why = "was dealt at random" if part.method != "kmeans" else "was made from captions"
        facts["left_out"].append(
            f"cluster shares of arms: the partition {why}, so generated clips have no nearest cluster"
        )
        return
    protocol = frame.protocol("share of clips nearest to the centroid", "+".join(names), reference=len(inputs.train))
    for name, arm in inputs.arms.items():
        owner = nearest(inputs.run, np.concatenate([arm.features[one] for one in names], 1))
        facts["clusters"]["arms"][name] = [float((owner == k).mean()) for k in range(part.k)]
        for k in range(part.k):
            hits = (owner == k).astype(np.float64)
            left = intervals.leave_out_means(hits, frame.group, frame.count)
            value = intervals.share_interval(hits, frame.group)
            yield Score(name, f"cluster-share-{k}", value, len(hits), frame.groups, protocol, left)


# --- text ------------------------------------------------------------------------------------------------------------


def probe_scores(frame: Frame, extractors: tuple[str, ...], facts: dict[str, Any]) -> Iterator[Score]:
    """Text-video probe and retrieval of every arm; nothing but the table of facts where the probe is withheld."""
    inputs = frame.inputs
    train = sides.fitted_rows(inputs.train)
    train_groups = intervals.number_groups(inputs.groups(train))[0][0]
    if len(np.unique(train_groups)) < 2:
        facts["probe"] = {"withheld": True, "reason": "fewer than two content groups to train on", "table": []}
        return
    x = probe.join([inputs.features[name][train] for name in extractors])
    place: dict[str, int] = {}
    own = np.array([place.setdefault(caption, len(place)) for caption in inputs.captions], np.int64)
    first = np.unique(own, return_index=True)[1]
    pool = inputs.text[inputs.rows[first]]
    side = ProbeSide(x, inputs.text[train], train_groups, own, pool, inputs.run.config.run.seed)

    def find(features: dict[str, np.ndarray], pick: np.ndarray) -> probe.Retrieval:
        return side.retrieve(probe.join([features[name] for name in extractors]), pick)

    everyone = np.arange(len(inputs.rows))
    unique = np.sort(np.unique(inputs.rows, return_index=True)[1])
    results = {name: (find(arm.features, everyone), everyone) for name, arm in inputs.arms.items()}
    shown = {name: results[name] for name in (REAL, "codec") if name in results}
    shown |= {name: (find(inputs.changed[name], unique), unique) for name in (STATIC, REVERSED)}
    real = shown[REAL][0]
    reason = sides.withheld(real)
    facts["probe"] = {
        "withheld": bool(reason),
        "reason": reason,
        "features": list(extractors),
        "penalty": side.fitted.penalty,
        "train_cosine": side.fitted.score,
        "pool": len(pool),
        "chance": {"retrieval@1": real.chance1, "retrieval@5": real.chance5},
        "table": [_probe_row(frame, name, found, pick) for name, (found, pick) in shown.items()],
        "controls": {name: _control(frame, name, real.similarity[unique], shown[name]) for name in (STATIC, REVERSED)},
    }
    if reason:
        return
    protocol = frame.protocol(
        f"ridge probe to caption embeddings, {len(pool)} captions", "+".join(extractors), reference=len(train)
    )
    for name, (found, _) in results.items():
        terms = {"text-video-probe": found.similarity, "retrieval@1": found.top1, "retrieval@5": found.top5}
        for metric, values in terms.items():
            make = intervals.mean_interval if metric == "text-video-probe" else intervals.share_interval
            left = intervals.leave_out_means(values, frame.group, frame.count)
            yield Score(name, metric, make(values, frame.group), len(values), frame.groups, protocol, left)


def _control(frame: Frame, name: str, real: np.ndarray, changed: tuple[probe.Retrieval, np.ndarray]) -> dict[str, Any]:
    """Does the probe lose anything when motion is taken away or turned round? Real less changed, paired."""
    found, pick = changed
    gap = intervals.mean_interval(real - found.similarity, frame.group[pick])
    loses = gap.low > 0
    tells = "tells" if loses else "cannot be shown to tell"
    said = f"the text-video probe {tells} {name} clips from real ones: real less {name} is {gap}"
    return {"difference": clean(gap), "loses": loses, "sentence": said}


def _probe_row(frame: Frame, name: str, found: probe.Retrieval, pick: np.ndarray) -> dict[str, Any]:
    group = frame.group[pick]
    return {
        "clips": name,
        "n": len(pick),
        "similarity": clean(intervals.mean_interval(found.similarity, group)),
        "retrieval@1": intervals.share_interval(found.top1, group).as_dict(),
        "retrieval@5": intervals.share_interval(found.top5, group).as_dict(),
    }
