"""What may be said: archipelago against monolith, copying, circles, too few clips. Plain words, made from intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.config import FEATURE_NETWORK, RunConfig
from archipel.evaluation import intervals
from archipel.evaluation.inputs import EXTRACTORS, NETWORK, REAL
from archipel.evaluation.intervals import FEW_GROUPS, Interval
from archipel.evaluation.measure import Score, clean
from archipel.evaluation.protocol import require_same
from archipel.run import MONOLITH

Scores = Mapping[tuple[str, str], Score]
TOO_FEW = "too few clips to conclude"
JUDGE = "train-over-test"
COPYING = (JUDGE, "share-nearer-train", "nearest-train", "nearest-test", "precision", "recall", "density", "coverage")


def few(groups: int) -> bool:
    return groups < FEW_GROUPS


def pair(scores: Scores, metric: str, arm: str, other: str) -> Interval | None:
    """arm - other with the paired jackknife, or None where one is missing. Raises ArchipelError for other protocols."""
    one, two = scores.get((arm, metric)), scores.get((other, metric))
    if one is None or two is None:
        return None
    require_same(one.row(), two.row())
    return intervals.difference(one.left, two.left, correct=one.correct)


def comparisons(scores: Scores, arm: str, primary: str, copied: bool) -> list[dict[str, Any]]:
    """The primary arm against the monolith by every distance; the primary metric first, alone allowed to decide."""
    metrics = [f"{kind}-{name}" for kind in ("KID", "excess-FD") for name in EXTRACTORS]
    found = []
    for metric in sorted(metrics, key=lambda one: one != primary):
        gap = pair(scores, metric, arm, MONOLITH) if arm != MONOLITH else None
        if gap is None:
            continue
        one, two = scores[arm, metric], scores[MONOLITH, metric]
        quotient = intervals.ratio(one.left, two.left, correct=one.correct)
        found.append(
            {
                "metric": metric,
                "arm": arm,
                "baseline": MONOLITH,
                "primary": metric == primary,
                "difference": clean(gap),
                "ratio": clean(quotient) if quotient is not None else None,
                "groups": one.groups,
                "verdict": verdict(metric, arm, gap, quotient, one.groups, copied),
            }
        )
    return found


def verdict(metric: str, arm: str, gap: Interval, quotient: Interval | None, groups: int, copied: bool) -> str:
    """One sentence on a difference of distances (negative: the arm is nearer to the real clips)."""
    size = f"{metric}: {arm} less monolith is {gap}"
    if quotient is not None:
        size += f", {quotient} of the monolith's distance"
    if gap.high < 0:
        said = f"{arm} is nearer to the real clips than the monolith"
        if copied:
            said += ", but it also copies training clips more, so this does not count as a gain"
    elif gap.low > 0:
        said = f"{arm} is farther from the real clips than the monolith"
    else:
        said = "no difference can be told"
    if few(groups):
        said += f"; {groups} content groups: {TOO_FEW}"
    return f"{size}. {said[0].upper() + said[1:] if not said.startswith(arm) else said}."


def copying(scores: Scores, arm: str, extractor: str) -> dict[str, Any]:
    """Table per arm and a verdict: does the primary arm copy, and more than the monolith does?

    Copying is judged by "train-over-test" (0.5: none). It grew where the arm's lower bound is above 0.5 and its paired
    difference to the monolith is above 0. Being nearer to training clips alone is no copying: any arm whose clips look
    real is nearer to all real clips than a poor arm is.
    """
    arms = list(dict.fromkeys(name for name, _ in scores))
    table = [
        {"arm": name, **{one: clean(scores[name, one].interval) for one in COPYING if (name, one) in scores}}
        for name in arms
    ]
    growth = pair(scores, JUDGE, arm, MONOLITH) if arm != MONOLITH else None
    found, grew, said = scores.get((arm, JUDGE)), False, []
    if found is not None:
        near = found.interval
        copies = near.low > 0.5
        grew = copies and (growth is None or growth.low > 0)
        said.append(
            f"clips of {arm} lie nearer to training clips, in relation to unseen real clips, than those do among "
            f"themselves with probability {near}; 0.5 is no copying, so "
            f"{'it copies' if copies else 'no copying can be told'}"
        )
        if growth is not None:
            said.append(f"less the monolith's this is {growth}: copying {'grew' if grew else 'did not grow'}")
    if found is not None and few(found.groups):
        said.append(f"{found.groups} content groups: {TOO_FEW}")
    return {
        "extractor": extractor,
        "arms": table,
        "growth": clean(growth) if growth is not None else None,
        "grew": grew,
        "verdict": "; ".join(said) + "." if said else "",
    }


def crossing(config: RunConfig) -> dict[str, Any]:
    """Which extractor made the partition, which one the primary metric uses, and whether that is a circle."""
    primary = config.evaluate.primary
    extractor = next((name for name in EXTRACTORS if primary.endswith(name)), EXTRACTORS[0])
    made = config.partition.features if config.partition.method == "kmeans" else "random"
    network = FEATURE_NETWORK[config.partition.features] if config.partition.method == "kmeans" else None
    circle = NETWORK[extractor] == network
    independent = [name for name in EXTRACTORS if NETWORK[name] != network]
    if circle:
        said = (
            f"The primary metric {primary} uses {NETWORK[extractor]}, which also made the partition: this is a circle "
            f"and does not count as evidence. Independent extractors: {', '.join(independent)}."
        )
    else:
        said = f"The partition was made with {made}; the primary metric {primary} uses {NETWORK[extractor]}: no circle."
    return {
        "primary": primary,
        "primary_extractor": extractor,
        "partition": made,
        "same_as_partition": [name for name in EXTRACTORS if name not in independent],
        "independent": independent,
        "circle": circle,
        "sentence": said,
    }


def floors(scores: Scores) -> dict[str, Any]:
    """The real clips' own values of every distance, which no arm can be expected to beat."""
    return {metric: clean(score.interval) for (arm, metric), score in scores.items() if arm == REAL and "D-" in metric}
