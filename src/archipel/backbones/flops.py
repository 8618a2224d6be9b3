"""Forward FLOPs in closed form, attention included, from the configuration alone (no torch: `init` needs it).

A multiply and an add are two FLOPs; only matrix products are counted, as torch's own counter does (normalisation,
activations and RoPE are below one percent). Counted per clip, since modulation and embeddings run once per clip.
Training is three forwards (one forward, two products per product in the backward); recomputation is not counted.
Source of the shapes: diffusers' ``FluxTransformer2DModel``; tests hold the sums to ``FlopCounterMode``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def expert_parameters(config: RunConfig) -> int:
    """Parameters of one expert; the monolith has as many, but for width times K more where it is told the cluster."""
    channels = latent_shape(config)[0]
    _, text_width, pooled_width = text_shape(config)
    return flux_parameters(
        width=config.expert.width,
        head=config.expert.width // config.expert.heads,
        double_blocks=config.expert.double_blocks,
        single_blocks=config.expert.single_blocks,
        channels=channels,
        outputs=channels,
        text_width=text_width,
        pooled_width=pooled_width,
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


def _denoiser_flops(config: RunConfig, more: int) -> int:
    channels, *space = latent_shape(config)
    text_tokens, text_width, pooled_width = text_shape(config)
    return flux_forward(
        width=config.expert.width,
        double_blocks=config.expert.double_blocks,
        single_blocks=config.expert.single_blocks,
        channels=channels,
        outputs=channels,
        tokens=space[0] * space[1] * space[2],
        text_tokens=text_tokens,
        text_width=text_width,
        pooled_width=pooled_width + more,
    )


def router_forward_flops(config: RunConfig) -> int:
    """Forward FLOPs of the router per clip: single-stream blocks over video tokens only, K outputs per token."""
    channels, *space = latent_shape(config)
    _, text_width, pooled_width = text_shape(config)
    return flux_forward(
        width=config.router.width,
        double_blocks=0,
        single_blocks=config.router.blocks,
        channels=channels,
        outputs=config.partition.k,
        tokens=space[0] * space[1] * space[2],
        text_tokens=0,
        text_width=text_width,
        pooled_width=pooled_width,
    )


def training_flops(forward: int, steps: int, batch: int) -> int:
    """FLOPs of ``steps`` optimizer steps of ``batch`` clips."""
    return TRAINING * forward * steps * batch
