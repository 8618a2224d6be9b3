"""diffusers' ``WanTransformer3DModel`` (Wan, arXiv 2503.20314): text by cross-attention, no pooled vector.

What the adapter adds, and nothing else: timesteps of [0, 1000], and zeros where the text is padded, as ``WanPipeline``
gives them (the cross-attention has no mask: all L tokens are seen, padding as the zeros that it is).
"""

from __future__ import annotations

from torch import Tensor, nn

from archipel.backbones import base
from archipel.contracts import Conditioning


class WanDenoiser(base.Denoiser):
    """See ``base.Denoiser``. The cross-attention has no gate, so that its last projection is among what starts at zero."""

    CLASS = "WanTransformer3DModel"
    INPUT = "patch_embedding.weight"
    ZEROED = r"proj_out\.|condition_embedder\.time_proj\.|.*\.attn2\.to_out\.0\.|.*scale_shift_table$"

    def ends(self) -> list[nn.Module]:
        return [self.network.patch_embedding, self.network.condition_embedder, self.network.proj_out]

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C_in, T, H, W) float, t (B,) in [0, 1]; what stands in padded rows of ``cond.tokens`` has no effect."""
        (output,) = self.network(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=cond.tokens * cond.mask[..., None].to(cond.tokens),
            return_dict=False,
        )
        answer: Tensor = output
        return answer
