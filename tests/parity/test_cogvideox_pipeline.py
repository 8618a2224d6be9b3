"""CogVideoX: our adapter against diffusers' own ``CogVideoXPipeline`` and its scheduler, on tiny checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tests.tiny import tiny_cond, tiny_transformer

from archipel.backbones import cogvideox
from archipel.contracts import Conditioning
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import convert, ddpm
from archipel.flow.losses import prediction_loss

# The released models': zero terminal SNR, trailing steps, v-prediction (2b: shift 3, 5b: shift 1).
SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "5b: RoPE": {},
    "5b: RoPE on another size": {"sample_height": 12, "sample_width": 10},
    "2b: sine tables": {"use_rotary_positional_embeddings": False},
    "1.5: patches of two frames": {"patch_size_t": 2},
}
LATENT, STEPS = (4, 4, 8, 8), 4


def made(folder: Path, prediction: str = "velocity", shift: float = 3.0, **network: Any) -> tuple[Any, Any]:
    """A released model, and diffusers' pipeline of the same one."""
    net = CogVideoXTransformer3DModel.from_pretrained(tiny_transformer("cogvideox", folder, **network)).eval()
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=shift)
    pipe = CogVideoXPipeline(None, None, None, net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    schedule = ddpm.recipe({**scheduler.config, "_class_name": "CogVideoXDDIMScheduler"})
    facts = {"prediction": prediction, "mask_text": False, "schedule": schedule}
    return cogvideox.CogVideoXDenoiser(net, facts), pipe


def noise(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *LATENT, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "guidance"), [(kind, 1.0) for kind in KINDS] + [("5b: RoPE", 6.0)])
@torch.no_grad()
def test_euler_on_our_path_gives_the_latents_of_diffusers_ddim_loop(kind: str, guidance: float, tmp_path: Path) -> None:
    """DDIM is Euler on the linear path at the times of equal log-SNR, where a clip and its noise are mixed alike."""
    model, pipe = made(tmp_path, **KINDS[kind])
    cond, x = tiny_cond(), noise()
    theirs = pipe(
        height=8 * LATENT[2],
        width=8 * LATENT[3],
        num_frames=4 * (LATENT[1] - 1) + 1,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=x.transpose(1, 2),
        prompt_embeds=cond.tokens,
        negative_prompt_embeds=cond.null().tokens,
        output_type="latent",
    ).frames.transpose(1, 2)
    table = ddpm.alphas_cumprod(model.facts["schedule"])
    times = [*convert.table_times(table)[pipe.scheduler.timesteps.numpy()].tolist(), 0.0]
    assert times[0] == 1.0, "zero terminal SNR: the loop starts from pure noise"
    ours, velocity = x, Mixture([model], one_each([0, 0], 1), guidance)
    for now, after in itertools.pairwise(times):
        ours = ours + (after - now) * velocity(ours, torch.full((2,), now), cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (ours - x).abs().max() > 0.1, "a loop that does nothing would pass"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_clip_at_any_state_and_time_is_what_the_scheduler_derives(shift: float, tmp_path: Path) -> None:
    model, pipe = made(tmp_path, shift=shift)
    clips, _ = made(tmp_path, "x0", shift=shift)
    cond, generator = tiny_cond(), torch.Generator().manual_seed(1)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(1000)
    times = convert.table_times(ddpm.alphas_cumprod(model.facts["schedule"]))
    for step in (999, 700, 250, 3):
        x0, eps = (torch.randn(2, *LATENT, generator=generator) for _ in range(2))
        a = scheduler.alphas_cumprod[step]
        theirs_x = (a**0.5 * x0 + (1 - a) ** 0.5 * eps).float()  # DDPM, eq. 4
        v = model.network(theirs_x.transpose(1, 2), cond.tokens, torch.full((2,), step), image_rotary_emb=_rope(pipe))
        alpha, sigma = float(a) ** 0.5, float(1 - a) ** 0.5
        clip = alpha * theirs_x - sigma * v.sample.transpose(1, 2)  # the scheduler's own formula
        t = torch.full((2,), float(times[step]))
        x = (1 - t[0]) * x0 + t[0] * eps
        torch.testing.assert_close(clips.predict(x, t, cond), clip, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(convert.x0_from_velocity(x, model(x, t, cond), t), clip, rtol=1e-4, atol=2e-5)


def _rope(pipe: Any) -> Any:
    return pipe._prepare_rotary_positional_embeddings(8 * LATENT[2], 8 * LATENT[3], LATENT[1], torch.device("cpu"))


@torch.no_grad()
def test_frames_that_are_given_are_not_scaled_with_the_noise(tmp_path: Path) -> None:
    """Columns that read given frames see them as they are, at every time."""
    model, _ = made(tmp_path, in_channels=9)
    model.image = True
    x, t, cond = noise(), torch.tensor([0.4, 0.8]), tiny_cond()
    given = torch.randn(2, 5, *LATENT[1:], generator=torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []
    model.network.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    model(x, t, cond.given(given))
    torch.testing.assert_close(seen[0].transpose(1, 2)[:, 4:], given, rtol=0, atol=0)
    torch.testing.assert_close(seen[0].transpose(1, 2)[:, :4], convert.over_size(x, t), rtol=0, atol=0)


@torch.no_grad()
def test_from_scratch_padding_is_masked(tmp_path: Path) -> None:
    model, _ = made(tmp_path)
    fresh = cogvideox.CogVideoXDenoiser(model.network, {"prediction": "velocity"})
    x, t, cond = noise(), torch.tensor([0.4, 0.8]), tiny_cond()
    garbage = Conditioning(torch.where(cond.mask[..., None], cond.tokens, 50.0), cond.mask, cond.pooled)
    plain = fresh(x, t, cond)
    torch.testing.assert_close(fresh(x, t, garbage), plain)
    assert (model(x, t, garbage) - model(x, t, cond))[1].abs().max() > 1e-3, "the released models do see it"
    direct = fresh.network(x[:1].transpose(1, 2), cond.tokens[:1], 1000 * t[:1], image_rotary_emb=_rope(_pipe(fresh)))
    torch.testing.assert_close(plain[:1], direct.sample.transpose(1, 2), rtol=1e-5, atol=1e-6)  # a caption without any


def _pipe(model: Any) -> CogVideoXPipeline:
    return CogVideoXPipeline(None, None, None, model.network, CogVideoXDDIMScheduler())


def test_released_weights_learn_on_our_path(tmp_path: Path) -> None:
    """The loss of the velocity that a v-prediction stands for reaches the weights, and lowers itself."""
    model, _ = made(tmp_path)
    cond, t = tiny_cond(), torch.tensor([0.3, 0.8])
    noisy, clip = noise(), noise().flip(1) * 0.5 + 1
    x = (1 - t)[:, None, None, None, None] * clip + t[:, None, None, None, None] * noisy
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = prediction_loss("velocity", model.predict(x, t, cond), clip, noisy, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
