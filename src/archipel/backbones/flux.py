"""The expert: diffusers' ``FluxTransformer2DModel`` on video latents, a token per latent position or per square of them.

What the adapter adds, and nothing else: packing, ids (t, h, w) for RoPE, a mask over text padding (without it diffusers
attends to padding), and t in [0, 1] (diffusers multiplies by 1000 itself). Source: Paris 2.0 (arXiv 2605.26064), whose
experts are Flux MM-DiTs on packed video latents; Open-Sora 2.0 (arXiv 2503.09642) for the ids; diffusers'
``FluxPipeline._pack_latents`` for the order of channels in a token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones import base, flux_blocks
from archipel.contracts import Conditioning

_GUIDANCE = "time_text_embed.guidance_embedder."


@lru_cache(maxsize=16)
def video_ids(frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """RoPE ids (N, 3) float32 of a video of tokens, in the order of ``pack``: t slowest, w fastest."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@lru_cache(maxsize=16)
def text_ids(tokens: int, device: torch.device) -> Tensor:
    """Ids (L, 3) of text tokens: all zero, so text has no place in the video and its padded length does not matter."""
    return torch.zeros(tokens, 3, device=device)


def pack(x: Tensor, patch: int = 1) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C p p), N = T H W / (p p): a token is p x p positions, channel slowest within it."""
    if patch == 1:
        return x.flatten(2).transpose(1, 2)
    B, C, T, H, W = x.shape
    parts = x.reshape(B, C, T, H // patch, patch, W // patch, patch).permute(0, 2, 3, 5, 1, 4, 6)
    return parts.reshape(B, T * (H // patch) * (W // patch), C * patch * patch)


def unpack(tokens: Tensor, like: Tensor, patch: int = 1) -> Tensor:
    """(B, N, C p p) -> (B, C, T, H, W), of which ``like`` has all but C."""
    B, _, T, H, W = like.shape
    if patch == 1:
        return tokens.transpose(1, 2).reshape(B, -1, T, H, W)
    parts = tokens.reshape(B, T, H // patch, W // patch, -1, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return parts.reshape(B, -1, T, H, W)


def shortened(cond: Conditioning) -> Conditioning:
    """Without the padding that no row of the batch needs (at least one token stays); on a CPU only, where tokens are paid
    for one by one: elsewhere looking at the mask would make the host wait, and shapes that change cost more."""
    if cond.mask.device.type != "cpu" or type(cond.mask) is not Tensor or torch.compiler.is_compiling():
        return cond  # a fake mask (planning) has nothing to look at: planned is the whole length
    used = cond.mask.any(0).nonzero()
    length = max(1, int(used[-1]) + 1 if len(used) else 0)
    if length == cond.mask.shape[1]:
        return cond
    return Conditioning(cond.tokens[:, :length], cond.mask[:, :length], cond.pooled, cond.image)


class FluxDenoiser(base.Denoiser):
    """``facts["patch"]``: positions per side in one token (default 1). See ``base.Denoiser``."""

    CLASS = "FluxTransformer2DModel"
    INPUT = "x_embedder.weight"
    POOLED = "time_text_embed.text_embedder.linear_1.weight"

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__(network, facts)
        self.patch = int(facts.get("patch", 1))
        flux_blocks.quicken(network)

    @classmethod
    def settle(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Without the embedder of FLUX.1-dev's distilled guidance: the network then gives its one prediction."""
        kept = {name: value for name, value in tensors.items() if not name.startswith(_GUIDANCE)}
        return {**config, "guidance_embeds": False}, kept

    def ends(self) -> list[nn.Module]:
        return base.flux_ends(self.network)

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C_in, T, H, W) float, t (B,) in [0, 1], one shape per batch; masked padding has no effect."""
        B, _, T, H, W = x.shape
        tokens = pack(x, self.patch)
        extra = {}
        if self.mask_text:
            cond = shortened(cond)
            mask = torch.cat([cond.mask, cond.mask.new_ones(B, tokens.shape[1])], dim=1)[:, None, None, :]
            extra["joint_attention_kwargs"] = {"attention_mask": mask}
        (output,) = self.network(
            hidden_states=tokens,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t,
            img_ids=video_ids(T, H // self.patch, W // self.patch, x.device),
            txt_ids=text_ids(cond.tokens.shape[1], x.device),
            guidance=None,
            return_dict=False,
            **extra,
        )
        return unpack(output, x, self.patch)
