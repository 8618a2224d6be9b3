"""What a study trains and scores: members (runs that differ in a few keys) and arms (how a member's clips are made).

Every member is an ordinary run below RUN/study/runs. The member ``main`` has the experts, the router and the monolith that
the question is about; the others are controls and ablations, each with the jobs that its arms need and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from archipel.backbones import flops
from archipel.config import RunConfig, build, merge, rope_axes_for
from archipel.errors import ArchipelError
from archipel.run import MONOLITH, ROUTER, TRUNK
from archipel.training import budget

MAIN = "main"
TEST, TRAIN, VALIDATION, MIXED = "test", "train", "validation", "mixed"
PARTS = ("table", "ablations", "experts", "partitions", "warm", "curve")
FEW = 3  # seeds of an ablation that trains, where the table has more: two leave intervals of one degree of freedom
SHOWN = 8  # clips kept per arm for the samples: the first captions, not the best
SWEEP = (2, 3, 4, 8)
EXPERTS = "experts"
Family = Literal["archipelago", "monolith", "control", "bound", "ablation"]


@dataclass(frozen=True)
class Member:
    """A run of the study: the keys in which it differs, the jobs that are trained, for how many seeds."""

    name: str
    title: str
    overrides: Mapping[str, Any]
    jobs: tuple[str, ...]
    seeds: int

    def names(self, config: RunConfig) -> list[str]:
        """Its jobs by name, for its own configuration."""
        experts = [str(k) for k in range(config.partition.k)]
        return [name for job in self.jobs for name in (experts if job == EXPERTS else [job])]


@dataclass(frozen=True)
class Arm:
    """A way to make clips: whose experts (or monolith), which rule, whose router.

    how: a strategy of ``ensemble`` or one of ``study.arms.RULES``; settings: what differs from ``[sample]``.
    """

    name: str
    title: str
    family: Family
    member: str
    how: str
    seeds: int
    router: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = (TEST,)


@dataclass(frozen=True)
class Plan:
    """Everything a study does: seeds counted from 0, members, arms, whose strategy is the archipelago's."""

    seeds: int
    parts: tuple[str, ...]
    members: tuple[Member, ...]
    arms: tuple[Arm, ...]
    primary: str

    def member(self, name: str) -> Member:
        return next(one for one in self.members if one.name == name)

    def arm(self, name: str) -> Arm:
        return next(one for one in self.arms if one.name == name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: RunConfig, seeds: int, parts: Sequence[str] = PARTS) -> Plan:
    """The study of one run. Raises ArchipelError where it makes no sense: fewer than two experts, unknown parts."""
    k = config.partition.k
    if k < 2:
        raise ArchipelError("partition.k = 1: a study compares experts with a monolith; give the run 2 or more")
    if seeds < 1:
        raise ArchipelError(f"--seeds {seeds} cannot be used: give 1 or more (5 or more for an interval over seeds)")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ArchipelError(f"{unknown[0]!r} is no part of a study: there are {', '.join(PARTS)}")
    if config.sample.strategy in (MONOLITH, "oracle"):
        raise ArchipelError(
            f"sample.strategy = {config.sample.strategy!r}: a study needs a strategy that mixes experts, such as 'top1'"
        )
    few = min(FEW, seeds)
    members, arms = _table(config, seeds)
    if "ablations" in parts:
        _add(members, arms, ([], _ablations(config, arms, seeds)))  # they cost sampling only
    if "experts" in parts:
        _add(members, arms, _experts(config, few))
    if "partitions" in parts:
        _add(members, arms, _partitions(config, few))
    if "warm" in parts:
        _add(members, arms, _warm(config, few))
    if "curve" in parts:
        _add(members, arms, _curve(config, few))
    return Plan(seeds, tuple(part for part in PARTS if part in parts), tuple(members), tuple(arms), primary(config))


def primary(config: RunConfig) -> str:
    """The arm that answers the question: the run's own strategy, fixed in run.toml before the test split was opened."""
    return config.sample.strategy


