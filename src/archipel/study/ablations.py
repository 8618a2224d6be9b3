"""The ablations of a study, each as one small table, a chart and a sentence: from the scores, the kept clips, the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from archipel.evaluation.intervals import FEW_GROUPS, Interval, mean_interval, short
from archipel.evaluation.verdicts import TOO_FEW
from archipel.progress import Progress, StopFlag
from archipel.routing.router import load_router
from archipel.study import probing
from archipel.study.finding import Ablation, ablation, chart_of, interval_of, metric_of
from archipel.study.members import Members
from archipel.study.page_reading import capital, sentence
from archipel.study.plan import MAIN, MIXED, TEST, primary
from archipel.study.prompts import Prompts
from archipel.study.results import Result, over_seeds
from archipel.study.trained import crossed, number_of_experts, partition_seeds, warm_start


def all_of(members: Members, result: Result, stop: StopFlag) -> list[Ablation]:
    """Every ablation of the plan's parts. Raises Stopped between two of them."""
    parts = members.plan.parts
    make: list[Callable[[Members, Result], Iterable[Ablation]]] = [controls]
    if "ablations" in parts:
        make += [specialisation, schedules, experts_missing, mixed_captions, over_time, expert_agreement, predicted]
    if "experts" in parts:
        make.append(number_of_experts)
    if "partitions" in parts:
        make += [crossed, partition_seeds]
    if "warm" in parts:
        make.append(warm_start)
    found: list[Ablation] = []
    with Progress("study: ablations", len(make)) as bar:
        for one in make:
            if stop:
                raise stop.error("the study")
            found += [_cautious(part, result) for part in one(members, result)]
            bar.advance()
    return found


def _cautious(one: Ablation, result: Result) -> Ablation:
    bench = result.tables[TEST].bench
    if bench is None or bench.prompts.groups >= FEW_GROUPS or not one["rows"]:
        return one
    return {**one, "verdict": f"{one['verdict']} {capital(TOO_FEW)}: {bench.prompts.groups} content groups."}


# --- against everything else in the table ------------------------------------------------------------------------------


def controls(members: Members, result: Result) -> list[Ablation]:
    """The archipelago less every other arm of the table, in pairs: the headline is its difference to one of them alone."""
    metric, chosen = metric_of(members), primary(members.run.config)
    rows: list[list[Any]] = []
    nearer, farther = [], []
    for arm in members.plan.arms:
        if arm.name == chosen or arm.family == "ablation" or TEST not in arm.sets:
            continue
        gap = result.difference(TEST, chosen, arm.name, metric)
        if gap is None:
            continue
        rows.append([arm.title, gap, result.ratio(TEST, arm.name, chosen, metric)])
        nearer += [arm.name] if gap.high < 0 else []
        farther += [arm.name] if gap.low > 0 else []
    said = [f"nearer to the real clips than {', '.join(nearer)}"] if nearer else []
    said += [f"farther from them than {', '.join(farther)}"] if farther else []
    verdict = f"By 95 % intervals, not corrected for {len(rows)} of them, {chosen} is " + (
        "; ".join(said) + "." if said else "told apart from none of them."
    )
    return [
        ablation(
            "controls", "The archipelago against every other arm", "Is it the routing, the clusters, the parameters, the steps?",
            ["arm", f"{metric}: {chosen} less it", f"ratio: it over {chosen}"], rows, verdict,
            about="paired over captions, noise and common seeds, test captions; below 0 the archipelago is nearer to the real clips",
        )
    ]  # fmt: skip


# --- who knows what --------------------------------------------------------------------------------------------------


def specialisation(members: Members, result: Result) -> list[Ablation]:
    """An expert on captions of its own cluster and on the others': the paper's Section 4.3, by the text-video probe."""
    k, seeds = members.run.config.partition.k, members.plan.arm("expert-1").seeds
    per_clip = result.similarity(TEST)
    if per_clip is None:
        return [_withheld("specialisation", "Specialisation", "Does an expert know its own cluster better?", result)]
    prompts = Prompts.of(members.run, TEST)
    _, groups = np.unique(prompts.groups, return_inverse=True)
    rows: list[list[Any]] = []
    gaps: list[np.ndarray] = []
    for expert in range(k):
        own, others, own_groups, other_groups = [], [], [], []
        for seed in range(seeds):
            values = per_clip(f"expert-{expert}", seed)
            mine = _clusters(members, seed, prompts) == expert
            own.append(values[mine])
            others.append(values[~mine])
            own_groups.append(groups[mine])
            other_groups.append(groups[~mine])
        ours, theirs = _mean(own, own_groups), _mean(others, other_groups)
        rows.append([f"expert {expert}", ours, theirs, ours.value - theirs.value if ours and theirs else None])
    for seed in range(seeds):
        table = np.stack([per_clip(f"expert-{expert}", seed) for expert in range(k)])
        mine = _clusters(members, seed, prompts)
        own_score = table[mine, np.arange(len(mine))]
        gaps.append(own_score - (table.sum(0) - own_score) / (k - 1))
    gap = over_seeds(np.stack(gaps), groups)
    said = "experts are better on their own captions" if gap.low > 0 else "no specialisation can be told"
    return [
        ablation(
            "specialisation", "Specialisation", "Does an expert follow captions of its own cluster better than the others do?",
            ["expert", "own cluster's captions", "the others' captions", "difference"], rows,
            f"On the same captions the cluster's own expert scores {gap} above the mean of the other experts: {said}.",
            about="cosine of the text-video probe, test captions without guidance changes; the paper reports CLIP 0.2175 against 0.1781",
        )
    ]  # fmt: skip


