"""The expert: diffusers' ``FluxTransformer2DModel`` on video latents, one token per latent position (1x1x1 packing).

What the adapter adds, and nothing else: ids (t, h, w) for RoPE, a mask over text padding (without it diffusers attends
to padding), and t in [0, 1] (diffusers multiplies by 1000 itself). Source: Paris 2.0 (arXiv 2605.26064), whose experts
are Flux MM-DiTs on packed video latents; Open-Sora 2.0 (arXiv 2503.09642) for the ids.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from archipel.backbones import base
from archipel.config import RunConfig
from archipel.contracts import Conditioning, Velocity
from archipel.errors import DamagedError

_POOLED = "time_text_embed.text_embedder.linear_1.weight"  # (D, P): what the pooled vector enters by


@lru_cache(maxsize=16)
def video_ids(frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """RoPE ids (N, 3) float32 of a latent video, in the order of ``pack``: t slowest, w fastest."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@lru_cache(maxsize=16)
def text_ids(tokens: int, device: torch.device) -> Tensor:
    """Ids (L, 3) of text tokens: all zero, so text has no place in the video and its padded length does not matter."""
    return torch.zeros(tokens, 3, device=device)


def pack(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C), N = T H W."""
    return x.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> the shape of ``like`` (B, C, T, H, W)."""
    return tokens.transpose(1, 2).reshape(like.shape)


class FluxDenoiser(base.Denoiser):
    """``facts``: {"role": "expert", "prediction", "latent_shape": [C, T, H, W], "text_shape": [L, D, P]}; and {"condition":
    "cluster", "clusters": K} where pooled vectors of P + K numbers are read (see ``add_cluster``)."""

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.facts, self.prediction = network, dict(facts), str(facts["prediction"])
        self.clusters = int(facts.get("clusters", 0))

    def ends(self) -> list[nn.Module]:
        return base.flux_ends(self.network)

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, T, H, W) float, t (B,) in [0, 1], one shape per batch -> like x; padding has no effect."""
        B, _, T, H, W = x.shape
        mask = torch.cat([cond.mask, cond.mask.new_ones(B, T * H * W)], dim=1)[:, None, None, :]
        (output,) = self.network(
            hidden_states=pack(x),
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t,
            img_ids=video_ids(T, H, W, x.device),
            txt_ids=text_ids(cond.tokens.shape[1], x.device),
            guidance=None,
            joint_attention_kwargs={"attention_mask": mask},
            return_dict=False,
        )
        return unpack(output, x)


# --- a network that is told the cluster --------------------------------------------------------------------------------


def add_cluster(cond: Conditioning, clusters: Tensor, count: int) -> Conditioning:
    """The cluster (B,) int64 of each row behind its pooled vector: (B, P) -> (B, P + ``count``).

    One-hot with mean square 1, as the pooled text has; zeros where the text is the null text: both are dropped together.
    """
    told = torch.nn.functional.one_hot(clusters, count).to(cond.pooled) * count**0.5
    told = told * cond.mask.any(1)[:, None].to(told.dtype)
    return Conditioning(cond.tokens, cond.mask, torch.cat([cond.pooled, told], 1), cond.image)


class _WithCluster:
    def __init__(self, velocity: Velocity, clusters: Tensor, count: int) -> None:
        self._velocity, self._clusters, self._count = velocity, clusters, count

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        times, over = divmod(len(cond), len(self._clusters))
        if over:
            raise ValueError(f"{len(cond)} rows for {len(self._clusters)} clusters: give whole batches only")
        clusters = self._clusters.to(x.device).repeat(times)  # guidance asks for both branches one after the other
        return self._velocity(x, t, add_cluster(cond, clusters, self._count))


def with_cluster(denoiser: Velocity, clusters: Tensor, count: int = 0) -> Velocity:
    """A cluster-conditioned network as a ``Velocity`` of captions alone: clip i of a batch belongs to ``clusters[i]``.

    clusters (B,) int64 in [0, K), for batches of B clips, or of 2 B where both branches of guidance are asked for at
    once; ``count``: K, where ``denoiser`` does not know it. The null branch is told no cluster.
    Raises ValueError for a network that takes no cluster, or a cluster outside.
    """
    count = count or int(getattr(denoiser, "clusters", 0))
    if not count:
        raise ValueError("this network takes no cluster: it was trained with monolith.condition = 'none'")
    if len(clusters) and not 0 <= int(clusters.min()) <= int(clusters.max()) < count:
        raise ValueError(f"clusters must lie in 0 to {count - 1}")
    return _WithCluster(denoiser, clusters.to(torch.int64), count)


# --- building and loading ----------------------------------------------------------------------------------------------


def build_expert(
    config: RunConfig,
    latent_shape: tuple[int, int, int, int],
    text_tokens: int,
    text_width: int,
    pooled_width: int,
    seed: int,
    *,
    clusters: int = 0,
) -> FluxDenoiser:
    """A fresh expert (or monolith) on the CPU: a function of the configuration and ``seed``; its output is zero.

    latent_shape is (C, T, H, W). ``clusters``: K for a network that is told the cluster; what reads it starts at zero, and
    all else is as without. The global random state is left as it was.
    """
    part = config.expert

    def build(pooled: int) -> Any:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=latent_shape[0],
            num_layers=part.double_blocks,
            num_single_layers=part.single_blocks,
            attention_head_dim=part.width // part.heads,
            num_attention_heads=part.heads,
            joint_attention_dim=text_width,
            pooled_projection_dim=pooled,
            guidance_embeds=False,
            axes_dims_rope=part.rope_axes,
        )

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU one only
        network = build(pooled_width)
        base.zero_modulation(network)
        if clusters:
            state = widened(network.state_dict(), clusters)
            network = build(pooled_width + clusters)
            network.load_state_dict(state)
    text = [text_tokens, text_width, pooled_width]
    facts = {"role": "expert", "prediction": part.prediction, "latent_shape": list(latent_shape), "text_shape": text}
    return FluxDenoiser(network, facts | ({"condition": "cluster", "clusters": clusters} if clusters else {}))


def widened(state: dict[str, Tensor], clusters: int) -> dict[str, Tensor]:
    """Weights for a network that is told one of ``clusters`` clusters, which computes the same whatever it is told."""
    weight = state[_POOLED]
    return {**state, _POOLED: torch.cat([weight, weight.new_zeros(len(weight), clusters)], 1)}


def load_denoiser(folder: Path) -> FluxDenoiser:
    """A trained expert or monolith on the CPU, in eval mode. Raises MissingStageError, DamagedError."""
    facts, config, tensors = base.read_folder(folder, f"train RUN {folder.name}")
    if facts.get("role") != "expert" or facts.get("prediction") not in ("velocity", "x0"):
        raise DamagedError(f"{folder / 'card.json'}: network = {facts!r} does not describe an expert")
    clusters, text = facts.get("clusters", 0), facts.get("text_shape")
    told = type(clusters) is int and clusters > 0 if facts.get("condition", "none") == "cluster" else clusters == 0
    if not told or (clusters and text and config.get("pooled_projection_dim") != text[-1] + clusters):
        raise DamagedError(
            f"{folder / 'card.json'}: condition and clusters of network = {facts!r} do not fit its weights"
        )
    return FluxDenoiser(base.build_flux(config, tensors, folder), facts).eval()
