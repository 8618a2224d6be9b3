"""The network of every job of a run, as the configuration that diffusers writes (no torch: `init` and islands need it).

A network is a dictionary: ``_class_name`` and every constructor argument of that class, as they stand in ``config.json``.
From scratch it follows the dials of ``run.toml``; where ``expert.network`` is set (that of ``expert.weights``, resolved
at init) it is that one. Given frames are C + 1 more input channels behind the latents: C of their clean latents, and
their mask; the columns that read them start at zero. That is the same function as a projection of their own that starts at
zero, which is how Open-Sora 2.0 (arXiv 2503.09642, ``cond_in`` of its code) gives them to a Flux.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from archipel.backbones import flops, networks_more
from archipel.config import RunConfig
from archipel.errors import ConfigError

Network = dict[str, Any]

CLASSES: dict[str, str] = {
    "flux": "FluxTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
}

# Every constructor argument and its default: files from other versions of diffusers do not state all of them.
DEFAULTS: dict[str, Network] = {
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
    "WanTransformer3DModel": {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-06,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "caption_channels": 4096,
        "attention_bias": True,
        "attention_out_bias": True,
    },
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": [16, 56, 56],
        "image_condition_type": None,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": 512,
        "ofs_embed_dim": None,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "patch_size_t": None,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": False,
        "use_learned_positional_embeddings": False,
        "patch_bias": True,
    },
}

_TEXT = {
    "FluxTransformer2DModel": "joint_attention_dim",
    "WanTransformer3DModel": "text_dim",
    "LTXVideoTransformer3DModel": "caption_channels",
    "HunyuanVideoTransformer3DModel": "text_embed_dim",
    "CogVideoXTransformer3DModel": "text_embed_dim",
}
# Classes whose adapter packs positions into channels itself: in_channels counts all numbers of a token.
_PACKED = ("FluxTransformer2DModel", "LTXVideoTransformer3DModel")


class Reads(NamedTuple):
    """What a network reads: numbers per token or latent position (``in_channels``), widths of text and pooled vector."""

    channels: int
    text: int
    pooled: int | None  # None: it reads no pooled vector


def reads(network: Network) -> Reads:
    """What a network reads (see ``Reads``); absent keys have diffusers' defaults."""
    full = complete(network)
    pooled = full.get("pooled_projection_dim")
    return Reads(
        int(full["in_channels"]), int(full[_TEXT[full["_class_name"]]]), None if pooled is None else int(pooled)
    )


def complete(network: Network) -> Network:
    """A network with every constructor argument stated, tuples as lists, and no guidance embedder.

    Raises ConfigError for a class that is not among ours, or an argument that it does not have.
    """
    name = network.get("_class_name")
    if name not in DEFAULTS:
        raise ConfigError(
            f"expert.network: _class_name is {name!r}, expected one of {', '.join(DEFAULTS)}: run `archipel init` again"
        )
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in network.items() if not key.startswith("_")}
    if odd := sorted(given.keys() - DEFAULTS[name].keys()):
        raise ConfigError(
            f"expert.network: {name} has no argument {odd[0]!r}: these weights are of another version of it"
        )
    full = {"_class_name": name, **DEFAULTS[name], **given}
    # The embedder of a distilled guidance scale is left out of weights that have one: guidance is ours.
    return full | ({"guidance_embeds": False} if "guidance_embeds" in full else {})


def patch(network: Network, packed: int = 1) -> tuple[int, int, int]:
    """Latent frames, rows and columns that one token holds. ``packed``: what the adapter of flux packs (expert.patch)."""
    name = network["_class_name"]
    if name == "FluxTransformer2DModel":
        return 1, packed, packed
    size = complete(network)["patch_size"]
    if isinstance(size, list):
        return int(size[0]), int(size[1]), int(size[2])
    return int(network.get("patch_size_t") or 1), int(size), int(size)


# --- what a run asks for -----------------------------------------------------------------------------------------------


def expert_network(config: RunConfig, *, clusters: int = 0, image: bool | None = None) -> Network:
    """The network of an expert, or with ``clusters`` that of a monolith that is told one of so many clusters.

    ``image``: whether it reads given frames (None: as ``expert.tasks`` says). Raises ConfigError where ``expert.network``
    is not of ``expert.backbone``, or the cluster should be told to a backbone that reads no pooled vector.
    """
    name = CLASSES[config.expert.backbone]
    if config.expert.network:
        found = config.expert.network.get("_class_name", name)
        if found != name:
            raise ConfigError(
                f"expert.network is a {found}, but expert.backbone = {config.expert.backbone!r} is {name}"
            )
        network = complete({**config.expert.network, "_class_name": name})
        _check(network, config)
    else:
        network = complete({"_class_name": name, **_BUILDERS[config.expert.backbone](config)})
    if config.expert.given_frames if image is None else image:
        channels = flops.latent_shape(config)[0] + 1
        if name in _PACKED:
            channels *= math.prod(patch(network, config.expert.patch))
        network["out_channels"] = network["out_channels"] or network["in_channels"]
        network["in_channels"] += channels
    if clusters:
        if "pooled_projection_dim" not in network:
            raise ConfigError(
                f"monolith.condition = 'cluster' needs a backbone that reads a pooled vector, and {name} reads none: use "
                "expert.backbone = 'flux' or 'hunyuan'"
            )
        network["pooled_projection_dim"] += clusters
    return network


