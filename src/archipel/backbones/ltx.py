"""LTX-Video's transformer: diffusers' ``LTXVideoTransformer3DModel`` on latents packed into tokens.

What the adapter adds, and nothing else: packing, times of 1000 t, the mask over text padding, and the length in seconds and
pixels of a latent position, by which RoPE is scaled. Source: LTX-Video (arXiv 2501.00103), diffusers' ``LTXPipeline``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from torch import Tensor, nn

from archipel.backbones import base
from archipel.contracts import Conditioning
from archipel.errors import DamagedError


def pack(x: Tensor, p: int = 1, pt: int = 1) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C pt p p): t slowest, w fastest; a token's numbers are ordered (c, pt, ph, pw)."""
    B, C, T, H, W = x.shape
    blocks = x.reshape(B, C, T // pt, pt, H // p, p, W // p, p)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def unpack(tokens: Tensor, space: tuple[int, int, int], p: int = 1, pt: int = 1) -> Tensor:
    """(B, N, C pt p p) -> (B, C, T, H, W), ``space`` being (T, H, W)."""
    (T, H, W), B = space, tokens.shape[0]
    blocks = tokens.reshape(B, T // pt, H // p, W // p, -1, pt, p, p)
    return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, -1, T, H, W)


class _Places(LTXVideoRotaryPosEmbed):
    """diffusers' tables (1, N, D) for all rows of a batch, kept while the same shape is asked for."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, num_frames: int, height: int, width: int, scale: Any, video_coords: Any = None
    ) -> tuple[Tensor, Tensor]:
        # Tensors of inference mode cannot be trained with later; fake ones (planning) are nobody's tables.
        if video_coords is not None or torch.compiler.is_compiling() or type(hidden_states) is not Tensor:
            made: tuple[Tensor, Tensor] = super().forward(hidden_states, num_frames, height, width, scale, video_coords)
            return made
        asked = (num_frames, height, width, scale, hidden_states.device, torch.is_inference_mode_enabled())
        known: tuple[Any, tuple[Tensor, Tensor]] | None = self.__dict__.get("known")
        if known is None or known[0] != asked:
            known = (asked, super().forward(hidden_states[:1], num_frames, height, width, scale))
            self.__dict__["known"] = known
        return known[1]


class LTXDenoiser(base.Denoiser):
    """``facts`` beside the usual: {"rope_scale": [seconds, pixels, pixels] of one latent position}. Reads no pooled vector."""

    CLASS = "LTXVideoTransformer3DModel"
    INPUT = "proj_in.weight"
    # Modulation comes from one table per block and one projection for all; no gate holds the cross-attention back.
    ZEROED = r"proj_out\.|time_embed\.linear\.|(transformer_blocks\.\d+\.)?scale_shift_table|.*\.attn2\.to_out\."

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__(network, facts)
        scale = facts.get("rope_scale")
        if not isinstance(scale, list) or len(scale) != 3 or not all(isinstance(one, int | float) for one in scale):
            raise DamagedError(f"network = {facts!r} has no rope_scale, which {self.CLASS} needs")
        self._scale = (float(scale[0]), float(scale[1]), float(scale[2]))
        rope: Any = network.rope
        if type(rope) is LTXVideoRotaryPosEmbed:
            rope.__class__ = _Places

    def ends(self) -> list[nn.Module]:
        net = self.network
        return [net.proj_in, net.time_embed, net.caption_projection, net.proj_out]

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The null text is L tokens of zeros that all weigh alike, so its padding has no effect either."""
        p, pt = self.network.config.patch_size, self.network.config.patch_size_t
        T, H, W = x.shape[2:]
        mask = cond.mask if self.mask_text else cond.mask | True
        (output,) = self.network(
            hidden_states=pack(x, p, pt),
            encoder_hidden_states=cond.tokens * mask[:, :, None].to(cond.tokens.dtype),
            timestep=1000 * t,
            encoder_attention_mask=mask,
            num_frames=T // pt,
            height=H // p,
            width=W // p,
            rope_interpolation_scale=self._scale,
            return_dict=False,
        )
        return unpack(output, (T, H, W), p, pt)
