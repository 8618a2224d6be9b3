"""Flux: our adapter and sampler against diffusers' own ``FluxPipeline`` on a tiny checkpoint.

FLUX makes pictures, which are clips of one frame. Its pipeline attends to padding of the text: ``mask_text`` is off.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tests.tiny import CHANNELS, tiny_cond, tiny_transformer

from archipel.backbones import flux, registry
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import samplers

STEPS, SIDE = 4, 6  # latent positions per side: 48 pixels


def pipeline(network: FluxTransformer2DModel, shift: float) -> FluxPipeline:
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=shift), None, None, None, None, None, network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(frames: int = 1) -> torch.Tensor:
    return torch.randn(2, CHANNELS, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_our_loop_gives_the_latents_of_diffusers_pipeline(tmp_path: Path, guidance: float) -> None:
    network = FluxTransformer2DModel.from_pretrained(tiny_transformer("flux", tmp_path)).eval()
    cond, x = tiny_cond(), noise()
    null = cond.null()
    theirs = pipeline(network, 2.0)(
        height=8 * SIDE,
        width=8 * SIDE,
        num_inference_steps=STEPS,
        true_cfg_scale=guidance,
        latents=FluxPipeline._pack_latents(x[:, :, 0], 2, CHANNELS, SIDE, SIDE),
        prompt_embeds=cond.tokens,
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds=null.tokens,
        negative_pooled_prompt_embeds=null.pooled,
        output_type="latent",
    ).images
    model = flux.FluxDenoiser(network, {"prediction": "velocity", "patch": 2, "mask_text": False})
    ours = samplers.sample(Mixture([model], one_each([0, 0], 1), guidance), x, cond, steps=STEPS, shift=2.0)
    torch.testing.assert_close(ours, flux.unpack(theirs, x, 2), rtol=1e-5, atol=1e-5)
    assert (ours - x).abs().max() > 0.1, "a loop that does nothing would pass"


def test_tokens_are_packed_as_diffusers_packs_them_frame_by_frame() -> None:
    x = noise(3)
    tokens = flux.pack(x, 2)
    frames = [FluxPipeline._pack_latents(x[:, :, t], 2, CHANNELS, SIDE, SIDE) for t in range(3)]
    assert torch.equal(tokens, torch.cat(frames, dim=1))
    assert torch.equal(flux.unpack(tokens, x, 2), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, SIDE // 2, SIDE // 2, "cpu", torch.float32)
    ours = flux.video_ids(3, SIDE // 2, SIDE // 2, torch.device("cpu"))
    assert torch.equal(ours[: len(ids)], ids)
    assert torch.equal(ours[len(ids) :], torch.cat([ids + torch.tensor([t, 0, 0]) for t in (1, 2)]))


@torch.no_grad()
def test_weights_with_a_guidance_embedder_are_those_without_it(tmp_path: Path) -> None:
    """FLUX.1-dev's embedder of a distilled scale is dropped: what remains is a network that never had one."""
    dev = FluxTransformer2DModel.from_pretrained(tiny_transformer("flux", tmp_path, guidance_embeds=True)).eval()
    about = {"_class_name": "FluxTransformer2DModel", **dev.config}
    config, tensors = flux.FluxDenoiser.settle(about, dev.state_dict())
    dropped = {name for name in dev.state_dict() if name not in tensors}
    assert dropped and all(name.startswith("time_text_embed.guidance_embedder.") for name in dropped)
    model = flux.FluxDenoiser(
        registry.build_network(config, tensors), {"prediction": "velocity", "patch": 2, "mask_text": False}
    )
    for p in dev.time_text_embed.guidance_embedder.parameters():
        p.zero_()  # an embedder that says nothing, as diffusers would run it
    x, t, cond = noise(), torch.tensor([0.3, 0.9]), tiny_cond()
    (theirs,) = dev(
        hidden_states=flux.pack(x, 2),
        timestep=t,
        guidance=torch.full((2,), 3.5),
        pooled_projections=cond.pooled,
        encoder_hidden_states=cond.tokens,
        txt_ids=torch.zeros(6, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, SIDE // 2, SIDE // 2, "cpu", torch.float32),
        return_dict=False,
    )
    torch.testing.assert_close(model(x, t, cond), flux.unpack(theirs, x, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_is_seen_only_where_it_is_not_masked(tmp_path: Path) -> None:
    network = FluxTransformer2DModel.from_pretrained(tiny_transformer("flux", tmp_path)).eval()
    x, t, cond = noise(2), torch.tensor([0.3, 0.9]), tiny_cond()
    changed = type(cond)(torch.where(cond.mask[..., None], cond.tokens, 9.0), cond.mask, cond.pooled)
    for mask_text in (True, False):
        model = flux.FluxDenoiser(network, {"prediction": "velocity", "patch": 2, "mask_text": mask_text})
        moved = (model(x, t, changed) - model(x, t, cond)).abs().amax((1, 2, 3, 4))
        assert moved[0] == 0, "a caption without padding"
        assert (moved[1] > 1e-3) == (not mask_text)