def _add(members: list[Member], arms: list[Arm], more: tuple[list[Member], list[Arm]]) -> None:
    members += more[0]
    arms += more[1]


# --- the table -------------------------------------------------------------------------------------------------------


def _table(config: RunConfig, seeds: int) -> tuple[list[Member], list[Arm]]:
    k, batch, steps = config.partition.k, config.monolith.batch, config.monolith.steps
    small = config.study.small_batch_lr or config.monolith.lr
    wide = matched_width(config)
    shape = {"expert.width": wide.width, "expert.heads": wide.heads, "expert.rope_axes": list(wide.rope_axes)}
    wide_flops = {**shape, "monolith.steps": wide.steps, "monolith.batch": batch}
    own = (MONOLITH,)
    # Every monolithic control twice: with batch B as the first baseline, and with batch B/K as the second one.
    little = {"monolith.batch": config.expert.batch, "monolith.lr": small}
    times = batch / config.expert.batch
    members = [
        Member(MAIN, f"{k} experts, router, monolith", {}, (EXPERTS, ROUTER, MONOLITH), seeds),
        Member("random", "experts on random shards", {"partition.method": "random"}, (EXPERTS, ROUTER), seeds),
        Member(
            "small-batch", f"monolith, batch {config.expert.batch}",
            {**little, "monolith.steps": 0}, own, seeds,
        ),
        Member("short", "monolith, 1/K of the compute", {"monolith.steps": max(1, round(steps / k))}, own, seeds),
        Member(
            "short-small", "monolith, 1/K of the compute, small batch",
            {**little, "monolith.steps": max(1, round(steps * times / k))}, own, seeds,
        ),
        Member("cluster", "cluster-conditioned monolith", {"monolith.condition": "cluster", "monolith.steps": 0}, own, seeds),
        Member(
            "cluster-small", "cluster-conditioned monolith, small batch",
            {**little, "monolith.condition": "cluster", "monolith.steps": 0}, own, seeds,
        ),
        Member("wide-flops", f"monolith of width {wide.width}, equal FLOPs", wide_flops, own, seeds),
        Member(
            "wide-flops-small", f"monolith of width {wide.width}, equal FLOPs, small batch",
            {**wide_flops, **little, "monolith.steps": max(1, round(wide.steps * times))}, own, seeds,
        ),
        Member("wide-samples", f"monolith of width {wide.width}, equal samples", {**wide_flops, "monolith.steps": steps}, own, seeds),
        Member("router-text", "router that reads the text only", {"router.reads": "text"}, (ROUTER,), seeds),
        Member("router-latent", "router that reads the latent only", {"router.reads": "latent"}, (ROUTER,), seeds),
    ]  # fmt: skip
    return members, _table_arms(config, seeds)


