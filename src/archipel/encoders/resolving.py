"""What a folder or hub id means for ``run.toml``: the keys that `archipel init --codec --text --weights` resolves.

Configurations are read, weights are only hashed, and nothing is imported that could run them. What does not fit together
is refused here where a folder is at fault, and by ``archipel.config`` where two keys are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from archipel import config as configuration
from archipel import store
from archipel.config import BACKBONE_CLASS, frame_step, side_step
from archipel.encoders import outside
from archipel.encoders.outside import Place
from archipel.errors import ConfigError

VAE = ("vae",)
TRANSFORMER = ("transformer",)
SCHEDULER = "scheduler"  # beside it: what CogVideoX's weights were trained on, see backbones.networks_more
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_SEES_PADDING = ("flux", "ltx", "cogvideox")  # whose pipelines give the text encoder no mask of the padding
Shape = tuple[tuple[int, int, int], int, bool]  # patch, channels, causal

# --- autoencoders ------------------------------------------------------------------------------------------------------


def _halvings(config: Mapping[str, Any], key: str) -> int:
    return int(2 ** (len(config[key]) - 1))


def _wan(config: Mapping[str, Any]) -> Shape:
    space = _halvings(config, "dim_mult") * int(config.get("patch_size") or 1)
    return (2 ** sum(map(bool, config["temperal_downsample"])), space, space), int(config["z_dim"]), True


def _hunyuan(config: Mapping[str, Any]) -> Shape:
    space = int(config["spatial_compression_ratio"])
    return (int(config["temporal_compression_ratio"]), space, space), int(config["latent_channels"]), True


def _ltx(config: Mapping[str, Any]) -> Shape:
    twice = 2 ** sum(map(bool, config["spatio_temporal_scaling"]))
    space = int(config.get("spatial_compression_ratio") or config["patch_size"] * twice)
    time = int(config.get("temporal_compression_ratio") or config["patch_size_t"] * twice)
    return (time, space, space), int(config["latent_channels"]), True


def _cogvideox(config: Mapping[str, Any]) -> Shape:
    space = _halvings(config, "block_out_channels")
    return (int(config["temporal_compression_ratio"]), space, space), int(config["latent_channels"]), True


def _image(config: Mapping[str, Any]) -> Shape:
    space = _halvings(config, "block_out_channels")
    return (1, space, space), int(config["latent_channels"]), False


def _tiny(config: Mapping[str, Any]) -> Shape:
    space = _halvings(config, "encoder_block_out_channels")
    return (1, space, space), int(config["latent_channels"]), False


# Class in diffusers -> (patch, channels, causal) of its configuration.
AUTOENCODERS: dict[str, Callable[[Mapping[str, Any]], Shape]] = {
    "AutoencoderKLHunyuanVideo": _hunyuan,
    "AutoencoderKLWan": _wan,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKL": _image,
    "AutoencoderTiny": _tiny,
}


_LAYERS = ("layers_per_block", "decoder_layers_per_block", "num_res_blocks", "num_encoder_blocks", "num_decoder_blocks")
_MOST_LAYERS = 100
_MOST_CHANNELS = 4096


def _numbers(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def autoencoder_shape(config: Mapping[str, Any], said: str) -> Shape:
    """(patch, channels, causal) of an autoencoder's configuration. Raises ConfigError for a class that is not known."""
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise ConfigError(
            f"codec {said!r} is of the class {name!r}, not one of the autoencoders that Archipel knows: "
            f"{', '.join(AUTOENCODERS)}"
        )
    counts = [value for key in _LAYERS for value in _numbers(config.get(key))]
    if any(not isinstance(value, int) or not 0 <= value <= _MOST_LAYERS for value in counts) or any(
        isinstance(value, list | tuple) and len(value) > _MOST_CHANNELS for value in config.values()
    ):  # a stranger's configuration must not make us build forever
        raise ConfigError(
            f"codec {said!r}: its configuration does not describe a {name} of at most {_MOST_LAYERS} layers a block"
        )
    try:
        patch, channels, causal = AUTOENCODERS[str(name)](config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"codec {said!r}: its configuration does not describe a {name} ({error!r})") from error
    if min(patch) < 1 or channels < 1 or max(*patch, channels) > _MOST_CHANNELS or config.get("in_channels", 3) != 3:
        raise ConfigError(f"codec {said!r}: a {name} of {channels} channels and blocks of {patch} is not usable")
    return patch, channels, causal


def codec_values(source: str) -> dict[str, Any]:
    """The section ``codec`` for an autoencoder in ``source``."""
    (place, *_) = outside.find(source, VAE, "codec")
    config = outside.read_config(place, "codec")
    patch, channels, causal = autoencoder_shape(config, source)
    return {
        "kind": "autoencoder",
        "path": outside.settled(source, place),
        "model": str(config["_class_name"]),
        "patch": list(patch),
        "channels": channels,
        "causal": causal,
        "sha256": _sha256(source, [place], "codec"),
    }


