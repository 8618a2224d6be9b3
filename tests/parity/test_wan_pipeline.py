"""Wan: our adapter and sampler against diffusers' own ``WanPipeline`` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tests.tiny import CHANNELS, tiny_cond, tiny_transformer

from archipel.backbones import wan
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import samplers

STEPS, SHIFT = 4, 3.0


class OurTimes(FlowMatchEulerDiscreteScheduler):
    """Steps at the times of our sampler: WanPipeline takes no sigmas, and Euler's own grid ends at 0.001 before 0."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_loop_gives_the_latents_of_diffusers_pipeline(tmp_path: Path, guidance: float) -> None:
    network = WanTransformer3DModel.from_pretrained(tiny_transformer("wan", tmp_path)).eval()
    pipe = WanPipeline(None, None, None, OurTimes(shift=SHIFT), transformer=network)
    pipe.set_progress_bar_config(disable=True)
    cond, x = tiny_cond(), torch.randn(2, CHANNELS, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=x,
        prompt_embeds=cond.tokens,
        negative_prompt_embeds=cond.null().tokens,
        output_type="latent",
    ).frames
    model = wan.WanDenoiser(network, {"prediction": "velocity"})
    ours = samplers.sample(Mixture([model], one_each([0, 0], 1), guidance), x, cond, steps=STEPS, shift=SHIFT)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - x).abs().max() > 0.1, "a loop that does nothing would pass"
