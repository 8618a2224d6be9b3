"""Our sampling over a backbone against diffusers' own pipeline on diffusers' own network of the same weights.

    python -m bench.backbone_loop [--small] [--out FILE]

What a run samples with (an ensemble of one expert, Euler) and FluxPipeline, WanPipeline, LTXPipeline and
HunyuanVideoPipeline get the same weights, noise, text embeddings and times; text encoders, autoencoders and progress bars
are left out on both sides. Both must end in the same latents first. With guidance diffusers calls the network twice per
step (LTX: once on both branches), we once on both branches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from archipel import config
from archipel.backbones import flops, flux, ltx, networks, registry
from archipel.backbones.base import Denoiser
from archipel.contracts import Conditioning
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import draws, samplers
from bench import common

AIM = 1.0
TOLERANCE = 1e-5  # relative to the latents' size
SHIFT, GUIDANCE = 3.0, 5.0
Loop = Callable[[float], Tensor]


class OurTimes(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Steps at the times of our sampler: WanPipeline takes no sigmas, and Euler's own grid ends at 0.001 before 0."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)


def settings(name: str, small: bool) -> config.RunConfig:
    """Experts of the demo's shape on latents of 16x16 positions: one frame for flux, which draws pictures, four for others."""
    shape = {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "single_blocks": 1} if small else {}
    pt, side = (
        (8, 32) if name == "ltx" else (4, 8)
    )  # what diffusers' pipelines believe of an autoencoder that is not there
    return config.build(
        {
            "clips": {"size": side * (4 if small else 16), "frames": pt * (1 if name == "flux" else 4)},
            "codec": {"patch": [pt, side, side], "channels": 16},
            "expert": {"backbone": name, "patch": 2, **shape},
        }
    )


def pair(made: config.RunConfig, seed: int = 0) -> tuple[Denoiser, Any]:
    """An expert, and a network of diffusers that nobody touched, with the same random weights (a fresh expert would answer
    zero)."""
    about = networks.expert_network(made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, plain = (registry.build_network(about).eval().requires_grad_(False) for _ in range(2))
    plain.load_state_dict(network.state_dict())
    return registry.adapter(about["_class_name"])(network, {**networks.expert_facts(made), "mask_text": False}), plain


def theirs(network: Any, made: config.RunConfig, noise: Tensor, cond: Conditioning, steps: int) -> Loop:
    """diffusers' loop as a function of the guidance scale."""
    name, null = made.expert.backbone, cond.null()
    T, H, W = noise.shape[2:]
    pictures = {"height": 8 * H, "width": 8 * W}
    text = {"prompt_embeds": cond.tokens, "negative_prompt_embeds": null.tokens}
    pooled = {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": null.pooled}
    common_ = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False, **text}
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if name == "flux":
        pipe = diffusers.FluxPipeline(euler, None, None, None, None, None, network)
        about = {"latents": flux.pack(noise, 2), **pictures, **pooled}
    elif name == "wan":
        pipe = diffusers.WanPipeline(None, None, None, OurTimes(shift=SHIFT), transformer=network)
        about = {"latents": noise, "num_frames": 4 * (T - 1) + 1, **pictures}
    elif name == "ltx":
        pipe = diffusers.LTXPipeline(euler, None, None, None, network)
        # The pipeline takes a token for a latent position: half as many, twice as long in RoPE (which patch_size = 2 says).
        about = {"latents": ltx.pack(noise, 2), "height": 16 * H, "width": 16 * W, "num_frames": 8 * (T - 1) + 1}
        about["frame_rate"] = made.clips.fps
        about |= {"prompt_attention_mask": cond.mask, "negative_prompt_attention_mask": cond.mask}
    else:
        pipe = diffusers.HunyuanVideoPipeline(None, None, network, None, euler, None, None)
        about = {"latents": noise, "num_frames": 4 * (T - 1) + 1, **pictures, **pooled}
        about |= {"prompt_attention_mask": cond.mask, "negative_prompt_attention_mask": cond.mask}
    pipe.set_progress_bar_config(disable=True)
    scale = "true_cfg_scale" if name in ("flux", "hunyuan") else "guidance_scale"

    def loop(guidance: float) -> Tensor:
        latents: Tensor = pipe(**common_, **about, **{scale: guidance})[0]
        if name == "flux":
            return flux.unpack(latents, noise, 2)
        return ltx.unpack(latents, (T, H, W), 2) if name == "ltx" else latents

    return loop


def run(small: bool = False) -> dict[str, Any]:
    # Short turns: what else runs on the machine is then about the same for neighbours.
    steps, rounds = (2, 2) if small else (4, 13)
    what = f"{steps} Euler steps, one clip, {'small sizes' if small else 'experts of the demo shape'}"
    with common.Benchmark("backbone_loop", what, ("torch", "diffusers")) as b:
        loops: dict[str, Callable[[], Tensor]] = {}
        for name in ("flux", "wan", "ltx", "hunyuan"):
            made = settings(name, small)
            model, plain = pair(made)
            arrays = common.clip_arrays(made, 1)
            cond = Conditioning(*(torch.from_numpy(arrays[key]) for key in ("tokens", "mask", "pooled")))
            cond = Conditioning(cond.tokens, cond.mask | True, cond.pooled)  # FLUX and Wan know no mask
            noise = torch.from_numpy(draws.clip_noise(range(1), flops.latent_shape(made)))
            peer = theirs(plain, made, noise, cond, steps)
            b.facts[f"parameters of {name}"] = model.parameters_total
            for guidance in (1.0, GUIDANCE):
                velocity = Mixture([model], one_each([0], 1), guidance)
                ours = partial(samplers.sample, velocity, noise, cond, steps=steps, shift=SHIFT)
                wanted = peer(guidance)
                apart = float((ours() - wanted).abs().max() / wanted.abs().max())
                b.facts[f"{name}, guidance {guidance:g}: apart, relative"] = apart
                if not apart <= TOLERANCE:
                    raise common.DifferentError(f"{name} with guidance {guidance:g} differs by {apart:.1e}")
                case = f"{name}, guidance {guidance:g}"
                loops |= {f"ours: {case}": ours, f"theirs: {case}": partial(peer, guidance)}
        taken = common.interleave(loops, rounds)
        for key in loops:
            if key.startswith("ours: "):
                case = key.removeprefix("ours: ")
                pipeline = {"flux": "FluxPipeline", "wan": "WanPipeline", "ltx": "LTXPipeline"}
                against = pipeline.get(case.split(",")[0], "HunyuanVideoPipeline")
                b.rows.append(common.versus(case, against, taken[key], taken[f"theirs: {case}"], AIM))
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
