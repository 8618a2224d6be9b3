"""CogVideoX's transformer: diffusers' ``CogVideoXTransformer3DModel``, from scratch on our path or with released weights.

What the adapter adds: frames before channels, RoPE as its pipeline computes it, a mask over text padding (the released models
attend to it), and times. From scratch the network is fed 1000 t and predicts on the linear path. Released weights predict
v = alpha' eps - sigma' x0 on a DDPM schedule (``facts["schedule"]``): they are fed the same mixture of clip and noise in that
schedule's size and at that schedule's step, and the answer is exactly the velocity (or x0) that it stands for; losses are taken
on that, so training goes on from them. Source: CogVideoX (arXiv 2408.06072), diffusers' ``CogVideoXPipeline``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from archipel.backbones import base
from archipel.contracts import Conditioning
from archipel.flow import convert, ddpm


@lru_cache(maxsize=16)
def rope(
    head: int, grid: tuple[int, int, int], sample: tuple[int, int], sliced: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head) for a grid (T, H, W) of tokens. ``sample``: (H, W) of the grid that the weights know: other
    sizes are stretched to its scale around the middle, or (``sliced``: CogVideoX 1.5) cut from its corner."""
    T, H, W = grid
    if sliced:
        cut: dict[str, Any] = {"crops_coords": None, "grid_type": "slice", "max_size": sample}
    else:  # diffusers.pipelines.cogvideo.pipeline_cogvideox.get_resize_crop_region_for_grid
        high, wide = sample
        if high / wide < H / W:
            size = high, round(high / H * W)
        else:
            size = round(wide / W * H), wide
        top, left = round((high - size[0]) / 2), round((wide - size[1]) / 2)
        cut = {"crops_coords": ((top, left), (top + size[0], left + size[1]))}
    cos, sin = get_3d_rotary_pos_embed(embed_dim=head, grid_size=(H, W), temporal_size=T, device=device, **cut)
    return cos, sin


class CogVideoXDenoiser(base.Denoiser):
    """``facts`` beside the usual: {"schedule": see ``flow.ddpm.recipe``} for released weights. Reads no pooled vector."""

    CLASS = "CogVideoXTransformer3DModel"
    INPUT = "patch_embed.proj.weight"

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__(network, facts)
        schedule = facts.get("schedule")
        self._match = convert.angle_match(ddpm.alphas_cumprod(schedule)) if schedule else None

    def ends(self) -> list[nn.Module]:
        return [self.network.patch_embed, self.network.time_embedding, self.network.proj_out]

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if self._match is None:
            return self._raw(x, 1000 * t, cond)
        noisy, given = x.tensor_split((self.network.config.out_channels,), dim=1)
        step, _ = self._match(t)
        v = self._raw(torch.cat([convert.over_size(noisy, t), given], dim=1), step, cond)
        back = convert.velocity_from_v if self.prediction == "velocity" else convert.x0_from_v
        return back(noisy, v, t)

    def _raw(self, x: Tensor, step: Tensor, cond: Conditioning) -> Tensor:
        """The network itself: x (B, C_in, T, H, W), step (B,) of 1000 or of the schedule -> (B, C, T, H, W)."""
        B, (T, H, W) = x.shape[0], x.shape[2:]
        about = self.network.config
        p, pt = about.patch_size, about.patch_size_t
        grid = (T // (pt or 1), H // p, W // p)
        sample = (about.sample_height // p, about.sample_width // p)
        turned = about.use_rotary_positional_embeddings
        places = rope(about.attention_head_dim, grid, sample, pt is not None, x.device) if turned else None
        mask = torch.cat([cond.mask, cond.mask.new_ones(B, grid[0] * grid[1] * grid[2])], dim=1)[:, None]
        answer: Tensor
        (answer,) = self.network(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=cond.tokens,
            timestep=step,
            image_rotary_emb=places,
            attention_kwargs={"attention_mask": mask} if self.mask_text else None,
            return_dict=False,
        )
        return answer.transpose(1, 2)