def _check(network: Network, config: RunConfig) -> None:
    """What adapters cannot use of released weights; ConfigError saying so. Channels and widths are ``config.fits``'s matter."""
    if network.get("image_dim") or network.get("added_kv_proj_dim"):
        raise ConfigError(
            "expert.weights is a Wan image-to-video model with an image encoder of its own, which is not supported: use a "
            "text-to-video model; expert.tasks gives it frames"
        )
    if network["_class_name"] not in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        networks_more.check(config, network)


def monolith_network(config: RunConfig) -> Network:
    """The network of the monolith: an expert's, told the cluster where ``monolith.condition`` says so."""
    return expert_network(config, clusters=flops.cluster_width(config))


def router_network(config: RunConfig) -> Network:
    """The network of the router: single-stream blocks of flux over the expert's tokens, K outputs."""
    part = config.router
    channels = flops.latent_shape(config)[0]
    _, text_width, pooled_width = flops.text_shape(config)
    inputs = 2 * channels + 1 if part.reads_image else channels
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": inputs * router_patch(config) ** 2,
        "out_channels": config.partition.k,
        "num_layers": 0,
        "num_single_layers": part.blocks,
        "attention_head_dim": part.width // part.heads,
        "num_attention_heads": part.heads,
        "joint_attention_dim": text_width,
        "pooled_projection_dim": pooled_width,
        "guidance_embeds": False,
        "axes_dims_rope": list(part.rope_axes),
    }


def router_patch(config: RunConfig) -> int:
    """Positions per side in a token of the router: as many as in one of an expert."""
    return patch(expert_network(config, image=False), config.expert.patch)[1]


def expert_facts(config: RunConfig, clusters: int = 0) -> dict[str, Any]:
    """``network`` in the card of an expert, or of a monolith that is told one of ``clusters`` clusters."""
    facts: dict[str, Any] = {"role": "expert", "prediction": config.expert.prediction, **_shapes(config)}
    flux = config.expert.backbone == "flux"
    if clusters:
        facts |= {"condition": "cluster", "clusters": clusters}
    if flux and config.expert.patch > 1:
        facts["patch"] = config.expert.patch
    if config.expert.given_frames:
        facts["image"] = True
    if flux and config.expert.weights:  # released weights were trained with all of the padding in sight
        facts["mask_text"] = False
    return facts | networks_more.facts(config)


def router_facts(config: RunConfig) -> dict[str, Any]:
    """``network`` in the card of the router."""
    facts: dict[str, Any] = {"role": "router", "experts": config.partition.k, **_shapes(config)}
    if config.router.reads != "both":
        facts["reads"] = config.router.reads
    if router_patch(config) > 1:
        facts["patch"] = router_patch(config)
    if config.router.reads_image:
        facts["image"] = True
    return facts


def _shapes(config: RunConfig) -> dict[str, Any]:
    return {"latent_shape": list(flops.latent_shape(config)), "text_shape": list(flops.text_shape(config))}


# --- from the dials ----------------------------------------------------------------------------------------------------


def _heads(config: RunConfig) -> Network:
    part = config.expert
    return {"attention_head_dim": part.width // part.heads, "num_attention_heads": part.heads}


def _flux(config: RunConfig) -> Network:
    part = config.expert
    _, text_width, pooled_width = flops.text_shape(config)
    return {
        **_heads(config),
        "patch_size": 1,
        "in_channels": flops.latent_shape(config)[0] * part.patch**2,
        "num_layers": part.double_blocks,
        "num_single_layers": part.single_blocks,
        "joint_attention_dim": text_width,
        "pooled_projection_dim": pooled_width,
        "axes_dims_rope": list(part.rope_axes),
    }


def _wan(config: RunConfig) -> Network:
    part = config.expert
    channels = flops.latent_shape(config)[0]
    return {
        **_heads(config),
        "patch_size": [1, part.patch, part.patch],
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": flops.text_shape(config)[1],
        "ffn_dim": flops.MLP_RATIO * part.width,
        "num_layers": part.double_blocks + part.single_blocks,
    }


_BUILDERS: dict[str, Callable[[RunConfig], Network]] = {
    "flux": _flux,
    "wan": _wan,
    "ltx": networks_more.ltx,
    "hunyuan": networks_more.hunyuan,
    "cogvideox": networks_more.cogvideox,
}
