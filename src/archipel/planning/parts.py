"""The parts of a run that are not trained: codec and text encoders, built without memory from their configurations.

A configuration comes from the run (``codec/``, ``text/``), else from the folder on this disk that ``run.toml`` names, else from
what its class or its width tells: released encoders of one width have one size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archipel import store
from archipel.backbones import flops
from archipel.config import RunConfig
from archipel.encoders.weights import weights_file
from archipel.errors import ConfigError
from archipel.planning.held import Held, fake, weightless

_FLOAT32 = 4
# width -> (layers, heads, width of the hidden layer) of T5 v1.1's encoders (umT5's are alike) and of CLIP's text encoders.
_T5 = {
    512: (8, 6, 1024),
    768: (12, 12, 2048),
    1024: (24, 16, 2816),
    2048: (24, 32, 5120),
    4096: (24, 64, 10240),
}
_CLIP = {512: (12, 8, 2048), 768: (12, 12, 3072), 1024: (24, 16, 4096), 1280: (32, 20, 5120)}
_WORDS = {"t5": 32128, "umt5": 256384}


@dataclass(frozen=True)
class Part:
    """Bytes of a frozen part in float32; ``working``: what it holds beside them while it makes one clip (None: not known);
    ``told``: where its configuration came from, for people."""

    parameters: int
    weights: int
    working: int | None
    told: str


# --- codec -------------------------------------------------------------------------------------------------------------


def codec(config: RunConfig, root: Path | None = None) -> Part:
    """The codec, and what decoding one clip holds. Raises ConfigError for a class that diffusers has not, or whose latent
    channels are not those of ``codec.channels``."""
    settings, latent = config.codec, flops.latent_shape(config)
    clip = 3 * config.clips.frames * config.clips.size**2 * _FLOAT32
    if settings.kind != "autoencoder":
        numbers = 3 * settings.patch[0] * settings.patch[1] * settings.patch[2]
        weights = numbers * settings.channels * _FLOAT32 if settings.kind == "patch-pca" else 0
        return Part(weights // _FLOAT32, weights, 2 * clip, f"{settings.kind}, two copies of the clip while decoding")
    about, told = _codec_config(config, root)
    with fake(), Held() as held, torch.no_grad():
        model = _autoencoder(settings.model, about).eval()
        channels = getattr(model.config, "latent_channels", None) or getattr(model.config, "z_dim", None)
        if channels is not None and channels != settings.channels:
            raise ConfigError(
                f"codec.model = {settings.model!r} has {channels} latent channels ({told}), and codec.channels is "
                f"{settings.channels}: run `archipel init` with --codec FOLDER to take it from the autoencoder itself"
            )
        if settings.tiling and hasattr(model, "enable_tiling"):
            model.enable_tiling()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        z = torch.empty(1, *latent)
        if _by_frame(settings.model):
            z = z.transpose(1, 2).flatten(0, 1)
        before = held.now
        held.reset_peak()
        more = {"temb": torch.zeros(1)} if getattr(model.config, "timestep_conditioning", False) else {}
        model.decode(z, return_dict=False, **more)
        return Part(weights // _FLOAT32, weights, held.peak - before, told)


def _by_frame(name: str) -> bool:
    """Whether an autoencoder is one of images."""
    return name in ("AutoencoderKL", "AutoencoderTiny")


def _autoencoder(name: str, about: dict[str, Any]) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not name.startswith("Autoencoder"):
        raise ConfigError(
            f"codec.model = {name!r} is no autoencoder of diffusers: run `archipel init` with --codec FOLDER"
        )
    return kind.from_config(about)


def _codec_config(config: RunConfig, root: Path | None) -> tuple[dict[str, Any], str]:
    places = [] if root is None else [root / "codec"]
    places += _folders(config.codec.path, ("", "vae"))
    for folder in places:
        found = _read(folder / "config.json")
        if found is not None and found.get("_class_name") == config.codec.model:
            return found, f"{config.codec.model} of {folder}"
    return {}, f"{config.codec.model} as released"


# --- text --------------------------------------------------------------------------------------------------------------


def text(config: RunConfig, root: Path | None = None) -> list[Part]:
    """The text encoders. Raises ConfigError for a width that no released encoder has, where no configuration is at hand."""
    settings = config.text
    if settings.encoder == "minilm":
        size = weights_file("minilm").stat().st_size
        return [Part(size // _FLOAT32, size, None, "MiniLM")]
    _, tokens_width, pooled_width = flops.text_shape(config)
    wanted = {
        "t5": [("t5", tokens_width)],
        "umt5": [("umt5", tokens_width)],
        "clip": [("clip", tokens_width)],
        "t5+clip": [("t5", tokens_width), ("clip", pooled_width)],
    }[settings.encoder]
    return [_encoder(kind, width, config, root) for kind, width in wanted]


def _encoder(kind: str, width: int, config: RunConfig, root: Path | None) -> Part:
    inner = ("", "text_encoder", "text_encoder_2")
    places = [] if root is None else [root / "text" / name for name in inner]
    places += [folder for path in config.text.path.split("+") for folder in _folders(path, inner)]
    for folder in places:
        about = _read(folder / "config.json")
        if about is not None and _is(kind, about):
            about = about.get("text_config", about) if kind == "clip" else about
            return _counted(kind, about, f"{kind} of {folder}")
    sizes = (_CLIP if kind == "clip" else _T5).get(width)
    if sizes is None:
        raise ConfigError(
            f"text.encoder = {config.text.encoder!r}: no released {kind} is {width} wide; give the encoder's folder in text.path"
        )
    layers, heads, hidden = sizes
    if kind == "clip":
        about = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        return _counted(kind, about | {"intermediate_size": hidden}, f"CLIP of width {width} as released")
    about = {"d_model": width, "d_kv": 64, "d_ff": hidden, "num_layers": layers, "num_heads": heads}
    about |= {"feed_forward_proj": "gated-gelu", "vocab_size": _WORDS[kind]}
    return _counted(kind, about, f"{'umT5' if kind == 'umt5' else 'T5 v1.1'} encoder of width {width} as released")


def _counted(kind: str, about: dict[str, Any], told: str) -> Part:
    import transformers

    makers: dict[str, Callable[[], Any]] = {
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**about)),
        "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**about)),
        "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**about)),
    }
    with weightless():
        count = sum(p.numel() for p in makers[kind]().parameters())
    return Part(count, _FLOAT32 * count, None, told)


def _is(kind: str, about: dict[str, Any]) -> bool:
    found = str(about.get("model_type", ""))
    return found.startswith("clip") if kind == "clip" else found == kind


# --- files -------------------------------------------------------------------------------------------------------------


def _folders(path: str, inner: tuple[str, ...]) -> list[Path]:
    """Where a folder on this disk may have a part's configuration; nothing for ids of the hub."""
    root = Path(path.strip()).expanduser() if path else None
    return [] if root is None or not root.is_dir() else [root / name for name in inner]


def _read(path: Path) -> dict[str, Any] | None:
    found = store.read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else None
