"""The ablations that need trainings of their own: other numbers of experts, other clusters, a warm start, the curve."""

from __future__ import annotations

from typing import Any

from archipel.evaluation.inputs import EXTRACTORS, NETWORK
from archipel.evaluation.intervals import short
from archipel.study import probing
from archipel.study.costs import costs
from archipel.study.finding import Ablation, ablation, chart_of, interval_of, metric_of
from archipel.study.members import Members
from archipel.study.plan import SWEEP, TEST, primary
from archipel.study.results import Result


def number_of_experts(members: Members, result: Result) -> list[Ablation]:
    """K at constant total compute."""
    metric, own = metric_of(members), members.run.config.partition.k
    chosen = primary(members.run.config)
    arms = {k: chosen if k == own else f"k{k}" for k in sorted({*SWEEP, own})}
    found = result.common(TEST, ["monolith", *arms.values()], metric)
    rows: list[list[Any]] = [["monolith (K = 1)", found.get("monolith"), _cost(members, "monolith")]]
    series = []
    for k, arm in arms.items():
        value = found.get(arm)
        rows.append([f"K = {k}", value, _cost(members, arm)])
        if value is not None:
            series.append((float(k), value))
    best = min(series, key=lambda point: point[1].value, default=None)
    said = f"Least at K = {best[0]:.0f}: {best[1]}." if best else "Not measured."
    return [
        ablation(
            "experts", "Number of experts", "How many experts at constant total compute?",
            ["experts", metric, "training FLOPs"], rows, said,
            about="expert batch B/K, equal steps (rounded so that the total stays); the same strategy; all over the seeds that every K "
            "has",
            chart=chart_of("lines", "experts K", metric, {chosen: series}),
        )
    ]  # fmt: skip


def _cost(members: Members, arm: str) -> str:
    spent = costs(members, members.plan.arm(arm))["training_flops"]
    return "" if spent is None else f"{spent / 1e12:.2f} T"


def crossed(members: Members, result: Result) -> list[Ablation]:
    """Clustered by A, scored by B: every partition against every extractor."""
    config = members.run.config
    chosen = primary(config)
    own = config.partition.features
    arms = {
        chosen: own,
        **{
            arm.name: members.of(arm.member, 0).config.partition.features
            for arm in members.plan.arms
            if arm.name.startswith("by-")
        },
    }
    metrics = [f"KID-{name}" for name in EXTRACTORS]
    rows: list[list[Any]] = []
    for arm, features in arms.items():
        cells: list[Any] = []
        for name, metric in zip(EXTRACTORS, metrics, strict=True):
            value = interval_of(result, arm, metric)
            circle = NETWORK[name] in _networks(features)
            cells.append(f"({value})" if circle and value is not None else value)
        rows.append([f"by {features}" + (" (the study's)" if arm == chosen else ""), *cells])
    rows.append(["random shards", *(interval_of(result, "random-shards", metric) for metric in metrics)])
    rows.append(["monolith", *(interval_of(result, "monolith", metric) for metric in metrics)])
    return [
        ablation(
            "crossed", "What clusters are made by", "Does it matter which features make the clusters, and who judges?",
            ["clusters", *metrics], rows,
            "Values in brackets are circles: the judge's network also made the clusters, so they count for nothing.",
            about=f"{members.plan.arm(next(iter(a for a in arms if a != chosen), chosen)).seeds} seeds of the other partitions",
        )
    ]  # fmt: skip


def _networks(features: str) -> set[str]:
    return {"transnet": {"transnet"}, "text": set()}.get(features, {"efficientnet"})


def partition_seeds(members: Members, result: Result) -> list[Ablation]:
    """Only the partition drawn anew, all else as in the first seed."""
    metric, chosen = metric_of(members), primary(members.run.config)
    seeds = result.per_seed(TEST, chosen, metric)
    others = {
        arm.name: result.per_seed(TEST, arm.name, metric)
        for arm in members.plan.arms
        if arm.name.startswith("partition-")
    }
    first = seeds.get(0)
    rows: list[list[Any]] = [["the study's first seed", first]]
    rows += [[name.replace("-", " seed "), values.get(0)] for name, values in others.items()]
    partitions = [value for value in (first, *(values.get(0) for values in others.values())) if value is not None]
    by_partition = max(partitions) - min(partitions) if partitions else 0.0
    by_seed = max(seeds.values()) - min(seeds.values()) if seeds else 0.0
    return [
        ablation(
            "partition-seeds", "Seeds of the partition alone", "How much of the spread is the partition's?",
            ["partition", metric], rows,
            f"Range over {len(partitions)} partitions {short(by_partition)}; over {len(seeds)} seeds of everything {short(by_seed)}.",
        )
    ]  # fmt: skip


def warm_start(members: Members, result: Result) -> list[Ablation]:
    """A short shared start for both sides."""
    metric, chosen = metric_of(members), primary(members.run.config)
    names = {
        chosen: "experts from nothing",
        "warm": "experts from the shared start",
        "monolith": "monolith from nothing",
        "warm-monolith": "monolith from the shared start",
        "small-batch": "monolith of batch B/K from nothing",
        "warm-small": "monolith of batch B/K from the shared start",
    }
    base = "warm-monolith" if result.baseline == "monolith" else "warm-small"
    rows = [[label, interval_of(result, arm, metric), _cost(members, arm)] for arm, label in names.items()]
    gap, ratio = (
        result.difference(TEST, "warm", base, metric),
        result.ratio(TEST, base, "warm", metric),
    )
    said = f"Experts less monolith, both warm: {gap}" + (f"; ratio {ratio}" if ratio is not None else "") + "."
    return [
        ablation(
            "warm", "A short shared warm start", "Does a tenth of the training in common help?",
            ["arm", metric, "training FLOPs"], rows, said,
            about="the shared steps' FLOPs are in each arm's total once, and each arm's own steps are fewer by them",
        )
    ]  # fmt: skip


def curve(members: Members, result: Result) -> dict[str, Any] | None:
    """Ratio monolith over archipelago against training FLOPs and width; None where no point was trained."""
    metric, chosen = metric_of(members), primary(members.run.config)
    names = [
        arm.name
        for arm in members.plan.arms
        if arm.name.startswith(("width-", "steps-")) and not arm.name.endswith(("-monolith", "-small-batch"))
    ]
    points = []
    for arm, base in ((chosen, result.baseline), *((name, f"{name}-{result.baseline}") for name in names)):
        ratio = result.ratio(TEST, base, arm, metric)
        one = members.plan.arm(arm)
        config = members.of(one.member, 0).config
        points.append(
            {
                "label": "the study" if arm == chosen else members.plan.member(one.member).title,
                "width": config.expert.width,
                "steps": config.expert.steps,
                "flops": costs(members, one)["training_flops"],
                "ratio": probing.as_dict(ratio) if ratio is not None else None,
                "metric": metric,
            }
        )
    return {"x": f"training FLOPs per arm (over the baseline: {result.baseline})", "points": points} if names else None
