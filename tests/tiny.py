"""Tiny random transformers in diffusers' own format: ``from tests.tiny import tiny_transformer``.

One of every backbone, of a few ten thousand parameters, with outputs of about unit size. Latents of ``CHANNELS``
channels, text tokens of width ``TEXT`` and pooled vectors of width ``POOLED`` fit all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHANNELS, TEXT, POOLED = 4, 16, 12

CLASSES = {
    "flux": "FluxTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
}


def tiny_config(name: str, channels: int = CHANNELS, text: int = TEXT, pooled: int = POOLED) -> dict[str, Any]:
    """Constructor arguments of a tiny transformer on latents of ``channels`` channels (flux: of 2x2 of them)."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    both = {"in_channels": channels, "out_channels": channels}
    return {
        "flux": {
            **heads,
            "patch_size": 1,
            "in_channels": 4 * channels,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": text,
            "pooled_projection_dim": pooled,
            "guidance_embeds": False,
            "axes_dims_rope": [4, 6, 6],
        },
        "wan": {
            **both,
            **heads,
            "patch_size": [1, 2, 2],
            "text_dim": text,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        "ltx": {**both, **heads, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": text},
        "hunyuan": {
            **both,
            **heads,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 2,
            "guidance_embeds": False,
            "text_embed_dim": text,
            "pooled_projection_dim": pooled,
            "rope_axes_dim": [4, 6, 6],
        },
        "cogvideox": {
            **both,
            **heads,
            "time_embed_dim": 24,
            "text_embed_dim": text,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "max_text_seq_length": 6,
            "use_rotary_positional_embeddings": True,
        },
    }[name]


def tiny_transformer(name: str, folder: Path, *, seed: int = 0, **more: Any) -> Path:
    """Save a tiny random transformer into ``folder`` (config.json, diffusion_pytorch_model.safetensors) and return it.

    ``more`` overrides constructor arguments (e.g. ``guidance_embeds=True``). The global random state stays as it was.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = getattr(diffusers, CLASSES[name])(**{**tiny_config(name), **more})
    network.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_cond(rows: int = 2, tokens: int = 6, *, text: int = TEXT, pooled: int = POOLED, seed: int = 1) -> Any:
    """A ``Conditioning`` of random text; the last row has two padding tokens, which are zero."""
    from archipel.contracts import Conditioning

    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[-1, -2:] = False
    values = torch.randn(rows, tokens, text, generator=generator) * mask[..., None]
    return Conditioning(values, mask, torch.randn(rows, pooled, generator=generator))