def _table_arms(config: RunConfig, seeds: int) -> list[Arm]:
    k, chosen = config.partition.k, primary(config)
    everywhere, steps = (TEST, TRAIN, VALIDATION), config.sample.steps
    found: list[Arm] = []

    def add(name: str, title: str, family: Family, how: str, member: str = MAIN, **more: Any) -> None:
        sets = everywhere if name in (chosen, MONOLITH, "small-batch") else (TEST,)
        found.append(Arm(name, title, family, member, how, seeds, sets=more.pop("sets", sets), **more))

    tops = ["top1", "top2"] if k > 2 else ["top1"]
    for how in dict.fromkeys([chosen, *tops, "full", "threshold", "ancestral"]):
        add(how, _TITLES.get(how, how), "archipelago", how)
    both = (TEST, TRAIN)
    low = config.sample.threshold / 10
    add("threshold-low", f"threshold {low:g}", "archipelago", "threshold", settings={"threshold": low})
    # A temperature does not change which expert is the likeliest: it is for mixtures of several only.
    add("full-t0.5", "all experts, temperature 0.5", "archipelago", "tempered", settings={"temperature": 0.5})
    add("full-t2", "all experts, temperature 2", "archipelago", "tempered", settings={"temperature": 2.0})
    add("full-uncalibrated", "all experts, router not calibrated", "archipelago", "uncalibrated")
    add("ancestral-top1", "ancestral at high noise, then top-1", "archipelago", "ancestral-top1")
    add(MONOLITH, "monolith, batch B", "monolith", MONOLITH)
    add("small-batch", "monolith, batch B/K, K times the steps", "monolith", MONOLITH, "small-batch")
    for end, words in (("", ""), ("-small", ", batch B/K")):
        add(f"short{end}", f"monolith at 1/K of the compute{words}", "monolith", MONOLITH, f"short{end}")
        add(f"cluster{end}", f"cluster-conditioned monolith{words}", "monolith", "cluster", f"cluster{end}")
        title = f"parameter-matched monolith, equal FLOPs{words}"
        add(f"wide-flops{end}", title, "monolith", MONOLITH, f"wide-flops{end}")
    add("wide-samples", "parameter-matched monolith, equal samples", "monolith", MONOLITH, "wide-samples")
    more = {"2x": ("top-2's", 2 * steps), "kx": ("the full ensemble's", k * steps)}
    for end, (whose, count) in more.items() if k > 2 else [("kx", more["kx"])]:
        title, settings = f"with {whose} sampling FLOPs", {"steps": count}
        add(f"monolith-{end}", f"monolith {title}", "monolith", MONOLITH, settings=settings)
        add(
            f"small-batch-{end}",
            f"monolith of batch B/K {title}",
            "monolith",
            MONOLITH,
            "small-batch",
            settings=settings,
        )
    add("random-shards", "experts on random shards", "control", "top1", "random", sets=both)
    add("random-shards-full", "experts on random shards, all at once", "control", "full", "random")
    add("router-text", "router that reads the text only, top-1", "control", "top1", router="router-text")
    add("router-latent", "router that reads the latent only, top-1", "control", "top1", router="router-latent")
    add("uniform", "uniform mixture", "control", "uniform")
    add("expert-0", "one fixed expert", "control", "expert-0")
    add("random", "a random expert per clip", "control", "random")
    add("oracle", "oracle: the real clip's own cluster (leaks it)", "bound", "oracle", sets=both)
    return found


_TITLES = {
    "top1": "top-1",
    "top2": "top-2",
    "full": "all experts",
    "threshold": "threshold",
    "ancestral": "ancestral: one expert per clip, k ~ p(k | text)",
}


@dataclass(frozen=True)
class Wide:
    """A wider network with the parameters of all experts together: its shape, and steps at the monolith's FLOPs."""

    width: int
    heads: int
    rope_axes: tuple[int, int, int]
    steps: int


def matched_width(config: RunConfig) -> Wide:
    """The width (same depth, same head width) whose parameters come nearest to those of all K experts."""
    expert, k = config.expert, config.partition.k
    head, target = expert.width // expert.heads, k * flops.expert_parameters(config)
    heads = min(range(expert.heads, 8 * expert.heads + 1), key=lambda n: abs(_parameters(config, n * head, n) - target))
    wider = _shaped(config, heads * head, heads)
    steps = config.monolith.steps * flops.expert_forward_flops(config) / flops.expert_forward_flops(wider)
    return Wide(heads * head, heads, expert.rope_axes, max(1, round(steps)))


def _shaped(config: RunConfig, width: int, heads: int) -> RunConfig:
    return config.model_copy(update={"expert": config.expert.model_copy(update={"width": width, "heads": heads})})


def _parameters(config: RunConfig, width: int, heads: int) -> int:
    return flops.expert_parameters(_shaped(config, width, heads))


# --- ablations -------------------------------------------------------------------------------------------------------