def _mean(values: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Interval | None:
    """Over content groups alone, for clusters hold other clips for every seed; None where no clip is there."""
    some = np.concatenate(values)
    return mean_interval(some, np.concatenate(groups)) if len(some) else None


def _clusters(members: Members, seed: int, prompts: Prompts) -> np.ndarray:
    from archipel.partition.assignment import load_assignment

    return np.asarray(load_assignment(members.of(MAIN, seed))[prompts.rows])


def _withheld(name: str, title: str, question: str, result: Result) -> Ablation:
    return ablation(name, title, question, [""], [], f"Withheld: {result.probe_withheld}")


def schedules(members: Members, result: Result) -> list[Ablation]:
    """Two experts in forced turns over the steps: the paper's Figure 5."""
    names = {
        "expert-0": "A alone", "expert-1": "B alone", "first-0-1": "A at high noise, then B",
        "first-1-0": "B at high noise, then A", "alternate-0-1": "A and B in turns",
    }  # fmt: skip
    metric = metric_of(members)
    rows = [
        [label, interval_of(result, arm, metric), interval_of(result, arm, "text-video-probe")]
        for arm, label in names.items()
    ]
    single = (
        result.difference(TEST, "alternate-0-1", "expert-0", metric),
        result.difference(TEST, "alternate-0-1", "expert-1", metric),
    )
    order = result.difference(TEST, "first-0-1", "first-1-0", metric)
    said = []
    if all(single):
        better = all(one is not None and one.high < 0 for one in single)
        said.append(
            "alternating beats both single experts" if better else "alternating does not beat both single experts"
        )
    if order is not None:
        matters = order.low > 0 or order.high < 0
        said.append(
            f"A then B less B then A is {order}: {'the order matters' if matters else 'no difference can be told'}"
        )
    return [
        ablation(
            "schedules", "Forced schedules of two experts", "Does it matter which expert speaks at which noise level?",
            ["schedule", metric, "text-video probe"], rows, sentence("; ".join(said)),
            about=f"experts 0 (A) and 1 (B) on all test captions; high noise is t > {0.5}",
        )
    ]  # fmt: skip


def experts_missing(members: Members, result: Result) -> list[Ablation]:
    """Each expert taken away: what its loss costs."""
    metric, whole = metric_of(members), primary(members.run.config)
    rows: list[list[Any]] = [["all experts", interval_of(result, whole, metric), None]]
    worst: list[Interval] = []
    for number in range(members.run.config.partition.k):
        gap = result.difference(TEST, f"without-{number}", whole, metric)
        rows.append([f"without expert {number}", interval_of(result, f"without-{number}", metric), gap])
        if gap is not None:
            worst.append(gap)
    high = max(worst, key=lambda gap: gap.value, default=None)
    verdict = f"The costliest loss adds {high} to {metric}." if high else "Not measured."
    return [
        ablation(
            "missing", "Missing experts", "How much is lost when an island never delivers?",
            ["experts", metric, "more than with all"], rows, verdict,
            about="the router's posterior is restricted to the experts that are there and renormalised",
        )
    ]  # fmt: skip


def mixed_captions(members: Members, result: Result) -> list[Ablation]:
    """Captions that put together what two clusters know, which no clip of the data shows."""
    prompts = Prompts.of(members.run, MIXED)
    found = result.parts(MIXED)
    names = [arm for arm in members.plan.arms if MIXED in arm.sets]
    if found is None:
        return [_withheld("mixed", "Captions that mix clusters", "What happens between the clusters?", result)]
    rows = [[arm.title.removesuffix(", mixed captions"), *found(arm.name)] for arm in names]
    gap = found.gap(f"mixed-{primary(members.run.config)}", f"mixed-{result.baseline}")
    said = (
        "no difference can be told"
        if gap.low <= 0 <= gap.high
        else "the archipelago follows them better"
        if gap.low > 0
        else "the monolith follows them better"
    )
    examples = "; ".join(repr(caption) for caption in prompts.captions[:3])
    return [
        ablation(
            "mixed", "Captions that mix clusters", "Can experts do what no single cluster shows?",
            ["arm", "probe: the whole caption", "probe: its subject", "probe: its action"], rows,
            f"Whole caption, {primary(members.run.config)} less monolith: {gap}; {said}.",
            about=f"{len(prompts.captions)} captions such as {examples}; there are no real clips to hold them against",
        )
    ]  # fmt: skip


# --- networks on noisy clips -----------------------------------------------------------------------------------------


def over_time(members: Members, result: Result) -> list[Ablation]:
    """Accuracy and entropy of the three routers over time."""
    run = members.of(MAIN, 0)
    clips = probing.Clips.of(run, Prompts.of(members.run, TEST))
    kinds = {"text and latent": MAIN, "text only": "router-text", "latent only": "router-latent"}
    series = {
        label: probing.router_over_time(load_router(members.of(name, 0)), clips, run.config.run.seed)
        for label, name in kinds.items()
    }
    rows = [
        [
            f"t = {t:.2f}",
            *(series[label][place]["accuracy"] for label in kinds),
            series["text and latent"][place]["entropy"],
        ]
        for place, t in enumerate(probing.TIMES)
    ]
    accuracy = {label: [(one["t"], one["accuracy"]) for one in found] for label, found in series.items()}
    entropy = {label: [(one["t"], one["entropy"]) for one in found] for label, found in series.items()}
    first, last = series["text and latent"][-1]["accuracy"], series["text and latent"][0]["accuracy"]
    columns = ["time", *(f"accuracy: {label}" for label in kinds), "entropy (nats): text and latent"]
    chance = max(np.bincount(clips.clusters) / len(clips.clusters))
    return [
        ablation(
            "router", "Router accuracy over time", "When does a noisy clip tell its cluster, and what do captions add?",
            columns, rows,
            f"From {first} at the noisiest time to {last} at the cleanest; always naming the largest cluster is right in {chance:.0%}.",
            about="test clips, noise of its own, calibrated routers of the first seed; 1 is noise",
            chart=chart_of("lines", "t (1 = noise)", "accuracy", accuracy),
        ),
        ablation(
            "entropy", "Router entropy over time", "How sure is the router?", ["", "entropy at t = 0.95", "entropy at t = 0.05"],
            [[label, found[-1]["entropy"], found[0]["entropy"]] for label, found in series.items()],
            f"Even shares would have {short(float(np.log(run.config.partition.k)))} nats.",
            chart=chart_of("lines", "t (1 = noise)", "entropy, nats", entropy),
        ),
    ]  # fmt: skip


def expert_agreement(members: Members, result: Result) -> list[Ablation]:
    """Do experts agree, and is the cluster's own expert the best at predicting?"""
    run = members.of(MAIN, 0)
    found = probing.agreement(run, probing.Clips.of(run, Prompts.of(members.run, TEST)), run.config.run.seed)
    rows = [[f"t = {one['t']:.2f}", one["cosine"], one["own"], one["others"], one["best"]] for one in found]
    sharp = [one for one in found if one["gap"].low > 0]
    said = f"the own expert predicts better at {len(sharp)} of {len(found)} times"
    return [
        ablation(
            "agreement", "Agreement between experts", "How unlike are the experts, and does the own one predict best?",
            ["time", "cosine between velocities", "error of the own expert", "error of the others", "own one is best"], rows,
            capital(said) + f" (chance of being best is {1 / run.config.partition.k:.0%}).",
            about="squared velocity error per number on noisy test clips, captions given, no guidance, first seed",
            chart=chart_of("lines", "t (1 = noise)", "share or cosine", {
                "cosine between experts": [(one["t"], one["cosine"]) for one in found],
                "own expert is best": [(one["t"], one["best"]) for one in found],
            }),
        )
    ]  # fmt: skip


def predicted(members: Members, result: Result) -> list[Ablation]:
    """Is the predicted clip nearest to the centroid of the true cluster?"""
    run = members.of(MAIN, 0)
    title, question = "Predicted clips and centroids", "Does an expert pull a noisy clip towards its own cluster?"
    if run.config.partition.features == "text" or run.config.partition.method == "random":
        said = "Not measured: clusters were not made by what clips look like."
        return [ablation("centroids", title, question, [""], [], said)]
    found = probing.predicted_clusters(run, probing.Clips.of(run, Prompts.of(members.run, TEST)), run.config.run.seed)
    labels = {"own": "own expert", "router": "the router's choice", "other": "another expert"}
    rows = [[f"t = {one['t']:.1f}", *(one[who] for who in labels)] for one in found]
    chart = {label: [(one["t"], one[who]) for one in found] for who, label in labels.items()}
    noisy = found[-1]
    return [
        ablation(
            "centroids", title, question, ["time", *labels.values()], rows,
            f"At t = {noisy['t']:.1f} the own expert's prediction lies nearest to the clip's own centroid in {noisy['own']} of the clips, "
            f"another expert's in {noisy['other']}.",
            about=f"share of {probing.X0_CLIPS} test clips whose decoded prediction of x0 lies nearest to their own cluster's centroid",
            chart=chart_of("lines", "t (1 = noise)", "share nearest to the own centroid", chart),
        )
    ]  # fmt: skip
