"""The keys of ``run.toml``: type, default, range and a sentence each (docs/configuration.md is generated from them)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from archipel import FORMAT

SourceName = Literal["fluent-emoji", "shapes", "folder", "webdataset", "huggingface"]
CodecName = Literal["patch-pca", "pixels", "autoencoder"]
TextName = Literal["minilm", "t5", "umt5", "clip", "t5+clip"]
BackboneName = Literal["flux", "wan", "ltx", "hunyuan", "cogvideox"]
FeatureName = Literal["efficientnet", "transnet", "text", "motion", "appearance+motion"]
# config.partition.features -> the networks that they come from: what made the clusters must not judge the clips.
FEATURE_NETWORK: dict[FeatureName, str] = {
    "efficientnet": "efficientnet",
    "transnet": "transnet",
    "text": "minilm",
    "motion": "efficientnet",
    "appearance+motion": "efficientnet",
}
Strategy = Literal["top1", "top2", "full", "threshold", "ancestral", "oracle", "monolith"]
Reads = Literal["both", "latent", "text"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def _later(default: Any, **about: Any) -> Any:
    """A key that came after the first runs: it is written only where it differs from its default, so that the same
    settings make the same ``run.toml``, and so the same run id, as before there was a choice."""
    return Field(default, json_schema_extra={"later": True}, **about)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Lists become tuples and whole numbers become floats; true is no number and "12" is none either."""
        kind = cls.model_fields[info.field_name or ""].annotation
        numbers = {int, float, ...}
        if kind is bool and not isinstance(value, bool):
            raise PydanticCustomError("wrong_type", "expected true or false")
        if kind in numbers or numbers.issuperset(get_args(kind) or (str,)):
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, bool | str):
                    raise PydanticCustomError("wrong_type", "expected a number, without quotes")
        return value


class RunSection(Section):
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of everything that is drawn: split, clusters, initialisation, order, noise.",
    )
    preset: str = Field("", description="The preset that `init` started from; for the record.")


class Clips(Section):
    source: SourceName = Field("shapes", description="Where clips come from.")
    path: str = Field(
        "",
        description="Folder, tar file or pattern, or data set (local folder or hub id); unused by fluent-emoji and shapes.",
    )
    packages: tuple[int, ...] = Field(
        (3,), description="fluent-emoji: which of the packages 1 to 4 to fetch (165 to 197 MB each)."
    )
    variants: Literal["base", "all"] = Field(
        "base", description="fluent-emoji: base emoji only, or skin tones as well (one content group with their base)."
    )
    video_column: str = Field("video", description="huggingface: the column that holds the clip.")
    caption_column: str = Field("caption", description="huggingface: the column that holds the caption.")
    count: int = Field(0, ge=0, description="Use at most this many clips (0: all; shapes: 0 means 240).")
    frames: int = Field(8, ge=1, le=1024, description="Frames of a clip.")
    fps: float = Field(4.0, gt=0, le=240, description="Frames per second of a clip; source frames are picked by time.")
    start: float = Field(0.0, ge=0, description="Where the window starts in the source, in seconds.")
    phases: int = Field(
        1,
        ge=1,
        le=16,
        description="Windows per clip for training, shifted evenly around the loop (augmentation of every arm; other videos have one).",
    )
    size: int = Field(32, ge=8, le=2048, description="Height and width of a clip in pixels.")
    crop: Literal["center", "pad", "stretch"] = Field(
        "center", description="How a frame becomes square: cut, padded with `background`, or stretched."
    )
    background: str = Field(
        "#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="Colour behind transparent pixels and of padding."
    )
    min_motion: float = Field(
        0.0, ge=0, le=1, description="Refuse clips whose mean absolute frame difference is below this (0 keeps stills)."
    )
    max_rejected: float = Field(
        0.5, ge=0, le=1, description="Stop where more than this share of the clips cannot be used."
    )
    split: tuple[float, float, float] = Field(
        (0.7, 0.1, 0.2), description="Shares of content groups for train, validation and test."
    )
    license: str = Field(
        "", description="Licence of the source, for cards and reports; filled in where the source states one."
    )
    seed: int = _later(
        -1,
        ge=-1,
        lt=2**31,
        description="Seed of what *prepare* draws (choice of clips, split, codec) and of the captions that are evaluated (-1: "
        "run.seed): runs that differ in run.seed only can share clips, latents and captions.",
    )


