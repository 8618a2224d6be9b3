"""What a study may say: one arm against a baseline, copying, circles, and which of two baselines is the better one.

Ratios are baseline over arm, as the paper's direction is: 2.0 reads "halved". Everything here comes from intervals over
content groups and seeds, paired over those that both arms have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from archipel.errors import ArchipelError
from archipel.evaluation.inputs import NETWORK
from archipel.evaluation.intervals import FEW_GROUPS, Interval
from archipel.evaluation.measure import clean
from archipel.evaluation.protocol import require_same
from archipel.evaluation.verdicts import JUDGE, TOO_FEW
from archipel.study import statistics
from archipel.study.scores import Paired, Scores
from archipel.study.statistics import FEW_SEEDS, Estimate

GOAL, ABOVE = 2.0, 1.5  # the ratio that is aimed at, and what its lower bound must exceed
PROBE = "text-video-probe"
NEUTRAL = ("motion", "flow")  # scalars of which more is not better: near the real clips' is


def pair(scores: Scores, metric: str, arm: str, other: str) -> tuple[Estimate, Estimate] | None:
    """Estimates of two arms over their common seeds, or None where one is missing or no seed is common.

    Raises ArchipelError for different protocols (``require_same``); the seeds are made the same here.
    """
    one, two = scores.get((arm, metric)), scores.get((other, metric))
    if one is None or two is None or one.estimate is None or two.estimate is None:
        return None
    if one.seeds and two.seeds and not set(one.seeds) & set(two.seeds):
        return None
    a, b = statistics.paired(one.estimate, two.estimate)
    require_same(*({**score.row(), "protocol": {**score.protocol, "seeds": list(a.seeds)}} for score in (one, two)))
    return a, b


def difference(scores: Scores, metric: str, arm: str, other: str) -> Interval | None:
    """arm - other, paired over content groups and common seeds; None where one is missing. Raises as ``pair``."""
    found = pair(scores, metric, arm, other)
    return None if found is None else statistics.difference(*found)


def ratio(scores: Scores, metric: str, arm: str, other: str) -> Interval | None:
    """arm / other; None also where the lower bound of ``other`` is not above 0. Raises as ``pair``."""
    found = pair(scores, metric, arm, other)
    return None if found is None else statistics.ratio(*found)


def per_seed(scores: Scores, metric: str, arm: str, baseline: str) -> list[dict[str, float]]:
    """Both arms' values of every common seed, for paired plots: {"seed", "arm", "baseline"}."""
    found = pair(scores, metric, arm, baseline)
    if found is None:
        return []
    rows = zip(found[0].seeds, found[0].values.tolist(), found[1].values.tolist(), strict=True)
    return [{"seed": seed, "arm": own, "baseline": other} for seed, own, other in rows]


def same_as_partition(extractors: Iterable[str], network: str | Collection[str] | None) -> list[str]:
    """Extractors whose network made the partition (``config.FEATURE_NETWORK``; None: none did): circles, no evidence."""
    made = {network} if isinstance(network, str) else set(network or ())
    return [name for name in extractors if NETWORK.get(name, name) in made]


# --- copying ---------------------------------------------------------------------------------------------------------


def copying(scores: Scores, arm: str, baseline: str) -> dict[str, Any]:
    """Does ``arm`` copy training clips, and more than the baseline does? By "train-over-test": 0.5 is none.

    It grew where the arm's lower bound is above 0.5 and its paired difference to the baseline is above 0. Returns
    {"arm", "baseline", "growth", "grew", "verdict"}; "grew" is None where it was not judged (training captions).
    """
    found = scores.get((arm, JUDGE))
    growth = difference(scores, JUDGE, arm, baseline)
    head = {"arm": arm, "baseline": baseline}
    if found is None or growth is None:
        return {**head, "growth": None, "grew": None, "verdict": "Copying is not judged on these captions."}
    copies = found.interval.low > 0.5
    grew = bool(copies and growth.low > 0)
    said = (
        f"Clips of {arm} lie nearer to training clips, in relation to unseen real clips, than those do among themselves "
        f"with probability {found.interval}; 0.5 is no copying, so {'it copies' if copies else 'no copying can be told'}; "
        f"less that of {baseline} this is {growth}: copying {'grew' if grew else 'did not grow'}"
    )
    if found.groups < FEW_GROUPS:
        said += f"; {found.groups} content groups: {TOO_FEW}"
    return {**head, "growth": clean(growth), "grew": grew, "verdict": said + "."}


