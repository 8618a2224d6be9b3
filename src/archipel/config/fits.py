"""Whether codec, text encoder, backbone and clips fit together; refused naming both sides and the nearest that works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.config.schema import BackboneName, RunConfig
from archipel.errors import ConfigError

# config.expert.backbone -> class in diffusers
BACKBONE_CLASS: dict[BackboneName, str] = {
    "flux": "FluxTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
}
# What a network's configuration calls the widths of the text it reads (with diffusers' default), tokens and pooled vector.
_TEXT_KEYS: dict[str, tuple[tuple[str, int], tuple[str, int] | None]] = {
    "flux": (("joint_attention_dim", 4096), ("pooled_projection_dim", 768)),
    "wan": (("text_dim", 4096), None),
    "ltx": (("caption_channels", 4096), None),
    "hunyuan": (("text_embed_dim", 4096), ("pooled_projection_dim", 768)),
    "cogvideox": (("text_embed_dim", 4096), None),
}
_CHANNELS = {"flux": 64, "wan": 16, "ltx": 128, "hunyuan": 16, "cogvideox": 16}  # diffusers' defaults of in_channels
_CLIP_TOKENS = 77  # positions that CLIP's text encoder has
_DECODES_ODD = "AutoencoderKLCogVideoX"  # gives 4n + 1 frames back only where it has an odd number of latent frames


def frame_step(model: str, patch: int) -> int:
    """Clips of an autoencoder have a multiple of so many frames, and one more where it is causal."""
    return 2 * patch if model == _DECODES_ODD else patch


def network_patch(expert: Mapping[str, Any]) -> tuple[int, int]:
    """(time, space): latent positions per side that become one token, of the section ``expert``."""
    network = expert.get("network") or {}
    if not network or expert.get("backbone") == "flux":
        return 1, int(expert.get("patch") or 1)
    found, time = network.get("patch_size"), network.get("patch_size_t")
    if isinstance(found, list | tuple):
        return int(found[0]), int(found[-1])
    default = 2 if expert.get("backbone") in ("hunyuan", "cogvideox") else 1
    return int(time or 1), int(found or default)


def side_step(patch: int, expert: Mapping[str, Any]) -> int:
    """Height and width of clips are multiples of so many pixels."""
    return patch * network_patch(expert)[1]


def nearest(value: int, step: int, rest: int = 0) -> str:
    """The nearest of rest, rest + step, rest + 2 step, ... on either side, above 0, for messages."""
    below = (value - rest) // step * step + rest
    return str(below + step) if below < 1 else f"{below} or {below + step}"


def check_fits(config: RunConfig) -> None:
    """Refuse parts that do not fit together, as far as the configuration alone can tell. Raises ConfigError."""
    _check_codec(config)
    _check_frames(config)
    _check_size(config)
    _check_text(config)
    _check_expert(config)
    if config.expert.network:
        _check_network(config)


def _check_codec(config: RunConfig) -> None:
    codec = config.codec
    if min(codec.patch) < 1:
        raise ConfigError(f"codec.patch = {list(codec.patch)} must hold positive numbers, for example [4, 8, 8]")
    if codec.kind == "autoencoder" and not codec.model:
        raise ConfigError("codec.kind = 'autoencoder' needs one: give it with --codec FOLDER")
    if codec.kind != "autoencoder" and (codec.path or codec.model or codec.causal or codec.tiling):
        raise ConfigError(
            f"codec.path, model, causal and tiling belong to codec.kind = 'autoencoder', which is {codec.kind!r}"
        )
    if codec.tiling and codec.model == "AutoencoderTiny" and codec.channels != 4:
        raise ConfigError(
            f"codec.tiling = true, but AutoencoderTiny tiles latents of 4 channels only, and this one has {codec.channels}: leave it out"
        )
    numbers = 3 * codec.patch[0] * codec.patch[1] * codec.patch[2]
    if codec.kind == "patch-pca" and codec.channels > numbers:
        raise ConfigError(
            f"codec.channels = {codec.channels} is more than a block's {numbers} numbers: at most {numbers}"
        )


def _check_frames(config: RunConfig) -> None:
    frames, codec = config.clips.frames, config.codec
    pt = codec.patch[0]
    if codec.causal:
        step = frame_step(codec.model, pt)
        if (frames - 1) % step:
            raise ConfigError(
                f"clips.frames = {frames} is not {step}n + 1, which {codec.model} wants: it makes one latent frame of the first "
                f"frame and one of every {pt} after it; the nearest that works is {nearest(frames, step, 1)}"
            )
    elif frames % pt:
        raise ConfigError(
            f"clips.frames = {frames} is not divisible by the temporal patch codec.patch[0] = {pt}: "
            f"the nearest that works is {nearest(frames, pt)}"
        )
    time = network_patch(config.expert.model_dump(mode="json"))[0]
    latent = (frames - 1) // pt + 1 if codec.causal else frames // pt
    if latent % time:
        raise ConfigError(
            f"clips.frames = {frames} make {latent} latent frames, but the network in expert.weights packs {time} at a time"
        )


def _check_size(config: RunConfig) -> None:
    size, (_, ph, pw) = config.clips.size, config.codec.patch
    for axis, part in (("height", ph), ("width", pw)):
        if size % part:
            raise ConfigError(
                f"clips.size = {size} is not divisible by the patch's {axis} {part} (codec.patch): "
                f"the nearest that works is {nearest(size, part)}"
            )
        side = side_step(part, config.expert.model_dump(mode="json"))
        if size % side:
            where = (
                "the network in expert.weights" if config.expert.network else f"expert.patch = {config.expert.patch}"
            )
            raise ConfigError(
                f"clips.size = {size} gives {size // part} latent positions per side, which {where} cannot pack by "
                f"{side // part}: the nearest that works is {nearest(size, side)}"
            )


def _check_text(config: RunConfig) -> None:
    text = config.text
    if text.encoder == "minilm":
        if text.path or text.width or text.pooled_width or text.padding != "zero":
            raise ConfigError("text.path, width, pooled_width and padding belong to another text.encoder than 'minilm'")
        return
    if not text.width or not text.pooled_width:
        raise ConfigError(f"text.encoder = {text.encoder!r} needs its weights: give them with --text FOLDER")
    if text.encoder == "clip" and text.tokens > _CLIP_TOKENS:
        raise ConfigError(
            f"text.tokens = {text.tokens}, but a CLIP text encoder reads {_CLIP_TOKENS} tokens: at most {_CLIP_TOKENS}"
        )


def _check_expert(config: RunConfig) -> None:
    expert = config.expert
    if expert.weights and not expert.network:
        raise ConfigError(f"expert.weights = {expert.weights!r} is not resolved: give it with --weights FOLDER")
    if expert.lora_rank and not expert.weights and expert.warm_start != "trunk":
        raise ConfigError(
            f"expert.lora_rank = {expert.lora_rank} needs frozen weights: give --weights FOLDER, or expert.warm_start = 'trunk'"
        )


def _check_network(config: RunConfig) -> None:
    """The network that ``expert.weights`` holds against the backbone, the codec and the text encoder."""
    expert, network = config.expert, config.expert.network
    wanted, found = BACKBONE_CLASS[expert.backbone], network.get("_class_name", "")
    if found != wanted:
        raise ConfigError(
            f"the weights in {expert.weights} are of the class {found}, but expert.backbone = {expert.backbone!r} is {wanted}: "
            "give weights of that class, or leave --backbone out"
        )
    # The same numbers as flops.latent_shape and text_shape, which lie above this package.
    pixels = 3 * config.codec.patch[0] * config.codec.patch[1] * config.codec.patch[2]
    channels = pixels if config.codec.kind == "pixels" else config.codec.channels
    time, side = network_patch(expert.model_dump(mode="json"))
    square = time * side**2 if expert.backbone in ("flux", "ltx") else 1  # positions that are packed before the network
    takes = network.get("in_channels", _CHANNELS[expert.backbone])
    if takes != channels * square:
        packed = f" packed {side}x{side}, so {channels * square}" if square > 1 else ""
        raise ConfigError(
            f"the codec {config.codec.model or config.codec.kind!r} makes {channels} latent channels{packed}, but the {found} in "
            f"{expert.weights} takes {takes}: give a --codec of its own family"
        )
    tokens, pooled = _TEXT_KEYS[expert.backbone]
    for key, name, width in (
        (tokens, "width", config.text.width or 384),
        (pooled, "pooled_width", config.text.pooled_width or 384),
    ):
        reads = None if key is None else network.get(*key)
        if reads is not None and reads != width:
            raise ConfigError(
                f"the text encoder {config.text.encoder!r} is {width} wide (text.{name}), but the {found} in {expert.weights} reads "
                f"{reads} ({key[0] if key else ''}): give a --text of its own family"
            )
    _check_positions(config)


def _check_positions(config: RunConfig) -> None:
    """Positions that a trained network has: text tokens of CogVideoX, the rotary table of Wan."""
    expert, network = config.expert, config.expert.network
    most = network.get("max_text_seq_length", 226) if expert.backbone == "cogvideox" else config.text.tokens
    if config.text.tokens > most:
        raise ConfigError(
            f"text.tokens = {config.text.tokens}, but the network in {expert.weights} reads at most {most} "
            f"(max_text_seq_length): use text.tokens of at most {most}"
        )
    if expert.backbone == "wan":
        most, pt = network.get("rope_max_seq_len", 1024), config.codec.patch[0]
        time = (config.clips.frames - 1) // pt + 1 if config.codec.causal else config.clips.frames // pt
        if time > most:
            raise ConfigError(
                f"clips.frames = {config.clips.frames} make {time} latent frames, but the network in {expert.weights} has "
                f"{most} positions (rope_max_seq_len): use clips.frames of at most {(most - 1) * pt + 1}"
            )