class Codec(Section):
    kind: CodecName = Field(
        "patch-pca",
        description="Clips <-> latents: PCA of space-time blocks fitted on training clips, the pixels themselves, or a trained "
        "autoencoder of diffusers (`init --codec`).",
    )
    patch: tuple[int, int, int] = Field(
        (4, 8, 8),
        description="Block of frames x height x width that becomes one latent position (autoencoder: its own, resolved at init).",
    )
    channels: int = Field(
        96,
        ge=1,
        description="patch-pca: latent channels kept of the block's 3*t*h*w numbers (autoencoder: its own, resolved at init).",
    )
    gamma: float = Field(
        0.5, ge=0, le=1, description="patch-pca: components are divided by sigma^gamma (0: one scale, 1: whitened)."
    )
    path: str = _later(
        "",
        description="autoencoder: folder or hub id (hub ids: `name` or `name:subfolder`); *prepare* takes it into the run, and "
        "nothing reads this path afterwards.",
    )
    model: str = _later("", description="autoencoder: class in diffusers, resolved at init.")
    causal: bool = _later(
        False,
        description="autoencoder: the first frame has a latent frame of its own, so clips have 4n + 1 frames where patch[0] is "
        "4; resolved at init.",
    )
    tiling: bool = _later(False, description="autoencoder: encode and decode large frames in overlapping tiles.")
    sha256: str = _later(
        "", description="autoencoder: sha256 of its weights, resolved at init where they are on this disk."
    )


class Text(Section):
    encoder: TextName = Field(
        "minilm",
        description="Text encoder: the packaged MiniLM (tokens and pooled vector of 384), or transformers' own from `text.path`: "
        "tokens of T5, umT5 or CLIP; pooled vector of CLIP, else the mean of the tokens.",
    )
    tokens: int = Field(
        16,
        ge=4,
        le=1024,
        description="Text tokens per caption; longer captions are cut, shorter ones padded and masked.",
    )
    path: str = _later(
        "",
        description="Folder or hub ids of the text encoder: a pipeline's folder (text_encoder, tokenizer, text_encoder_2, "
        "tokenizer_2), one encoder's, or two joined by a plus sign; *prepare* takes it into the run.",
    )
    width: int = _later(0, ge=0, description="Width of the tokens, resolved at init (0: MiniLM's 384).")
    pooled_width: int = _later(0, ge=0, description="Width of the pooled vector, resolved at init (0: MiniLM's 384).")
    padding: Literal["zero", "kept"] = _later(
        "zero",
        description="Padding behind a caption: masked in the encoder and zero, or kept as FLUX, LTX and CogVideoX were trained "
        "with it (the encoder sees it, too); resolved at init where `expert.weights` are of those.",
    )
    sha256: str = _later(
        "", description="sha256 over the encoders' weights, resolved at init where they are on this disk."
    )


class Partition(Section):
    k: int = Field(3, ge=1, le=64, description="Number of clusters, hence of experts.")
    method: Literal["kmeans", "random"] = Field(
        "kmeans", description="Semantic clusters, or the control: content groups dealt out at random."
    )
    features: FeatureName = Field(
        "transnet",
        description="Features to cluster by; not of the primary metric's network. efficientnet is what its frames show, motion "
        "how that changes between frames, appearance+motion both side by side, each scaled to unit variance.",
    )
    fine: int = Field(
        48,
        ge=1,
        description="Fine k-means centroids before consolidation to k (at most a third of the training groups is used).",
    )
    balanced: bool = Field(
        False, description="Bound every cluster to its equal share of training clips (rounded up to whole groups)."
    )
    seed: int = _later(-1, ge=-1, lt=2**31, description="Seed of the clusters, or of the dealing (-1: run.seed).")


