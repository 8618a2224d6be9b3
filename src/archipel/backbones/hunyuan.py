"""HunyuanVideo's transformer: diffusers' ``HunyuanVideoTransformer3DModel``.

What the adapter adds, and nothing else: times of 1000 t, and a null text that its text refiner can read. Released weights
lose their embedding of a guidance scale: it belongs to guidance distillation, and experts are guided by their own null
branch. Source: HunyuanVideo (arXiv 2412.03603), diffusers' ``HunyuanVideoPipeline``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones import base
from archipel.contracts import Conditioning

_GUIDANCE = "time_text_embed.guidance_embedder."


class HunyuanDenoiser(base.Denoiser):
    """Masks of the text must be True first and False after (padding behind): the network counts the real tokens only."""

    CLASS = "HunyuanVideoTransformer3DModel"
    INPUT = "x_embedder.proj.weight"
    POOLED = "time_text_embed.text_embedder.linear_1.weight"

    @classmethod
    def settle(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kept = {name: value for name, value in tensors.items() if not name.startswith(_GUIDANCE)}
        return {**config, "guidance_embeds": False}, kept

    def ends(self) -> list[nn.Module]:
        net = self.network
        return [net.x_embedder, net.context_embedder, net.time_text_embed, net.proj_out]

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Masked tokens are read as zeros; the null text keeps one of them, since the refiner divides by their number."""
        real = cond.mask if self.mask_text else cond.mask | True
        first = torch.arange(real.shape[1], device=real.device) == 0
        answer: Tensor
        (answer,) = self.network(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond.tokens * real[:, :, None].to(cond.tokens.dtype),
            encoder_attention_mask=real | (first & ~real.any(1, keepdim=True)),
            pooled_projections=cond.pooled,
            guidance=None,
            return_dict=False,
        )
        return answer
