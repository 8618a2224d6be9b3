"""Forward FLOPs in closed form, attention included, from the configuration alone (no torch: `init` needs it).

A multiply and an add are two FLOPs; only matrix products are counted, as torch's own counter does (normalisation,
activations and RoPE are below one percent). Counted per clip, since modulation and embeddings run once per clip.
Training is three forwards (one forward, two products per product in the backward); recomputation is not counted.
Source of the shapes: diffusers' transformers (here Flux and Wan, the others in ``counts_more``); tests hold the sums to
``FlopCounterMode``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archipel.config import RunConfig

TRAINING = 3  # forwards that one training step on a clip costs
TIME_CHANNELS = 256  # width of diffusers' sinusoidal time embedding
MLP_RATIO = 4
MINILM = 384  # width of the packaged text encoder's tokens and pooled vector


def latent_shape(config: RunConfig) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a clip's latents: pixels are whole blocks, the others keep ``codec.channels`` numbers of each; a causal
    autoencoder gives the first frame a latent frame of its own."""
    pt, ph, pw = config.codec.patch
    channels = 3 * pt * ph * pw if config.codec.kind == "pixels" else config.codec.channels
    frames = (config.clips.frames - 1) // pt + 1 if config.codec.causal else config.clips.frames // pt
    return channels, frames, config.clips.size // ph, config.clips.size // pw


def text_shape(config: RunConfig) -> tuple[int, int, int]:
    """(L, D, P): text tokens, their width, and the width of the pooled vector."""
    return config.text.tokens, config.text.width or MINILM, config.text.pooled_width or MINILM


def linear(rows: int, inputs: int, outputs: int) -> int:
    """2 rows inputs outputs."""
    return 2 * rows * inputs * outputs


def attention(sequence: int, width: int) -> int:
    """Scores and weighted sum over all heads: 4 S^2 D."""
    return 4 * sequence * sequence * width


def flux_forward(
    *,
    width: int,
    double_blocks: int,
    single_blocks: int,
    channels: int,
    outputs: int,
    tokens: int,
    text_tokens: int,
    text_width: int,
    pooled_width: int,
) -> int:
    """Forward FLOPs per clip of a ``FluxTransformer2DModel`` on ``tokens`` video and ``text_tokens`` text tokens."""
    D, S = width, tokens + text_tokens
    embed = (
        linear(tokens, channels, D)
        + linear(text_tokens, text_width, D)
        + linear(1, TIME_CHANNELS, D)
        + linear(1, pooled_width, D)
        + 2 * linear(1, D, D)
    )
    # Query, key, value and output, and the two halves of the MLP, for every token of either stream.
    per_token = 4 * linear(S, D, D) + 2 * linear(S, D, MLP_RATIO * D)
    double = 2 * linear(1, D, 6 * D) + per_token + attention(S, D)
    # A single block has no output projection of its own: its last product takes attention and MLP side by side.
    single = linear(1, D, 3 * D) + per_token + attention(S, D)
    head = linear(1, D, 2 * D) + linear(tokens, D, outputs)
    return embed + double_blocks * double + single_blocks * single + head