class Backbone(Section):
    """Shape and schedule that experts and monolith share; the router has a smaller one of its own."""

    width: int = Field(160, ge=8, description="Width of the transformer; heads must divide it.")
    heads: int = Field(5, ge=1, description="Attention heads.")
    rope_axes: tuple[int, int, int] = Field(
        (8, 12, 12), description="RoPE dimensions for time, height, width: even, summing to width / heads."
    )
    steps: int = Field(1000, ge=1, description="Optimizer steps of one arm.")
    batch: int = Field(16, ge=1, description="Clips per step.")
    lr: float = Field(
        2e-3, gt=0, description="Learning rate (constant after warm-up, with a linear cooldown at the end)."
    )
    warmup: int = Field(20, ge=0, description="Steps of linear warm-up.")
    cooldown: float = Field(
        0.2, ge=0, le=1, description="Share of the steps over which the rate falls linearly to zero at the end."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Bound on the gradient's norm.")
    ema: float = Field(0.05, gt=0, le=1, description="Length of the weight average, as a share of the arm's own steps.")
    validate_every: int = Field(100, ge=1, description="Steps between validation losses.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")


class Expert(Backbone):
    backbone: BackboneName = Field(
        "flux",
        description="Which diffusers transformer: flux = FluxTransformer2DModel with video ids, wan = WanTransformer3DModel, ltx = "
        "LTXVideoTransformer3DModel, hunyuan = HunyuanVideoTransformer3DModel, cogvideox = CogVideoXTransformer3DModel.",
    )
    double_blocks: int = Field(
        1,
        ge=0,
        description="Double-stream blocks (text and video with weights of their own). A backbone with one kind of block has "
        "double_blocks + single_blocks of it.",
    )
    single_blocks: int = Field(3, ge=0, description="Single-stream blocks.")
    patch: int = _later(
        1, ge=1, le=8, description="Latent positions per side that are packed into one token (2: 2x2, as FLUX does)."
    )
    weights: str = _later(
        "",
        description="Folder or hub id of trained weights of this backbone that experts and monolith begin with; *prepare* takes "
        "them into the run (`base/`).",
    )
    network: dict[str, Any] = _later(
        {},
        description="Configuration of the transformer in `weights`, resolved at init; width, heads and blocks are its own.",
    )
    weights_sha256: str = _later("", description="sha256 of `weights`, resolved at init where they are on this disk.")
    lora_rank: int = _later(
        0,
        ge=0,
        le=1024,
        description="Rank of the low-rank adapter that an expert is, over frozen weights (`weights`, or the trunk); 0: experts "
        "are whole networks.",
    )
    lora_alpha: float = _later(0.0, ge=0, description="Scale of the adapters is lora_alpha / lora_rank (0: lora_rank).")
    lora_targets: Literal["attention", "linear"] = _later(
        "attention",
        description="Layers that get an adapter: the attention's projections, or every linear layer of the blocks.",
    )
    tasks: tuple[float, float, float, float] = _later(
        (1.0, 0.0, 0.0, 0.0),
        description="Mix of training tasks: text only, first frame given, first and last, last. Open-Sora's image-to-video "
        "recipe is [1, 5, 1, 1].",
    )
    pooled_dropout: float = _later(
        -1.0,
        ge=-1,
        le=1,
        description="Share of pooled vectors dropped by a draw of their own (two text encoders: Open-Sora drops each with 0.316); "
        "-1: dropped together with the tokens.",
    )
    prediction: Literal["velocity", "x0"] = Field("velocity", description="What the network's output means.")
    text_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the null text in training (the router's too)."
    )
    shift: float = Field(1.0, gt=0, description="Training time shift a: t -> a t / (1 + (a - 1) t).")
    keep: Literal["last", "best"] = _later(
        "last",
        description="Weights that an expert and the monolith end with: the last average, or the one that validated best.",
    )
    warm_start: Literal["", "trunk"] = _later(
        "",
        description="trunk: experts and monolith begin with the weights of a short shared training (`trunk/`), which travel in "
        "their shards; its FLOPs are counted once in each side's total. The router begins afresh.",
    )
    trunk_steps: int = _later(
        0,
        ge=0,
        description="Steps of the shared training on all clips, with the monolith's batch and rate and a schedule of its own "
        "(0: there is none).",
    )

    @property
    def given_frames(self) -> bool:
        """Whether some task gives frames of the clip: then networks have C + 1 further input channels for them."""
        return any(weight > 0 for weight in self.tasks[1:])


class Monolith(Section):
    steps: int = Field(
        0,
        ge=0,
        description="Steps of the monolith (0: resolved at init so that its FLOPs are those of all experts and the router).",
    )
    batch: int = Field(0, ge=0, description="Batch of the monolith (0: k times expert.batch).")
    lr: float = Field(0.0, ge=0, description="Learning rate of the monolith (0: expert.lr).")
    condition: Literal["none", "cluster"] = _later(
        "none",
        description="cluster (a control): the monolith is told the clip's cluster beside its caption, in training the clip's "
        "own, in use one that is drawn from p(k | caption).",
    )


class Router(Backbone):
    width: int = 64
    heads: int = 2
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    blocks: int = Field(2, ge=1, description="Single-stream blocks.")
    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.1
    reads: Reads = _later(
        "both",
        description="What the router looks at: the noisy latents and the caption, or (controls) one of them only: latent never "
        "sees a caption; text sees noise of t = 1 instead of the latents and gives p(k | caption).",
    )
    reads_image: bool = _later(
        False,
        description="Whether the router, too, is given the frames that a clip must begin or end with (see expert.tasks).",
    )


class Compute(Section):
    tolerance: float = Field(
        0.01,
        gt=0,
        le=0.2,
        description="How far training FLOPs of archipelago and monolith may differ and still be called matched.",
    )
    archipelago_flops: float = Field(
        0.0, ge=0, description="Planned training FLOPs of all experts and the router (resolved at init)."
    )
    monolith_flops: float = Field(0.0, ge=0, description="Planned training FLOPs of the monolith (resolved at init).")


class Sample(Section):
    strategy: Strategy = Field(
        "top1", description="The primary strategy: what `generate` uses and what the headline compares."
    )
    solver: Literal["euler", "heun"] = Field("euler", description="ODE solver.")
    steps: int = Field(20, ge=1, le=1000, description="Solver steps.")
    shift: float = Field(1.0, gt=0, description="Sampling time shift (apart from the training shift).")
    guidance: float = Field(2.0, ge=0, le=50, description="Classifier-free guidance scale (1: off).")
    composition: Literal["mixture-of-guided", "guided-mixture"] = Field(
        "mixture-of-guided", description="Guide each expert and then mix, or mix each branch and then guide."
    )
    threshold: float = Field(0.1, gt=0, lt=1, description="Strategy threshold: experts below this share are left out.")


class Evaluate(Section):
    split: Literal["validation", "test"] = Field(
        "test", description="Whose captions are generated and whose clips are compared with."
    )
    count: int = Field(
        96, ge=2, description="Clips generated per arm (captions are repeated with new noise where there are fewer)."
    )
    showcase: int = Field(
        12,
        ge=0,
        description="Training captions drawn with new noise for the report, by the primary strategy and the monolith; not scored.",
    )
    arms: tuple[Strategy, ...] = Field(STRATEGIES, description="Arms to generate and score.")
    primary: str = Field(
        "KID-efficientnet-appearance", description="Primary metric, fixed before the test split is opened."
    )
    pca: int = Field(
        32, ge=2, le=512, description="Dimensions of the PCA (fitted on real training clips) for Frechet distances."
    )
    frames: int = Field(4, ge=1, description="Frames per clip that the image network looks at.")
    image_size: int = Field(128, ge=32, le=512, description="Side of the image network's input.")


class Study(Section):
    """What `archipel study` needs beside the rest: chosen on validation, like every other setting."""

    count: int = _later(
        0,
        ge=0,
        description="Clips per arm, seed and prompt set (0: evaluate.count); captions come back with new noise.",
    )
    small_batch_lr: float = _later(
        0.0,
        ge=0,
        description="Learning rate of the control monolith with batch B/K and K times the steps (0: monolith.lr).",
    )


class Islands(Section):
    """Agreed by all islands of a run, and therefore here and not in a machine's own settings."""

    heartbeat: float = Field(60.0, ge=2, le=3600, description="Seconds between the signs of life of who holds a job.")
    lease: float = Field(
        300.0,
        ge=6,
        le=86400,
        description="A job whose holder was seen standing still for so many seconds may be taken over.",
    )


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
    study: Study = Study()
    islands: Islands = Islands()

    @property
    def clips_seed(self) -> int:
        """Seed of what *prepare* draws, and of the captions that are evaluated."""
        return self.run.seed if self.clips.seed < 0 else self.clips.seed

    @property
    def partition_seed(self) -> int:
        return self.run.seed if self.partition.seed < 0 else self.partition.seed