def _ablations(config: RunConfig, arms: Sequence[Arm], seeds: int) -> list[Arm]:
    """What costs sampling only: every expert by itself, two experts in turns, an expert missing, captions that mix."""
    k, chosen = config.partition.k, primary(config)
    have = {arm.name for arm in arms}
    found = [Arm(f"expert-{i}", f"expert {i} alone", "ablation", MAIN, f"expert-{i}", seeds) for i in range(k)]
    found += [
        Arm("first-0-1", "expert 0, then expert 1", "ablation", MAIN, "first-0-1", seeds),
        Arm("first-1-0", "expert 1, then expert 0", "ablation", MAIN, "first-1-0", seeds),
        Arm("alternate-0-1", "experts 0 and 1 in turns", "ablation", MAIN, "alternate-0-1", seeds),
    ]
    found += [
        Arm(f"without-{i}", f"without expert {i}", "ablation", MAIN, chosen, seeds, settings={"missing": i})
        for i in range(k)
    ]
    found += [
        Arm(f"mixed-{how}", f"{how}, mixed captions", "ablation", member, how, seeds, sets=(MIXED,))
        for how, member in ((chosen, MAIN), ("full", MAIN), ("ancestral", MAIN), (MONOLITH, MAIN))
    ]
    small = Arm(
        "mixed-small-batch", "monolith of small batches, mixed captions", "ablation", "small-batch", MONOLITH, seeds
    )
    found.append(replace(small, sets=(MIXED,)))
    return [arm for arm in found if arm.name not in have]


def _experts(config: RunConfig, seeds: int) -> tuple[list[Member], list[Arm]]:
    """K = 2, 3, 4, 8 at constant total compute: the batch is divided by K, the steps make up what rounding took."""
    whole = config.partition.k * config.expert.batch * config.expert.steps
    members, arms = [], []
    for k in SWEEP:
        if k == config.partition.k:
            continue
        batch = max(1, round(config.partition.k * config.expert.batch / k))
        steps = max(1, round(whole / (k * batch)))
        over = {"partition.k": k, "expert.batch": batch, "expert.steps": steps, "evaluate.arms": ["top1"]}
        members.append(Member(f"k{k}", f"{k} experts", over, (EXPERTS, ROUTER), seeds))
        arms.append(Arm(f"k{k}", f"{k} experts", "ablation", f"k{k}", config.sample.strategy, seeds))
    return members, arms


_FEATURES = {
    "text": "text",
    "appearance": "efficientnet",
    "motion": "motion",
    "shots": "transnet",
    "both": "appearance+motion",
}


def _partitions(config: RunConfig, seeds: int) -> tuple[list[Member], list[Arm]]:
    """Clusters by other features, and other seeds of the partition alone."""
    members, arms = [], []
    for name, features in _FEATURES.items():
        if features == config.partition.features and config.partition.method == "kmeans":
            continue
        judged: dict[str, Any] = {} if features in ("text", "transnet") else {"evaluate.primary": "KID-transnet"}
        over = {"partition.features": features, "partition.method": "kmeans", **judged}
        title = f"clusters by {features}"
        members.append(Member(f"by-{name}", title, over, (EXPERTS, ROUTER), seeds))
        arms.append(Arm(f"by-{name}", title, "ablation", f"by-{name}", config.sample.strategy, seeds))
    for number in (1, 2):
        over = {"partition.seed": 1000 + number}
        name, title = f"partition-{number}", f"another partition seed ({number})"
        members.append(Member(name, title, over, (EXPERTS, ROUTER), 1))
        arms.append(Arm(name, title, "ablation", name, config.sample.strategy, 1))
    return members, arms


