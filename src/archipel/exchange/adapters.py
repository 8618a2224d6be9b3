"""What stands between diffusers' and transformers' models and Archipel's contracts: by class, from what the export says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from archipel.backbones import registry
from archipel.backbones.base import Denoiser
from archipel.backbones.router import FluxRouter
from archipel.config import RunConfig
from archipel.contracts import Codec, TextEncoder
from archipel.encoders import autoencoders
from archipel.encoders.autoencoders import Autoencoder
from archipel.encoders.text import MiniLM
from archipel.encoders.transformers_text import TransformersText
from archipel.errors import DamagedError
from archipel.exchange.parts import BlockCodec


def denoiser(network: nn.Module, facts: dict[str, Any]) -> Denoiser:
    """A diffusers transformer as a ``Denoiser``. Raises DamagedError for a class that no backbone has."""
    kind = registry.adapter(type(network).__name__, "the exported expert")
    if facts.get("role") != "expert" or facts.get("prediction") not in kind.PREDICTIONS:
        raise DamagedError(f"{facts!r} does not describe an expert")
    return kind(network, facts).eval()


def router(network: nn.Module, facts: dict[str, Any]) -> FluxRouter:
    """The router's network with what it reads."""
    if facts.get("role") != "router":
        raise DamagedError(f"{facts!r} does not describe a router")
    return FluxRouter(network, facts).eval()


def codec(vae: Any, config: RunConfig, device: str) -> Codec:
    """Clips <-> latents by a pipeline's ``vae`` on ``device``. Raises ArchipelError where it is not the configuration's."""
    if isinstance(vae, BlockCodec):
        found = vae.codec
        return _Placed(found, vae, device)
    made = Autoencoder(vae, tiling=config.codec.tiling)
    autoencoders.check(made, config.codec)
    return _Placed(made, made, device)


class _Placed:
    """A codec that computes on a device, wherever its clips and latents are: a model that takes turns on a GPU is on the CPU
    before it is called. ``about`` knows the shapes, ``model`` computes."""

    def __init__(self, about: Any, model: Any, device: str) -> None:
        self._about, self._model, self._device = about, model, device
        self.name, self.patch = str(about.name), tuple(about.patch)
        self.causal = bool(getattr(about, "causal", False))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        C, T, H, W = self._about.latent_shape(frames, height, width)
        return C, T, H, W

    def encode(self, clips: Tensor) -> Tensor:
        latents: Tensor = self._model.encode(clips.to(self._device))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        clips: Tensor = self._model.decode(latents.to(self._device))
        return clips


def text(components: Mapping[str, Any], config: RunConfig) -> TextEncoder:
    """The text encoder of a pipeline's components. Raises DamagedError where it is not the configuration's."""
    pairs = [(components.get(f"text_encoder{suffix}"), components.get(f"tokenizer{suffix}")) for suffix in ("", "_2")]
    loaded = [(model, tokenizer) for model, tokenizer in pairs if model is not None and tokenizer is not None]
    if not loaded:
        raise DamagedError("this pipeline was loaded without a text encoder: captions cannot be read")
    if config.text.encoder == "minilm":
        model, tokenizer = loaded[0]
        return MiniLM(config.text.tokens, model, tokenizer.backend_tokenizer.to_str())
    return cast(TextEncoder, TransformersText.of(config.text, loaded))
