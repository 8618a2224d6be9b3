"""LTX-Video: our adapter and sampler against diffusers' own ``LTXPipeline`` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from tests.tiny import tiny_cond, tiny_transformer

from archipel.backbones import ltx
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import samplers

FPS, FRAMES, SIZE, STEPS = 12, 17, 128, 3
LATENT = (4, 3, 4, 4)  # of 17 frames of 128x128 with LTX-Video's compression of 8x32x32


@pytest.fixture
def model(tmp_path: Path) -> ltx.LTXDenoiser:
    network = LTXVideoTransformer3DModel.from_pretrained(tiny_transformer("ltx", tmp_path)).eval()
    return ltx.LTXDenoiser(network, {"prediction": "velocity", "rope_scale": [8 / FPS, 32, 32]})


def noise(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *LATENT, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_loop_gives_the_latents_of_diffusers_pipeline(model: ltx.LTXDenoiser, guidance: float) -> None:
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(shift=2.0), None, None, None, model.network)
    pipe.set_progress_bar_config(disable=True)
    cond, x = tiny_cond(), noise()
    null = cond.null()
    theirs = pipe(
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        frame_rate=FPS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=ltx.pack(x),
        prompt_embeds=cond.tokens,
        prompt_attention_mask=cond.mask,
        negative_prompt_embeds=null.tokens,
        negative_prompt_attention_mask=null.mask,
        output_type="latent",
    ).frames
    velocity = Mixture([model], one_each([0, 0], 1), guidance)
    ours = samplers.sample(velocity, x, cond, steps=STEPS, shift=2.0)
    torch.testing.assert_close(ours, ltx.unpack(theirs, LATENT[1:]), rtol=1e-5, atol=1e-5)
    assert (ours - x).abs().max() > 0.1, "a loop that does nothing would pass"


@pytest.mark.parametrize(("p", "pt"), [(1, 1), (2, 1), (2, 3)])
def test_tokens_are_packed_as_diffusers_packs_them(p: int, pt: int) -> None:
    x = noise()
    tokens = ltx.pack(x, p, pt)
    assert torch.equal(tokens, LTXPipeline._pack_latents(x, p, pt))
    assert torch.equal(ltx.unpack(tokens, LATENT[1:], p, pt), x)


@torch.no_grad()
def test_the_length_of_a_frame_reaches_the_network(model: ltx.LTXDenoiser) -> None:
    x, t, cond = noise(), torch.tensor([0.3, 0.9]), tiny_cond()
    faster = ltx.LTXDenoiser(model.network, {**model.facts, "rope_scale": [8 / (3 * FPS), 32, 32]})
    assert (model(x, t, cond) - faster(x, t, cond)).abs().max() > 1e-4
