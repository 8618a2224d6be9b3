"""What stands between diffusers' and transformers' models and Archipel's contracts: by class, from what the export says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

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


def codec(vae: Any, config: RunConfig) -> Codec:
    """Clips <-> latents by a pipeline's ``vae``."""
    if isinstance(vae, BlockCodec):
        return _Offloaded(vae)
    made = Autoencoder(vae, tiling=config.codec.tiling)
    autoencoders.check(made, config.codec)
    return made


class _Offloaded:
    """A ``BlockCodec`` as a ``Codec``; its own methods bring it to where it computes."""

    def __init__(self, model: BlockCodec) -> None:
        self.model, self.name = model, str(model.codec.name)
        self.encode, self.decode = model.encode, model.decode

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return self.model.codec.latent_shape(frames, height, width)


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
