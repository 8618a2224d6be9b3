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
        schedule = part.network.get(SCHEDULE)
        return {"mask_text": False, **({"schedule": dict(schedule)} if schedule else {})}
    return {}


def with_schedule(network: Mapping[str, Any], scheduler: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The configuration of released weights with what the ``scheduler_config.json`` beside them says (None: there is none).

    CogVideoX's own weights predict v on a DDPM schedule and need it; where the scheduler is a flow's, or the class another,
    nothing is added. Raises ConfigError where it is missing or not known, naming ``where``.
    """
    if network.get("_class_name") != "CogVideoXTransformer3DModel":
        return dict(network)
    if scheduler is None:
        raise ConfigError(
            f"{where} has no scheduler/scheduler_config.json: CogVideoX's weights mean nothing without the schedule they were "
            "trained on; give the whole pipeline's folder as expert.weights"
        )
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return dict(network)
    return {**network, SCHEDULE: ddpm.recipe(scheduler, f"{where}: scheduler_config.json")}


def check(network: Mapping[str, Any], latent: tuple[int, int, int, int], text: tuple[int, int, int]) -> None:
    """Whether one of these transformers can read clips of this shape and such captions: ConfigError naming both sides if not.

    ``network`` states every argument (``networks.complete``); of another class it is not looked at.
    """
    (_, T, H, W), (L, width, pooled), kind = latent, text, str(network["_class_name"])
    if not kind.startswith(("LTX", "Hunyuan", "CogVideoX")):
        return
    p, pt = network.get("patch_size", 1), network.get("patch_size_t") or 1
    if H % p or W % p or T % pt:
        raise ConfigError(f"the latents are {T}x{H}x{W}, which expert.weights cannot cut into patches of {pt}x{p}x{p}")
    wanted = network["caption_channels" if kind.startswith("LTX") else "text_embed_dim"]
    if wanted != width:
        raise ConfigError(f"expert.weights reads text of width {wanted}, but the text encoder gives {width}")
    if kind.startswith("Hunyuan"):
        _check_hunyuan(network, pooled)
    if kind.startswith("CogVideoX"):
        _check_cogvideox(network, (H, W), L)


def _check_hunyuan(network: Mapping[str, Any], pooled: int) -> None:
    if network["pooled_projection_dim"] != pooled:
        raise ConfigError(
            f"expert.weights reads pooled vectors of width {network['pooled_projection_dim']}, but the text encoder gives {pooled}"
        )
    if network.get("image_condition_type") == "token_replace":
        raise ConfigError(
            "expert.weights is a HunyuanVideo image-to-video model that replaces tokens (image_condition_type = token_replace), "
            "which is not supported: use a text-to-video model; expert.tasks gives it frames"
        )


def _check_cogvideox(network: Mapping[str, Any], space: tuple[int, int], L: int) -> None:
    sample = (network["sample_height"], network["sample_width"])
    if network.get("ofs_embed_dim"):
        raise ConfigError(
            "expert.weights is a CogVideoX 1.5 image-to-video model (ofs_embed_dim), which is not supported: use a text-to-video "
            "model; expert.tasks gives it frames"
        )
    if not network.get("use_rotary_positional_embeddings") and network["max_text_seq_length"] != L:
        raise ConfigError(
            f"expert.weights has places for {network['max_text_seq_length']} text tokens, but text.tokens is {L}: set it to that"
        )
    fixed = network.get("use_learned_positional_embeddings") or network.get("patch_size_t")
    if fixed and (space[0] > sample[0] or space[1] > sample[1]):
        raise ConfigError(
            f"expert.weights has places for latents of at most {sample[0]}x{sample[1]}, not {space[0]}x{space[1]}"
        )
    if network.get("use_learned_positional_embeddings") and space != sample:
        raise ConfigError(
            f"expert.weights has learned places for latents of {sample[0]}x{sample[1]} only, not {space[0]}x{space[1]}"
        )