def flux_parameters(
    *,
    width: int,
    head: int,
    double_blocks: int,
    single_blocks: int,
    channels: int,
    outputs: int,
    text_width: int,
    pooled_width: int,
) -> int:
    """Parameters of a ``FluxTransformer2DModel`` with heads of width ``head``: every product has a bias."""
    D = width

    def product(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    embed = (
        product(TIME_CHANNELS, D)
        + product(pooled_width, D)
        + 2 * product(D, D)
        + product(text_width, D)
        + product(channels, D)
    )
    stream = product(D, 6 * D) + 4 * product(D, D) + 2 * head + product(D, MLP_RATIO * D) + product(MLP_RATIO * D, D)
    single = (
        product(D, 3 * D) + 3 * product(D, D) + 2 * head + product(D, MLP_RATIO * D) + product((MLP_RATIO + 1) * D, D)
    )
    return embed + 2 * double_blocks * stream + single_blocks * single + product(D, 2 * D) + product(D, outputs)


def wan_forward(network: Mapping[str, Any], latent: tuple[int, int, int, int], text: tuple[int, int, int]) -> int:
    """Forward FLOPs per clip of a ``WanTransformer3DModel``: N video tokens that attend to themselves and to L of text."""
    D = int(network["num_attention_heads"]) * int(network["attention_head_dim"])
    block, (L, width, _) = int(math.prod(network["patch_size"])), text
    N = math.prod(size // int(part) for size, part in zip(latent[1:], network["patch_size"], strict=True))
    embed = (
        linear(N, int(network["in_channels"]) * block, D)
        + linear(1, int(network["freq_dim"]), D)
        + linear(1, D, D)
        + linear(1, D, 6 * D)
        + linear(L, width, D)
        + linear(L, D, D)
    )
    own = 4 * linear(N, D, D) + attention(N, D)
    cross = 2 * linear(N, D, D) + 2 * linear(L, D, D) + 4 * N * L * D
    mlp = 2 * linear(N, D, int(network["ffn_dim"]))
    outputs = int(network["out_channels"] or network["in_channels"])
    return embed + int(network["num_layers"]) * (own + cross + mlp) + linear(N, D, outputs * block)


def forward_flops(
    network: Mapping[str, Any], latent: tuple[int, int, int, int], text: tuple[int, int, int], *, patch: int = 0
) -> int:
    """Forward FLOPs of a network (see ``networks``) per clip of latents (C, T, H, W) and text (L, D, P).

    ``patch``: positions per side that flux packs into a token (0: what its output channels say).
    """
    if network["_class_name"] == "FluxTransformer2DModel":
        return _flux(network, latent, text, patch)
    from archipel.backbones import counts_more

    counts: dict[str, Callable[[Mapping[str, Any], tuple[int, int, int, int], tuple[int, int, int]], int]] = {
        "WanTransformer3DModel": wan_forward,
        "LTXVideoTransformer3DModel": counts_more.ltx,
        "HunyuanVideoTransformer3DModel": counts_more.hunyuan,
        "CogVideoXTransformer3DModel": counts_more.cogvideox,
    }
    return counts[network["_class_name"]](network, latent, text)


def _flux(
    network: Mapping[str, Any], latent: tuple[int, int, int, int], text: tuple[int, int, int], patch: int = 0
) -> int:
    inputs = int(network["in_channels"])
    outputs = int(network["out_channels"] or inputs)
    patch = patch or math.isqrt(outputs // latent[0])
    return flux_forward(
        width=int(network["num_attention_heads"]) * int(network["attention_head_dim"]),
        double_blocks=int(network["num_layers"]),
        single_blocks=int(network["num_single_layers"]),
        channels=inputs,
        outputs=outputs,
        tokens=math.prod(latent[1:]) // patch**2,
        text_tokens=text[0],
        text_width=text[1],
        pooled_width=int(network["pooled_projection_dim"]),
    )


def expert_parameters(config: RunConfig) -> int:
    """Parameters of one expert; the monolith has as many, but for width times K more where it is told the cluster."""
    from archipel.backbones import networks

    network = networks.expert_network(config)
    if network["_class_name"] != "FluxTransformer2DModel":  # shapes from diffusers itself, without memory
        from archipel.backbones import registry

        shapes: dict[str, tuple[int, ...]] = registry.meta_shapes(network)
        return sum(math.prod(shape) for shape in shapes.values())
    return flux_parameters(
        width=network["num_attention_heads"] * network["attention_head_dim"],
        head=network["attention_head_dim"],
        double_blocks=network["num_layers"],
        single_blocks=network["num_single_layers"],
        channels=network["in_channels"],
        outputs=network["out_channels"] or network["in_channels"],
        text_width=network["joint_attention_dim"],
        pooled_width=network["pooled_projection_dim"],
    )


def cluster_width(config: RunConfig) -> int:
    """Numbers that say the cluster behind the pooled text of a cluster-conditioned monolith; 0 for any other."""
    return config.partition.k if config.monolith.condition == "cluster" else 0


def expert_forward_flops(config: RunConfig) -> int:
    """Forward FLOPs of an expert per clip."""
    return _denoiser_flops(config, 0)


def monolith_forward_flops(config: RunConfig) -> int:
    """Forward FLOPs of the monolith per clip: an expert's, and those of the cluster where it is told."""
    return _denoiser_flops(config, cluster_width(config))


def _denoiser_flops(config: RunConfig, clusters: int) -> int:
    from archipel.backbones import networks

    network = networks.expert_network(config, clusters=clusters)
    return forward_flops(network, latent_shape(config), text_shape(config), patch=config.expert.patch)


def router_forward_flops(config: RunConfig) -> int:
    """Forward FLOPs of the router per clip: single-stream blocks over video tokens only, K outputs per token."""
    from archipel.backbones import networks

    network, text = networks.router_network(config), text_shape(config)
    return forward_flops(network, latent_shape(config), (0, *text[1:]), patch=networks.router_patch(config))


def training_flops(forward: int, steps: int, batch: int) -> int:
    """FLOPs of ``steps`` optimizer steps of ``batch`` clips."""
    return TRAINING * forward * steps * batch