def _sha256(source: str, places: list[Place], what: str) -> str:
    """sha256 of the weights where they are on this disk: of one model's, or of the list of several models' ones. Raises
    DamagedError where a file is torn, before it is worth a run."""
    if outside.is_hub_id(source):
        return ""
    files = [outside.weight_files(place, what) for place in places]
    for several in files:
        outside.tensor_shapes(several)
    hashes = [outside.sha256_of(several) for several in files]
    return hashes[0] if len(hashes) == 1 else store.sha256_json(hashes)


# --- text encoders -----------------------------------------------------------------------------------------------------


def text_places(source: str, *, weights: bool = False) -> dict[str, Place]:
    """Where the text encoders and tokenizers of ``text.path`` lie, by their names in the run (``text_encoder``, ...)."""
    first, plus, second = source.partition("+")
    if plus and not outside.is_hub_id(source) and not outside.exists(source):
        one, two = text_places(first, weights=weights), text_places(second, weights=weights)
        if len(one) > 2 or len(two) > 2:
            raise ConfigError(
                f"text {source!r}: each side of the plus sign must be one encoder, not a pipeline with two"
            )
        return one | {f"{name}_2": place for name, place in two.items()}
    found = outside.find(source, TEXT, "text", weights=weights)
    if found[0].said == source:  # an encoder's folder, with its tokenizer inside
        return {"text_encoder": found[0], "tokenizer": found[0]}
    places = {place.folder.name: place for place in found}
    for encoder, tokenizer in (TEXT[:2], TEXT[2:]):
        if (encoder in places) != (tokenizer in places):
            missing = tokenizer if encoder in places else encoder
            raise ConfigError(f"text {source!r} has {encoder} and {tokenizer} only together: {missing} is missing")
    return places


_MOST_BLOCKS, _MOST_SIZE = 1000, 1 << 24
_TEXT_COUNTS = ("num_layers", "num_hidden_layers", "num_decoder_layers", "vocab_size", "d_ff", "intermediate_size")
_TRANSFORMER_COUNTS = (
    "num_layers", "num_single_layers", "num_refiner_layers", "num_attention_heads", "attention_head_dim", "in_channels",
    "out_channels", "patch_size", "patch_size_t", "text_dim", "freq_dim", "ffn_dim", "joint_attention_dim", "caption_channels",
    "pooled_projection_dim", "cross_attention_dim", "text_embed_dim", "time_embed_dim", "rope_max_seq_len",
    "max_text_seq_length", "sample_width", "sample_height", "sample_frames",
)  # fmt: skip


def _bounded(config: Mapping[str, Any], keys: Iterable[str], said: str) -> None:
    """Refuse a count or a size that no model has: a stranger's configuration must not make us build forever, nor fail within
    arithmetic. Layers: 0 to 1000; all else 1 to 2^24. Raises ConfigError naming the key."""
    for key in keys:
        least, most = (0, _MOST_BLOCKS) if key.endswith("layers") else (1, _MOST_SIZE)
        for value in _numbers(config.get(key)):
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{said}: {key} of its configuration is {value!r}, expected {least} to {most}")


def text_kind(config: Mapping[str, Any], said: str) -> tuple[str, int, int]:
    """(t5, umt5 or clip; width; most tokens, 0: no bound) of a text encoder's configuration. Raises ConfigError."""
    kind = config.get("model_type")
    if kind in ("clip", "clip_text_model"):
        part = config.get("text_config", config) if kind == "clip" else config
        name, width, most = "clip", part.get("hidden_size", 512), part.get("max_position_embeddings", 77)
    elif kind in ("t5", "umt5"):
        name, width, most = str(kind), config.get("d_model", 512), 0
    else:
        raise ConfigError(
            f"text {said!r} is a model of the type {kind!r}: text encoders that Archipel knows are t5, umt5 and clip_text_model"
        )
    if type(width) is not int or type(most) is not int or width < 1:
        raise ConfigError(f"text {said!r}: its configuration has no usable width ({width!r})")
    for section in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        _bounded(section, _TEXT_COUNTS, f"text {said!r}")
    return name, width, most


def text_values(source: str) -> dict[str, Any]:
    """The section ``text`` for the encoders in ``source``."""
    places = text_places(source)
    encoders = [places[name] for name in ("text_encoder", "text_encoder_2") if name in places]
    kinds = {}
    for place in encoders:
        name, width, _ = text_kind(outside.read_config(place, "text"), place.said)
        kinds[name] = width
    together = "t5+clip" if set(kinds) == {"t5", "clip"} else next(iter(kinds))
    if len(kinds) != len(encoders) or (len(kinds) == 2 and together != "t5+clip"):
        raise ConfigError(
            f"text {source!r} has the encoders {' and '.join(kinds)}{' twice' if len(kinds) == 1 else ''}: "
            "one of t5, umt5 and clip works, and t5 with clip"
        )
    width = kinds.get("t5", next(iter(kinds.values())))
    parts = source.split("+") if "+" in source and not outside.exists(source) else [source]
    if not any(outside.is_hub_id(part) for part in parts):
        for name, place in places.items():
            if name.startswith("tokenizer"):
                outside.tokenizer_files(place, "text")
    return {
        "encoder": together,
        "path": "+".join(outside.settled(part, _of(places, part)) for part in parts),
        "width": width,
        "pooled_width": kinds.get("clip", width),
        "sha256": "" if any(map(outside.is_hub_id, parts)) else _sha256(parts[0], encoders, "text"),
    }


