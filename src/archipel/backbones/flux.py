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
from archipel.contracts import Conditioning
from archipel.errors import DamagedError


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
    """``facts``: {"role": "expert", "prediction", "latent_shape": [C, T, H, W], "text_shape": [L, D, P]}."""

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.facts, self.prediction = network, dict(facts), str(facts["prediction"])

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


def build_expert(
    config: RunConfig,
    latent_shape: tuple[int, int, int, int],
    text_tokens: int,
    text_width: int,
    pooled_width: int,
    seed: int,
) -> FluxDenoiser:
    """A fresh expert (or monolith) on the CPU: a function of the configuration and ``seed``; its output is zero.

    latent_shape is (C, T, H, W). The global random state is left as it was.
    """
    part = config.expert
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU one only
        network = FluxTransformer2DModel(
            patch_size=1,
            in_channels=latent_shape[0],
            num_layers=part.double_blocks,
            num_single_layers=part.single_blocks,
            attention_head_dim=part.width // part.heads,
            num_attention_heads=part.heads,
            joint_attention_dim=text_width,
            pooled_projection_dim=pooled_width,
            guidance_embeds=False,
            axes_dims_rope=part.rope_axes,
        )
        base.zero_modulation(network)
    text = [text_tokens, text_width, pooled_width]
    facts = {"role": "expert", "prediction": part.prediction, "latent_shape": list(latent_shape), "text_shape": text}
    return FluxDenoiser(network, facts)


def load_denoiser(folder: Path) -> FluxDenoiser:
    """A trained expert or monolith on the CPU, in eval mode. Raises MissingStageError, DamagedError."""
    facts, config, tensors = base.read_folder(folder, f"train RUN {folder.name}")
    if facts.get("role") != "expert" or facts.get("prediction") not in ("velocity", "x0"):
        raise DamagedError(f"{folder / 'card.json'}: network = {facts!r} does not describe an expert")
    return FluxDenoiser(base.build_flux(config, tensors, folder), facts).eval()