# --- comparisons -----------------------------------------------------------------------------------------------------


def comparisons(
    scores: Scores,
    arm: str,
    baseline: str,
    *,
    primary: str,
    circles: Collection[str] = (),
    copied: bool | None = None,
    goal: float = GOAL,
    above: float = ABOVE,
) -> list[dict[str, Any]]:
    """``arm`` against ``baseline`` by every distance and scalar that both have; the primary metric first.

    primary: the metric that decides, alone. circles: extractors that made the partition (``same_as_partition``), and
    metrics that it decides otherwise. copied:
    whether copying grew, where it is judged elsewhere (training captions: by the test captions' ``copying``).
    One entry per metric: {"set", "metric", "extractor", "arm", "baseline", "primary", "circle", "difference" (arm less
    baseline), "ratio" (baseline over arm, null where the arm's lower bound is not above 0), "reached" (the goal), "gain"
    (nearer to real clips, and copying was judged and did not grow), "copying" (whether it grew; null: not judged),
    "seeds", "groups", "verdict"}. Raises ArchipelError for different protocols.
    """
    grew = copying(scores, arm, baseline)["grew"] if copied is None else copied
    metrics = [metric for name, metric in scores if name == arm and _compared(scores[arm, metric])]
    found = []
    for metric in sorted(metrics, key=lambda one: one != primary):
        pairs = pair(scores, metric, arm, baseline)
        if pairs is None:
            continue
        own, one = pairs[0], scores[arm, metric]
        distance = _is_distance(one)
        gap = statistics.difference(*pairs)
        quotient = statistics.ratio(pairs[1], own) if distance else None
        circle = one.protocol["extractor"] in circles or metric in circles
        reached = quotient is not None and quotient.value >= goal and quotient.low > above
        said = _distances(metric, arm, baseline, gap, quotient) if distance else _scalars(one, arm, baseline, gap)
        gain = bool(distance and gap.high < 0 and grew is False)
        if distance and quotient is not None:
            said += f"; the goal of {goal:g} with a lower bound above {above:g} is {'' if reached else 'not '}reached"
        found.append(
            {
                "set": one.set,
                "metric": metric,
                "extractor": one.protocol["extractor"],
                "arm": arm,
                "baseline": baseline,
                "primary": metric == primary,
                "circle": circle,
                "difference": clean(gap),
                "ratio": clean(quotient) if quotient is not None else None,
                "reached": reached and gain and not circle,
                "gain": gain,
                "copying": grew,
                "seeds": len(own.seeds),
                "groups": one.groups,
                "verdict": said + "." + _cautions(one, own, distance and gap.high < 0, grew, circle),
            }
        )
    return found


def _is_distance(score: Paired) -> bool:
    return score.metric.startswith(("KID-", "FD-", "FVD", "excess-"))


def _compared(score: Paired) -> bool:
    """Distances but for the raw ones in a PCA (biased: they hide ratios), and scalars of clips."""
    if score.kind == "raw":
        return score.metric.startswith("FVD")
    return _is_distance(score) or bool(score.unit) or score.metric in (PROBE, *NEUTRAL)


def _distances(metric: str, arm: str, baseline: str, gap: Interval, quotient: Interval | None) -> str:
    if quotient is not None:
        size = f"{metric}: {baseline} over {arm}, ratio {quotient}, difference {gap}"
    else:
        size = f"{metric}: {arm} less {baseline} is {gap}; no ratio, as the distance of {arm} may be 0"
    if gap.high < 0:
        return f"{size}: {arm} is nearer to the real clips than {baseline}"
    if gap.low > 0:
        return f"{size}: {arm} is farther from the real clips than {baseline}"
    return f"{size}: no difference can be told"


