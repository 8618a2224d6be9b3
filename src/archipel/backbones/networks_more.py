"""diffusers configurations of LTX-Video, HunyuanVideo and CogVideoX transformers, from the dials of ``run.toml`` (no torch).

A builder returns constructor arguments that differ from diffusers' defaults or should not depend on them; ``networks`` adds
the rest, and what reads given frames. What the dials do not say is as in the released models: LTX-Video (arXiv 2501.00103),
HunyuanVideo (arXiv 2412.03603), CogVideoX (arXiv 2408.06072).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.backbones import flops
from archipel.config import RunConfig
from archipel.errors import ConfigError
from archipel.flow import ddpm

SCHEDULE = "_schedule"  # in expert.network of CogVideoX: the schedule that its weights were trained on


def ltx(config: RunConfig) -> dict[str, Any]:
    """``LTXVideoTransformer3DModel``: double_blocks + single_blocks alike; reads no pooled vector; RoPE splits itself."""
    part, values = config.expert, config.expert.patch**2
    return {
        "in_channels": flops.latent_shape(config)[0] * values,
        "out_channels": flops.latent_shape(config)[0] * values,
        "patch_size": part.patch,
        "patch_size_t": 1,
        "num_attention_heads": part.heads,
        "attention_head_dim": part.width // part.heads,
        "cross_attention_dim": part.width,  # captions are projected to the width first
        "num_layers": part.double_blocks + part.single_blocks,
        "caption_channels": flops.text_shape(config)[1],
    }


def hunyuan(config: RunConfig) -> dict[str, Any]:
    """``HunyuanVideoTransformer3DModel`` with two refiner blocks over the text, as the released one has."""
    part = config.expert
    return {
        "in_channels": flops.latent_shape(config)[0],
        "out_channels": flops.latent_shape(config)[0],
        "patch_size": part.patch,
        "patch_size_t": 1,
        "num_attention_heads": part.heads,
        "attention_head_dim": part.width // part.heads,
        "num_layers": part.double_blocks,
        "num_single_layers": part.single_blocks,
        "num_refiner_layers": 2,
        "guidance_embeds": False,
        "text_embed_dim": flops.text_shape(config)[1],
        "pooled_projection_dim": flops.text_shape(config)[2],
        "rope_axes_dim": list(part.rope_axes),
    }


def cogvideox(config: RunConfig) -> dict[str, Any]:
    """``CogVideoXTransformer3DModel`` with RoPE (as the 5b model; it splits a head 1:1.5:1.5 by itself), no pooled vector.

    Raises ConfigError where a head cannot be split so.
    """
    part, (C, T, H, W) = config.expert, flops.latent_shape(config)
    head = part.width // part.heads
    if head % 16:
        raise ConfigError(
            f"expert.width / expert.heads is {head}, but RoPE of cogvideox splits a head 1:1.5:1.5: make it a multiple of 16"
        )
    ratio = config.codec.patch[0]
    return {
        "in_channels": C,
        "out_channels": C,
        "patch_size": part.patch,
        "patch_size_t": None,
        "num_attention_heads": part.heads,
        "attention_head_dim": head,
        "num_layers": part.double_blocks + part.single_blocks,
        "time_embed_dim": min(512, part.width),
        "text_embed_dim": flops.text_shape(config)[1],
        "max_text_seq_length": flops.text_shape(config)[0],
        "sample_height": H,
        "sample_width": W,
        "sample_frames": (T - 1) * ratio + 1,
        "temporal_compression_ratio": ratio,
        "use_rotary_positional_embeddings": True,
    }


def facts(config: RunConfig) -> dict[str, Any]:
    """What the card of an expert says beside what every backbone's does: {} but for
    LTX-Video: ``rope_scale``, seconds and pixels that one latent position is long, as its pipeline gives them to RoPE;
    CogVideoX from released weights: ``schedule`` (see ``flow.ddpm.recipe``), and that they see all of the padding.
    """
    part, (pt, ph, pw) = config.expert, config.codec.patch
    if part.backbone == "ltx":
        return {"rope_scale": [pt / config.clips.fps, ph, pw]}
    if part.backbone == "cogvideox" and part.weights:
        schedule = _schedule(config)
        return {"mask_text": False, **({"schedule": schedule} if schedule else {})}
    return {}


def _schedule(config: RunConfig) -> dict[str, Any] | None:
    """The DDPM schedule of CogVideoX's released weights; None where they were trained on a flow (an expert of ours).

    Raises ConfigError where it is missing or not known.
    """
    given = config.expert.network.get(SCHEDULE)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{config.expert.weights} has no scheduler/scheduler_config.json: CogVideoX's weights mean nothing without the "
            "schedule that they were trained on; give the whole pipeline's folder as --weights"
        )
    if str(given.get("_class_name")).startswith("FlowMatch"):
        return None
    return ddpm.recipe(given, f"{config.expert.weights}: scheduler_config.json")


def check(config: RunConfig, network: Mapping[str, Any]) -> None:
    """Whether experts can begin with the weights of ``network`` (complete), beyond what ``config.fits`` compares.

    Raises ConfigError for a variant that needs inputs which an expert is not given, and naming both sides where a CogVideoX
    has no places for such clips or captions, or no schedule.
    """
    if network.get("image_condition_type") == "token_replace":
        raise ConfigError(
            f"{config.expert.weights} is a HunyuanVideo image-to-video model that replaces tokens (image_condition_type = "
            "token_replace), which is not supported: use a text-to-video model; expert.tasks gives it frames"
        )
    if network.get("ofs_embed_dim"):
        raise ConfigError(
            f"{config.expert.weights} is a CogVideoX 1.5 image-to-video model (ofs_embed_dim), which is not supported: use a "
            "text-to-video model; expert.tasks gives it frames"
        )
    if network["_class_name"] == "CogVideoXTransformer3DModel":
        _schedule(config)
        _check_places(config, network)


def _check_places(config: RunConfig, network: Mapping[str, Any]) -> None:
    (_, _, H, W), weights = flops.latent_shape(config), config.expert.weights
    high, wide = network["sample_height"], network["sample_width"]
    most, learned = network["max_text_seq_length"], network["use_learned_positional_embeddings"]
    if not network["use_rotary_positional_embeddings"] and config.text.tokens != most:
        raise ConfigError(
            f"{weights} has places for {most} text tokens, but text.tokens is {config.text.tokens}: set it to {most}"
        )
    # Tables of learned places have one size; CogVideoX 1.5 cuts its own from the corner of one that must be large enough.
    if (learned and (high, wide) != (H, W)) or (network["patch_size_t"] and (high < H or wide < W)):
        raise ConfigError(
            f"{weights} has places for latents of {high}x{wide}{'' if learned else ' at most'}, but clips.size = {config.clips.size} "
            f"makes {H}x{W}"
        )
