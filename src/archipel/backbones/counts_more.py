"""Forward FLOPs in closed form of diffusers' LTX-Video, HunyuanVideo and CogVideoX transformers.

``count(network, latent, text)``: ``network`` is the diffusers configuration, ``latent`` (C, T, H, W) a clip's latents, ``text``
(L, D, P) its caption; FLOPs per clip, counted as in ``flops``: matrix products and attention, padding of the text included.
Tests hold them to torch's ``FlopCounterMode``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Network = Mapping[str, Any]
Latent = tuple[int, int, int, int]
Text = tuple[int, int, int]
TIME_CHANNELS = 256  # width of diffusers' sinusoidal time embedding
MLP_RATIO = 4


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _width(network: Network) -> int:
    return int(network["num_attention_heads"]) * int(network["attention_head_dim"])


def _video_tokens(network: Network, latent: Latent) -> int:
    _, T, H, W = latent
    p, pt = int(network.get("patch_size", 1)), int(network.get("patch_size_t") or 1)
    return (T // pt) * (H // p) * (W // p)


def ltx(network: Network, latent: Latent, text: Text) -> int:
    """``LTXVideoTransformer3DModel``: self-attention over N video tokens, cross-attention to L text tokens."""
    D, N, L = _width(network), _video_tokens(network, latent), text[0]
    time = _linear(1, TIME_CHANNELS, D) + _linear(1, D, D) + _linear(1, D, 6 * D)
    caption = _linear(L, int(network["caption_channels"]), D) + _linear(L, D, D)
    own = 4 * _linear(N, D, D) + 4 * N * N * D
    cross = 2 * _linear(N, D, D) + 2 * _linear(L, int(network["cross_attention_dim"]), D) + 4 * N * L * D
    block = own + cross + 2 * _linear(N, D, MLP_RATIO * D)
    outputs = int(network.get("out_channels") or network["in_channels"])
    ends = _linear(N, int(network["in_channels"]), D) + _linear(N, D, outputs)
    return time + caption + ends + int(network["num_layers"]) * block


def hunyuan(network: Network, latent: Latent, text: Text) -> int:
    """``HunyuanVideoTransformer3DModel``: text refiner, dual- and single-stream blocks over S = N + L tokens."""
    D, N, L = _width(network), _video_tokens(network, latent), text[0]
    S, width, pooled = N + L, int(network["text_embed_dim"]), int(network["pooled_projection_dim"])
    mlp = int(D * float(network.get("mlp_ratio", MLP_RATIO)))
    values = int(network.get("patch_size", 2)) ** 2 * int(network.get("patch_size_t") or 1)  # of a channel per token
    time = _linear(1, TIME_CHANNELS, D) + _linear(1, D, D)
    # The refiner's MLP is four times as wide whatever ``mlp_ratio`` says of the rest.
    refine = 4 * _linear(L, D, D) + 4 * L * L * D + 2 * _linear(L, D, MLP_RATIO * D) + _linear(1, D, 2 * D)
    caption = time + _linear(1, width, D) + _linear(1, D, D) + _linear(L, width, D)
    both = 4 * _linear(S, D, D) + 2 * _linear(S, D, mlp) + 4 * S * S * D
    ends = _linear(N, int(network["in_channels"]) * values, D) + _linear(1, D, 2 * D)
    ends += _linear(N, D, int(network.get("out_channels") or network["in_channels"]) * values)
    return (
        ends
        + caption
        + int(network.get("num_refiner_layers", 2)) * refine
        + time
        + _linear(1, pooled, D)
        + _linear(1, D, D)
        + (_linear(1, TIME_CHANNELS, D) + _linear(1, D, D) if network.get("guidance_embeds", True) else 0)
        + int(network["num_layers"]) * (both + 2 * _linear(1, D, 6 * D))
        # The single blocks' attention has no output projection; their last product takes attention and MLP side by side.
        + int(network["num_single_layers"]) * (both + _linear(1, D, 3 * D))
    )


def cogvideox(network: Network, latent: Latent, text: Text) -> int:
    """``CogVideoXTransformer3DModel``: one stream of S = L + N tokens, modulated apart for text and video."""
    D, N, L = _width(network), _video_tokens(network, latent), text[0]
    S, E = N + L, int(network.get("time_embed_dim", 512))
    values = int(network.get("patch_size", 2)) ** 2 * int(network.get("patch_size_t") or 1)
    ends = _linear(N, int(network["in_channels"]) * values, D) + _linear(L, int(network["text_embed_dim"]), D)
    ends += _linear(1, D, E) + _linear(1, E, E) + _linear(1, E, 2 * D)
    ends += _linear(N, D, int(network.get("out_channels") or network["in_channels"]) * values)
    block = 2 * _linear(1, E, 6 * D) + 4 * _linear(S, D, D) + 4 * S * S * D + 2 * _linear(S, D, MLP_RATIO * D)
    return ends + int(network["num_layers"]) * block