def _of(places: Mapping[str, Place], source: str) -> Place:
    """One of the places that were found in ``source``."""
    return next(place for place in places.values() if place.said == source or place.said.startswith(f"{source} ("))


# --- weights of a transformer ------------------------------------------------------------------------------------------


def weights_values(source: str) -> dict[str, Any]:
    """The keys of the section ``expert`` for a trained transformer in ``source``."""
    place, *others = outside.find(source, (*TRANSFORMER, SCHEDULER), "weights")
    config = outside.read_config(place, "weights")
    found = config.get("_class_name")
    names = {name: backbone for backbone, name in BACKBONE_CLASS.items()}
    if found not in names:
        raise ConfigError(
            f"weights {source!r} are of the class {found!r}, not one of the transformers that Archipel knows: "
            f"{', '.join(names)}"
        )
    network = _stated(config)
    _bounded(network, _TRANSFORMER_COUNTS, f"weights {source!r}")
    if names[str(found)] == "cogvideox" and others:
        network["_schedule"] = _stated(outside.read_config(others[0], "weights", "scheduler_config.json"))
    return {
        "backbone": names[str(found)],
        "weights": outside.settled(source, place),
        "network": network,
        "weights_sha256": _sha256(source, [place], "weights"),
    }


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without null, for which run.toml has no word (a key that is left out has diffusers' own default, which
    is None for those), and without what says only which version wrote it."""
    return {k: v for k, v in config.items() if v is not None and (not k.startswith("_") or k == "_class_name")}


# --- all of it ---------------------------------------------------------------------------------------------------------


def resolve(values: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of ``run.toml`` with what ``codec.path``, ``text.path`` and ``expert.weights`` stand for filled in.

    ``said``: the values that the user gave one by one: those are kept, and refused with ConfigError where a folder says
    otherwise; ``clips.frames`` and ``clips.size`` of a preset or default give way to the codec's rule instead.
    """
    codec, text, expert = (dict(values.get(name, {})) for name in ("codec", "text", "expert"))
    filled: dict[str, dict[str, Any]] = {}
    if codec.get("path"):
        filled["codec"] = codec_values(str(codec["path"]))
    if text.get("path"):
        filled["text"] = text_values(str(text["path"]))
    if expert.get("weights"):
        filled["expert"] = weights_values(str(expert["weights"]))
    for section, found in filled.items():
        for key, value in found.items():
            asked = said.get(section, {}).get(key, value)
            if asked != value and key not in ("path", "weights"):
                raise ConfigError(
                    f"{section}.{key} = {asked!r} was asked for, but {found.get('path') or found.get('weights')} has {value!r}"
                )
    values = configuration.merge(values, filled)
    if "expert" in filled:  # one value, not a table to be merged into another network's
        values["expert"]["network"] = filled["expert"]["network"]
    backbone = filled.get("expert", {}).get("backbone")
    if backbone == "flux":
        values = _flux_patch(values, said)
    if backbone in _SEES_PADDING and values.get("text", {}).get("path") and "padding" not in said.get("text", {}):
        values = configuration.merge(values, {"text": {"padding": "kept"}})
    return _fit_clips(values, said) if "codec" in filled else values


def _flux_patch(values: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """``expert.patch`` of FLUX's weights: they take patch^2 latent positions' channels side by side."""
    takes = values["expert"]["network"].get("in_channels", 64)
    channels = values.get("codec", {}).get("channels", configuration.Codec().channels)
    patch = (
        math.isqrt(takes // channels) if isinstance(takes, int) and isinstance(channels, int) and channels > 0 else 0
    )
    if "patch" in said.get("expert", {}) or patch < 1:
        return values  # the check of the whole says what does not fit
    return configuration.merge(values, {"expert": {"patch": patch}})


def _fit_clips(values: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Frames and size that nobody asked for, moved to the nearest that the codec and the backbone can take."""
    given, clips = said.get("clips", {}), values.get("clips", {})
    codec, fitted = values["codec"], {}
    step = frame_step(codec["model"], codec["patch"][0])
    frames = clips.get("frames", configuration.Clips().frames)
    if "frames" not in given and isinstance(frames, int):
        rest = 1 if codec["causal"] else 0
        fitted["frames"] = max(1, round((frames - rest) / step)) * step + rest
    side = side_step(codec["patch"][1], values.get("expert", {}))
    size = clips.get("size", configuration.Clips().size)
    if "size" not in given and isinstance(size, int):
        fitted["size"] = -(-size // side) * side
    return configuration.merge(values, {"clips": fitted})
