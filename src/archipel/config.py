"""``run.toml``: the science of a run, typed. Written once at ``init``; its sha256 is the run's id.

Every key has a type, a default, a range and a sentence (docs/configuration.md is generated from them). What can be
known to be impossible is refused here, naming the key, the value and the nearest value that works.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archipel import FORMAT, store
from archipel.errors import ArchipelError, ConfigError, DamagedError

SourceName = Literal["fluent-emoji", "shapes", "folder", "webdataset", "huggingface"]
CodecName = Literal["patch-pca", "pixels"]
FeatureName = Literal["efficientnet", "transnet", "text"]
Strategy = Literal["top1", "top2", "full", "threshold", "ancestral", "oracle", "monolith"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunSection(Section):
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn: split, clusters, initialisation, order, noise.")
    preset: str = Field("", description="The preset that `init` started from; for the record.")


class Clips(Section):
    source: SourceName = Field("shapes", description="Where clips come from.")
    path: str = Field("", description="Folder, tar file or pattern, or data set (local folder or hub id); unused by fluent-emoji and shapes.")
    packages: tuple[int, ...] = Field((3,), description="fluent-emoji: which of the packages 1 to 4 to fetch (165 to 197 MB each).")
    variants: Literal["base", "all"] = Field("base", description="fluent-emoji: base emoji only, or skin tones as well (one content group with their base).")
    video_column: str = Field("video", description="huggingface: the column that holds the clip.")
    caption_column: str = Field("caption", description="huggingface: the column that holds the caption.")
    count: int = Field(0, ge=0, description="Use at most this many clips (0: all; shapes: 0 means 240).")
    frames: int = Field(8, ge=1, le=1024, description="Frames of a clip.")
    fps: float = Field(4.0, gt=0, le=240, description="Frames per second of a clip; source frames are picked by time.")
    start: float = Field(0.0, ge=0, description="Where the window starts in the source, in seconds.")
    size: int = Field(32, ge=8, le=2048, description="Height and width of a clip in pixels.")
    crop: Literal["center", "pad", "stretch"] = Field("center", description="How a frame becomes square: cut, padded with `background`, or stretched.")
    background: str = Field("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="Colour behind transparent pixels and of padding.")
    min_motion: float = Field(0.0, ge=0, le=1, description="Refuse clips whose mean absolute frame difference is below this (0 keeps stills).")
    max_rejected: float = Field(0.5, ge=0, le=1, description="Stop where more than this share of the clips cannot be used.")
    split: tuple[float, float, float] = Field((0.7, 0.1, 0.2), description="Shares of content groups for train, validation and test.")
    license: str = Field("", description="Licence of the source, for cards and reports; filled in where the source states one.")


class Codec(Section):
    kind: CodecName = Field("patch-pca", description="Clips <-> latents: PCA of space-time blocks fitted on training clips, or the pixels themselves.")
    patch: tuple[int, int, int] = Field((4, 8, 8), description="Block of frames x height x width that becomes one latent position.")
    channels: int = Field(96, ge=1, description="patch-pca: latent channels kept of the block's 3*t*h*w numbers.")
    gamma: float = Field(0.5, ge=0, le=1, description="patch-pca: components are divided by sigma^gamma (0: one scale, 1: whitened).")


class Text(Section):
    encoder: Literal["minilm"] = Field("minilm", description="Text encoder: the packaged MiniLM (tokens and pooled vector of 384).")
    tokens: int = Field(16, ge=4, le=256, description="Text tokens per caption; longer captions are cut, shorter ones padded and masked.")


class Partition(Section):
    k: int = Field(3, ge=1, le=64, description="Number of clusters, hence of experts.")
    method: Literal["kmeans", "random"] = Field("kmeans", description="Semantic clusters, or the control: content groups dealt out at random.")
    features: FeatureName = Field("transnet", description="Features to cluster by; not those of the primary metric.")
    fine: int = Field(48, ge=1, description="Fine k-means centroids before consolidation to k (at most a third of the training groups is used).")
    balanced: bool = Field(False, description="Bound every cluster to its equal share of training clips (rounded up to whole groups).")


class Backbone(Section):
    """Shape and schedule that experts and monolith share; the router has a smaller one of its own."""

    width: int = Field(160, ge=8, description="Width of the transformer; heads must divide it.")
    heads: int = Field(5, ge=1, description="Attention heads.")
    rope_axes: tuple[int, int, int] = Field((8, 12, 12), description="RoPE dimensions for time, height, width: even, summing to width / heads.")
    steps: int = Field(1000, ge=1, description="Optimizer steps of one arm.")
    batch: int = Field(16, ge=1, description="Clips per step.")
    lr: float = Field(2e-3, gt=0, description="Learning rate (constant after warm-up, with a linear cooldown at the end).")
    warmup: int = Field(20, ge=0, description="Steps of linear warm-up.")
    cooldown: float = Field(0.2, ge=0, le=1, description="Share of the steps over which the rate falls linearly to zero at the end.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Bound on the gradient's norm.")
    ema: float = Field(0.05, gt=0, le=1, description="Length of the weight average, as a share of the arm's own steps.")
    validate_every: int = Field(100, ge=1, description="Steps between validation losses.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")


class Expert(Backbone):
    backbone: Literal["flux"] = Field("flux", description="Which diffusers transformer: flux = FluxTransformer2DModel with video ids.")
    double_blocks: int = Field(1, ge=0, description="Double-stream blocks (text and video with weights of their own).")
    single_blocks: int = Field(3, ge=0, description="Single-stream blocks.")
    prediction: Literal["velocity", "x0"] = Field("velocity", description="What the network's output means.")
    text_dropout: float = Field(0.1, ge=0, le=1, description="Share of captions replaced by the null text in training (the router's too).")
    shift: float = Field(1.0, gt=0, description="Training time shift a: t -> a t / (1 + (a - 1) t).")


class Monolith(Section):
    steps: int = Field(0, ge=0, description="Steps of the monolith (0: resolved at init so that its FLOPs are those of all experts and the router).")
    batch: int = Field(0, ge=0, description="Batch of the monolith (0: k times expert.batch).")
    lr: float = Field(0.0, ge=0, description="Learning rate of the monolith (0: expert.lr).")


class Router(Backbone):
    width: int = 64
    heads: int = 2
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    blocks: int = Field(2, ge=1, description="Single-stream blocks.")
    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.1


class Compute(Section):
    tolerance: float = Field(0.01, gt=0, le=0.2, description="How far training FLOPs of archipelago and monolith may differ and still be called matched.")
    archipelago_flops: float = Field(0.0, ge=0, description="Planned training FLOPs of all experts and the router (resolved at init).")
    monolith_flops: float = Field(0.0, ge=0, description="Planned training FLOPs of the monolith (resolved at init).")


class Sample(Section):
    strategy: Strategy = Field("top1", description="The primary strategy: what `generate` uses and what the headline compares.")
    solver: Literal["euler", "heun"] = Field("euler", description="ODE solver.")
    steps: int = Field(20, ge=1, le=1000, description="Solver steps.")
    shift: float = Field(1.0, gt=0, description="Sampling time shift (apart from the training shift).")
    guidance: float = Field(2.0, ge=0, le=50, description="Classifier-free guidance scale (1: off).")
    composition: Literal["mixture-of-guided", "guided-mixture"] = Field("mixture-of-guided", description="Guide each expert and then mix, or mix each branch and then guide.")
    threshold: float = Field(0.1, gt=0, lt=1, description="Strategy threshold: experts below this share are left out.")


class Evaluate(Section):
    split: Literal["validation", "test"] = Field("test", description="Whose captions are generated and whose clips are compared with.")
    count: int = Field(96, ge=2, description="Clips generated per arm (captions are repeated with new noise where there are fewer).")
    arms: tuple[Strategy, ...] = Field(STRATEGIES, description="Arms to generate and score.")
    primary: str = Field("KID-efficientnet-appearance", description="Primary metric, fixed before the test split is opened.")
    pca: int = Field(32, ge=2, le=512, description="Dimensions of the PCA (fitted on real training clips) for Frechet distances.")
    frames: int = Field(4, ge=1, description="Frames per clip that the image network looks at.")
    image_size: int = Field(128, ge=32, le=512, description="Side of the image network's input.")


class RunConfig(Section):
    """All of ``run.toml``."""

    format: Annotated[int, Field(ge=1, description="Version of the run's files.")] = FORMAT
    run: RunSection = RunSection()
    clips: Clips = Clips()
    codec: Codec = Codec()
    text: Text = Text()
    partition: Partition = Partition()
    expert: Expert = Expert()
    monolith: Monolith = Monolith()
    router: Router = Router()
    compute: Compute = Compute()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()


# --- checks that need more than one key ------------------------------------------------------------------------------


def _nearest_multiple(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return str(above) if below < 1 else f"{below} or {above}"


def _check_transformer(name: str, part: Backbone) -> None:
    if part.width % part.heads:
        raise ConfigError(
            f"{name}.width = {part.width} is not divisible by {name}.heads = {part.heads}: "
            f"the nearest widths that work are {_nearest_multiple(part.width, part.heads)}"
        )
    head, axes = part.width // part.heads, part.rope_axes
    if sum(axes) != head or any(axis % 2 or axis <= 0 for axis in axes):
        fit = rope_axes_for(head)
        advice = f"{list(fit)} fits" if fit else f"a head width of {head} cannot be split into three even parts; use 8 or more, even"
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
    clips, codec = config.clips, config.codec
    pt, ph, pw = codec.patch
    if min(codec.patch) < 1:
        raise ConfigError(f"codec.patch = {list(codec.patch)} must hold positive numbers, for example [4, 8, 8]")
    if clips.frames % pt:
        raise ConfigError(
            f"clips.frames = {clips.frames} is not divisible by the temporal patch codec.patch[0] = {pt}: "
            f"the nearest that works is {_nearest_multiple(clips.frames, pt)}"
        )
    for axis, size in (("height", ph), ("width", pw)):
        if clips.size % size:
            raise ConfigError(
                f"clips.size = {clips.size} is not divisible by the patch's {axis} {size} (codec.patch): "
                f"the nearest that works is {_nearest_multiple(clips.size, size)}"
            )
    numbers = 3 * pt * ph * pw
    if codec.kind == "patch-pca" and codec.channels > numbers:
        raise ConfigError(f"codec.channels = {codec.channels} is more than a block's {numbers} numbers: at most {numbers}")
    if abs(sum(clips.split) - 1) > 1e-6 or min(clips.split) < 0 or clips.split[0] <= 0:
        raise ConfigError(f"clips.split = {list(clips.split)} must be shares that sum to 1, the first above 0, such as [0.7, 0.1, 0.2]")
    if clips.source in ("folder", "webdataset", "huggingface") and not clips.path:
        raise ConfigError(f"clips.path is empty, but clips.source = {clips.source!r} needs one: give --data PATH")
    if clips.source == "fluent-emoji" and (not clips.packages or any(p not in (1, 2, 3, 4) for p in clips.packages)):
        raise ConfigError(f"clips.packages = {list(clips.packages)} must name packages among 1, 2, 3, 4, such as [3]")
    _check_transformer("expert", config.expert)
    _check_transformer("router", config.router)
    if config.expert.double_blocks + config.expert.single_blocks < 1:
        raise ConfigError("expert.double_blocks and expert.single_blocks are both 0: at least one block is needed")
    if clips.source == "shapes":
        check_count(config, clips.count or 240)
    if config.evaluate.frames > clips.frames:
        raise ConfigError(f"evaluate.frames = {config.evaluate.frames} is more than clips.frames = {clips.frames}: at most {clips.frames}")
    unknown = [arm for arm in config.evaluate.arms if arm == "top2" and config.partition.k < 2]
    if unknown:
        raise ConfigError("evaluate.arms names top2, but partition.k = 1: take it out or use k of 2 or more")


def check_count(config: RunConfig, clips: int) -> None:
    """Refuse a K that so many clips (or training groups) cannot fill."""
    if config.partition.k > clips:
        raise ConfigError(f"partition.k = {config.partition.k} is larger than the number of clips {clips}: at most {clips} works")


# --- reading, writing, overriding ------------------------------------------------------------------------------------


def known_keys() -> list[str]:
    keys = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def _describe(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known_keys() + list(RunConfig.model_fields), n=1, cutoff=0.5)
            lines.append(f"{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        message = item["msg"][0].lower() + item["msg"][1:]
        if item["type"] == "literal_error":
            near = difflib.get_close_matches(str(item["input"]), [part.strip(" '") for part in str(item["ctx"]["expected"]).replace(" or ", ", ").split(",")], n=1, cutoff=0.3)
            message += f"; the nearest is {near[0]!r}" if near else ""
        lines.append(f"{key} = {item['input']!r}: {message}")
    return f"{where}: " + "; ".join(lines)


def build(values: Mapping[str, Any], where: str = "run.toml") -> RunConfig:
    """Validate nested values. Raises ConfigError naming key, value and the nearest right one."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, where)) from error
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` with ``over``'s keys on top."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_sets(pairs: Iterable[str]) -> dict[str, Any]:
    """``["expert.steps=2000"]`` -> nested values; the right side is TOML, or else a plain string."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} is not of the form section.key=value, such as expert.steps=2000")
        if key not in known_keys():
            near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
            raise ConfigError(f"--set {pair!r}: {key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        section, _, name = key.partition(".")
        values = merge(values, {section: {name: value}} if name else {section: value})
    return values


def lookup(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def to_toml(config: RunConfig) -> str:
    import tomli_w

    head = (
        "# The science of this run, resolved. Written once; its sha256 is the run's id, and it wins on resume.\n"
        "# Every key is explained in docs/configuration.md.\n"
    )
    return head + tomli_w.dumps(config.model_dump(mode="json"))


def read(path: Path) -> tuple[RunConfig, str]:
    """Read ``run.toml``: the configuration and the run's id. A newer format is refused before anything else is read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArchipelError(f"{path} is not there: make a run first with `archipel init {path.parent}`") from error
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not readable TOML ({error})") from error
    version = values.get("format")
    if not isinstance(version, int):
        raise ConfigError(f"{path}: format is missing; it is {FORMAT} for this Archipel")
    if version > FORMAT:
        raise ArchipelError(
            f"{path} has format {version}, this Archipel reads format {FORMAT}: install a newer Archipel (one that writes format {version})"
        )
    return build(values, str(path)), store.sha256_bytes(data)