def _scalars(score: Paired, arm: str, baseline: str, gap: Interval) -> str:
    unit = f" {score.unit}" if score.unit not in ("", "score", "cosine") else ""
    size = f"{score.metric}: {arm} less {baseline} is {gap}{unit}"
    if not gap.high < 0 and not gap.low > 0:
        return f"{size}: no difference can be told"
    more = "more" if gap.low > 0 else "less"
    if score.metric.startswith(NEUTRAL):
        return f"{size}: {arm} moves {more}; neither is better by itself, see the real clips"
    return f"{size}: {arm} is {'higher' if more == 'more' else 'lower'}"


def _cautions(score: Paired, own: Estimate, nearer: bool, grew: bool | None, circle: bool) -> str:
    """What takes weight from a sentence: copying, circles, few groups and seeds."""
    said = []
    if nearer and grew:
        said.append(f"{score.arm} also copies training clips more, so this does not count as a gain")
    if nearer and grew is None:
        said.append("copying is not judged on these captions")
    if circle:
        what = "the caption embeddings it is fitted to" if score.metric == PROBE else score.protocol["extractor"]
        said.append(f"{what} also made the partition: a circle, which does not count as evidence")
    if score.kind == "raw":
        said.append("raw distances are biased at this number of clips and hide ratios")
    if score.groups < FEW_GROUPS:
        said.append(f"{score.groups} content groups: {TOO_FEW}")
    if len(own.seeds) == 1:
        said.append("one seed: the interval covers content groups alone")
    elif 1 < len(own.seeds) < FEW_SEEDS:
        said.append(f"{len(own.seeds)} seeds: the interval may be too narrow")
    return "".join(f" {one[0].upper() + one[1:]}." for one in said)


# --- the better baseline ---------------------------------------------------------------------------------------------


def better_baseline(scores: Scores, candidates: Sequence[str], metric: str) -> dict[str, Any]:
    """The candidate of least distance on the validation captions, by the mean over common seeds, and all values.

    scores: of the validation set, which alone may choose. Returns {"chosen", "set", "metric", "seeds", "candidates":
    [{"arm", "value", "low", "high"}], "difference" (chosen less the runner-up, or null), "verdict"}. Raises ArchipelError
    where a candidate was not scored, for different protocols, and for scores of test captions.
    """
    found = []
    for name in candidates:
        score = scores.get((name, metric))
        if score is None or score.estimate is None or not np.isfinite(score.interval.value):
            raise ArchipelError(
                f"{name} has no {metric} on the validation captions: sample and score it before choosing"
            )
        if score.protocol["split"] == "test":
            raise ArchipelError(f"a baseline is never chosen by scores of test captions ({metric} of {name})")
        found.append(score)
    if not found:
        raise ArchipelError("no baseline to choose from: name at least one arm")
    common = tuple(seed for seed in found[0].seeds if all(seed in one.seeds for one in found))
    if not common:
        raise ArchipelError(f"the baselines {', '.join(candidates)} have no seed in common: train one for all of them")
    found = [one.over(common) for one in found]
    for one in found[1:]:
        require_same(found[0].row(), one.row())
    ordered = sorted(found, key=lambda one: one.interval.value)
    best = ordered[0]
    gap = difference(scores, metric, best.arm, ordered[1].arm) if len(ordered) > 1 else None
    values = ", ".join(f"{one.arm} {one.interval}" for one in found)
    said = f"{best.arm} is the better baseline on the {best.set} captions by {metric}: {values}"
    if gap is not None and not gap.high < 0:
        said += f"; the difference {gap} could be chance"
    return {
        "chosen": best.arm,
        "set": best.set,
        "metric": metric,
        "seeds": list(common),
        "candidates": [{"arm": one.arm, **clean(one.interval)} for one in found],
        "difference": clean(gap) if gap is not None else None,
        "verdict": said + ".",
    }
