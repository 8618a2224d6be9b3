"""HunyuanVideo: our adapter and sampler against diffusers' own ``HunyuanVideoPipeline`` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from safetensors.torch import load_file
from tests.tiny import tiny_cond, tiny_transformer

from archipel import store
from archipel.backbones import hunyuan
from archipel.contracts import Conditioning
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import samplers

LATENT, STEPS = (4, 3, 4, 6), 3


@pytest.fixture
def model(tmp_path: Path) -> hunyuan.HunyuanDenoiser:
    network = HunyuanVideoTransformer3DModel.from_pretrained(tiny_transformer("hunyuan", tmp_path)).eval()
    return hunyuan.HunyuanDenoiser(network, {"prediction": "velocity"})


def noise(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *LATENT, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_our_loop_gives_the_latents_of_diffusers_pipeline(model: hunyuan.HunyuanDenoiser, guidance: float) -> None:
    pipe = HunyuanVideoPipeline(None, None, model.network, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    pipe.set_progress_bar_config(disable=True)
    cond, x = tiny_cond(), noise()
    null = cond.null()
    one = torch.zeros_like(null.mask).index_fill_(1, torch.tensor([0]), True)  # the refiner needs a token to average
    theirs = pipe(
        height=8 * LATENT[2],
        width=8 * LATENT[3],
        num_frames=4 * (LATENT[1] - 1) + 1,
        num_inference_steps=STEPS,
        true_cfg_scale=guidance,
        latents=x,
        prompt_embeds=cond.tokens,
        prompt_attention_mask=cond.mask,
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds=null.tokens,
        negative_prompt_attention_mask=one,
        negative_pooled_prompt_embeds=null.pooled,
        output_type="latent",
    ).frames
    ours = samplers.sample(Mixture([model], one_each([0, 0], 1), guidance), x, cond, steps=STEPS, shift=7.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - x).abs().max() > 0.1, "a loop that does nothing would pass"


@torch.no_grad()
def test_guidance_embedder_of_released_weights_is_dropped(tmp_path: Path) -> None:
    folder = tiny_transformer("hunyuan", tmp_path, guidance_embeds=True)
    config, tensors = store.read_json(folder / "config.json"), load_file(folder / "diffusion_pytorch_model.safetensors")
    settled, kept = hunyuan.HunyuanDenoiser.settle(config, tensors)
    assert config["guidance_embeds"] and not settled["guidance_embeds"]
    assert sorted(tensors.keys() - kept.keys()) == [
        f"time_text_embed.guidance_embedder.linear_{n}.{part}" for n in (1, 2) for part in ("bias", "weight")
    ]
    network = HunyuanVideoTransformer3DModel.from_config(settled).eval()
    network.load_state_dict(kept)
    ours = hunyuan.HunyuanDenoiser(network, {"prediction": "velocity"})
    # With the embedder's last layer at zero diffusers' own network is the same one.
    whole = HunyuanVideoTransformer3DModel.from_pretrained(folder).eval()
    torch.nn.init.zeros_(whole.time_text_embed.guidance_embedder.linear_2.weight)
    torch.nn.init.zeros_(whole.time_text_embed.guidance_embedder.linear_2.bias)
    x, t, cond = noise(), torch.tensor([0.3, 0.9]), tiny_cond()
    text = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
    theirs = whole(x, 1000 * t, pooled_projections=cond.pooled, guidance=torch.tensor([6000.0] * 2), **text).sample
    torch.testing.assert_close(ours(x, t, cond), theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_null_text_is_finite_whatever_its_padding_holds(model: hunyuan.HunyuanDenoiser) -> None:
    x, t, null = noise(), torch.tensor([0.3, 0.9]), tiny_cond().null()
    plain = model(x, t, null)
    assert bool(plain.isfinite().all())
    torch.testing.assert_close(model(x, t, Conditioning(null.tokens + 9, null.mask, null.pooled)), plain)
