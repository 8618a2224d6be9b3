"""What can be known to be impossible is refused, naming the key, the value and the nearest value that works."""

from __future__ import annotations

from archipel.config.fits import check_fits, nearest
from archipel.config.schema import FEATURE_NETWORK, Backbone, RunConfig
from archipel.errors import ConfigError


def _check_transformer(name: str, part: Backbone) -> None:
    if part.width % part.heads:
        raise ConfigError(
            f"{name}.width = {part.width} is not divisible by {name}.heads = {part.heads}: "
            f"the nearest widths that work are {nearest(part.width, part.heads)}"
        )
    head, axes = part.width // part.heads, part.rope_axes
    if sum(axes) != head or any(axis % 2 or axis <= 0 for axis in axes):
        fit = rope_axes_for(head)
        advice = (
            f"{list(fit)} fits"
            if fit
            else f"a head width of {head} cannot be split into three even parts; use 8 or more, even"
        )
        raise ConfigError(
            f"{name}.rope_axes = {list(axes)} must be even, positive and sum to the head width "
            f"{name}.width / {name}.heads = {head}: {advice}"
        )


def rope_axes_for(head: int) -> tuple[int, int, int] | None:
    """A split of a head's width into even parts for time, height, width: time about a quarter; None where impossible."""
    if head % 2 or head < 6:
        return None
    time = max(2, head // 8 * 2)
    if (head - time) % 4:
        time += 2
    side = (head - time) // 2
    return (time, side, side) if side >= 2 and side % 2 == 0 else None


def check(config: RunConfig) -> None:
    """Refuse what cannot work, as far as it can be known without looking at the clips. Raises ConfigError."""
    if config.islands.lease < 2.5 * config.islands.heartbeat:
        raise ConfigError(
            f"islands.lease = {config.islands.lease:g} is too short for islands.heartbeat = {config.islands.heartbeat:g}: one "
            f"heartbeat may be late; the nearest that works is {2.5 * config.islands.heartbeat:g}"
        )
    check_fits(config)
    clips = config.clips
    if abs(sum(clips.split) - 1) > 1e-6 or min(clips.split) < 0 or clips.split[0] <= 0:
        raise ConfigError(
            f"clips.split = {list(clips.split)} must be shares that sum to 1, the first above 0, such as [0.7, 0.1, 0.2]"
        )
    if clips.source in ("folder", "webdataset", "huggingface") and not clips.path:
        raise ConfigError(f"clips.path is empty, but clips.source = {clips.source!r} needs one: give --data PATH")
    if clips.source == "fluent-emoji" and (not clips.packages or any(p not in (1, 2, 3, 4) for p in clips.packages)):
        raise ConfigError(f"clips.packages = {list(clips.packages)} must name packages among 1, 2, 3, 4, such as [3]")
    _check_transformer("expert", config.expert)
    _check_transformer("router", config.router)
    if config.expert.double_blocks + config.expert.single_blocks < 1:
        raise ConfigError("expert.double_blocks and expert.single_blocks are both 0: at least one block is needed")
    if config.expert.warm_start == "trunk" and not config.expert.trunk_steps:
        raise ConfigError(
            "expert.trunk_steps = 0, but expert.warm_start = 'trunk' starts from that training: give it steps, at least 1, "
            "such as a tenth of monolith.steps"
        )
    _check_tasks(config)
    _check_base(config)
    if clips.source == "shapes":
        check_count(config, clips.count or 240)
    _check_circle(config)
    if config.evaluate.frames > clips.frames:
        raise ConfigError(
            f"evaluate.frames = {config.evaluate.frames} is more than clips.frames = {clips.frames}: at most {clips.frames}"
        )
    if "top2" in config.evaluate.arms and config.partition.k < 2:
        raise ConfigError("evaluate.arms names top2, but partition.k = 1: take it out or use k of 2 or more")


def _check_tasks(config: RunConfig) -> None:
    """The mix of training tasks must be one, and the clips long enough for it."""
    tasks, clips, codec = config.expert.tasks, config.clips, config.codec
    if min(tasks) < 0 or not sum(tasks) > 0:
        raise ConfigError(
            f"expert.tasks = {list(tasks)} must be four weights of 0 or more, one of them positive: text only, first frame "
            "given, first and last, last; such as [1, 5, 1, 1]"
        )
    frames = (clips.frames - 1) // codec.patch[0] + 1 if codec.causal else clips.frames // codec.patch[0]
    if frames < 2 and (tasks[2] > 0 or tasks[3] > 0):
        raise ConfigError(
            f"expert.tasks = {list(tasks)} gives last frames, but clips of {clips.frames} frames have one latent frame "
            f"(codec.patch[0] = {codec.patch[0]}), which is the first: use [{tasks[0]:g}, {tasks[1]:g}, 0, 0], or longer clips"
        )
    if config.router.reads_image and not config.expert.given_frames:
        raise ConfigError(
            f"router.reads_image = true, but expert.tasks = {list(tasks)} never gives a frame: set it to false, or give "
            "frames a share, such as [1, 5, 1, 1]"
        )


def _check_base(config: RunConfig) -> None:
    """What experts begin with, or are adapters of: one thing, and one that can learn what is asked of it."""
    part = config.expert
    if part.weights and part.warm_start:
        raise ConfigError(
            f"expert.weights = {part.weights!r} and expert.warm_start = {part.warm_start!r} are both a start: leave one of them out"
        )
    if not part.lora_rank:
        return
    if part.weights and any(part.tasks[1:]):
        raise ConfigError(
            f"expert.tasks = {list(part.tasks)} gives frames to a network whose projection of them is frozen "
            f"(expert.lora_rank = {part.lora_rank}) and knows none yet: use expert.lora_rank = 0, or a trunk that learns it"
        )
    if config.monolith.condition == "cluster":
        raise ConfigError(
            "monolith.condition = 'cluster' needs a projection that learns the cluster, which adapters leave frozen: use "
            "expert.lora_rank = 0, or monolith.condition = 'none'"
        )


def _check_circle(config: RunConfig) -> None:
    """The primary metric's network must not be the one that made the partition (no circles)."""
    partition, primary = config.partition, config.evaluate.primary
    network = FEATURE_NETWORK[partition.features]
    if partition.method == "kmeans" and f"-{network}" in primary:
        other = "transnet" if network == "efficientnet" else "efficientnet-appearance"
        raise ConfigError(
            f"evaluate.primary = {primary!r} judges by the network that made the clusters "
            f"(partition.features = {partition.features!r}): use another extractor's, such as 'KID-{other}'"
        )


def check_count(config: RunConfig, clips: int) -> None:
    """Refuse a K that so many clips (or training groups) cannot fill."""
    if clips < 1:
        raise ConfigError(
            f"clips.path = {config.clips.path!r} holds no clips that the source {config.clips.source} reads"
        )
    if config.partition.k > clips:
        raise ConfigError(
            f"partition.k = {config.partition.k} is larger than the number of clips {clips}: at most {clips} works"
        )