def _warm(config: RunConfig, seeds: int) -> tuple[list[Member], list[Arm]]:
    """A short shared start: a tenth of the monolith's steps, counted once in each arm's total, which stays what it was."""
    trunk = max(1, config.monolith.steps // 10)
    left = 1 - trunk / config.monolith.steps
    over = {
        "expert.warm_start": "trunk",
        "expert.trunk_steps": trunk,
        "expert.steps": max(1, round(config.expert.steps * left)),
        "monolith.steps": config.monolith.steps - trunk,
    }
    batch = config.expert.batch
    small = {
        **over,
        "monolith.batch": batch,
        "monolith.steps": max(1, round((config.monolith.steps - trunk) * config.monolith.batch / batch)),
        "expert.trunk_steps": max(1, round(trunk * config.monolith.batch / batch)),
        "monolith.lr": config.study.small_batch_lr or config.monolith.lr,
    }
    members = [
        Member("warm", "shared warm start", over, (TRUNK, EXPERTS, ROUTER, MONOLITH), seeds),
        Member("warm-small", "shared warm start, small batch", small, (TRUNK, MONOLITH), seeds),
    ]
    arms = [
        Arm("warm", "experts from a shared warm start", "ablation", "warm", config.sample.strategy, seeds),
        Arm("warm-monolith", "monolith from the same warm start", "ablation", "warm", MONOLITH, seeds),
        Arm("warm-small", "monolith of batch B/K from a warm start", "ablation", "warm-small", MONOLITH, seeds),
    ]
    return members, arms


def _curve(config: RunConfig, seeds: int) -> tuple[list[Member], list[Arm]]:
    """The ratio against training FLOPs (steps) and expert width, both arms at each point."""
    expert, members, arms = config.expert, [], []
    head = expert.width // expert.heads
    points: dict[str, tuple[str, dict[str, Any]]] = {}
    for factor, label in ((0.5, "half"), (2, "double")):
        # Twice the width is four times the work: half as much again shows the direction.
        heads = max(1, round(expert.heads * min(factor, 1.5)))
        if heads != expert.heads:
            shape: dict[str, Any] = {"expert.width": heads * head, "expert.heads": heads}
            points[f"width-{heads * head}"] = (
                f"width {heads * head}",
                {**shape, **_small_router(config, heads * head)},
            )
        steps = max(1, round(expert.steps * factor))
        routed = max(1, round(config.router.steps * factor))
        points[f"steps-{label}"] = (f"{label} the steps", {"expert.steps": steps, "router.steps": routed})
    for name, (title, over) in points.items():
        rate = config.study.small_batch_lr or config.monolith.lr
        little = {**over, "monolith.steps": 0, "monolith.batch": expert.batch, "monolith.lr": rate}
        members.append(Member(name, title, {**over, "monolith.steps": 0}, (EXPERTS, ROUTER, MONOLITH), seeds))
        members.append(Member(f"{name}-small", f"{title}, small batch", little, (MONOLITH,), seeds))
        arms.append(Arm(name, f"{title}: experts", "ablation", name, config.sample.strategy, seeds))
        arms.append(Arm(f"{name}-monolith", f"{title}: monolith", "ablation", name, MONOLITH, seeds))
        arms.append(
            Arm(f"{name}-small-batch", f"{title}: monolith, batch B/K", "ablation", f"{name}-small", MONOLITH, seeds)
        )
    return members, arms


def _small_router(config: RunConfig, width: int) -> dict[str, Any]:
    """Half the router's width where the expert is half as wide, so that it stays within its share."""
    router = config.router
    if width >= config.expert.width or router.width < 16:
        return {}
    axes = rope_axes_for(router.width // 2 // router.heads)
    return {"router.width": router.width // 2, "router.rope_axes": list(axes)} if axes else {}


# --- configurations --------------------------------------------------------------------------------------------------


def member_config(config: RunConfig, member: Member, seed: int) -> RunConfig:
    """The configuration of a member for the ``seed``-th seed: clips, split, codec and captions are the run's own.

    Raises ConfigError where the member's keys cannot be used with this run.
    """
    base = config.run.seed
    values = config.model_dump(mode="json")
    nested: dict[str, Any] = {}
    shared = {"run.seed": base + seed, "clips.seed": config.clips.seed if config.clips.seed >= 0 else base}
    for key, value in {**shared, **member.overrides}.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    if config.partition.seed >= 0 and "seed" not in nested.get("partition", {}):
        nested.setdefault("partition", {})["seed"] = config.partition.seed + seed
    return budget.resolve(build(merge(values, nested), f"the study's member {member.name}"))
