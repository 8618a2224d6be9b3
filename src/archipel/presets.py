"""Presets: the handful of settings that a scale of work needs. Everything else keeps its default.

A preset is plain values over the defaults; ``--set`` goes on top. docs/log.md says which measurements chose them.
"""

from __future__ import annotations

import difflib
from typing import Any

from archipel.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on two cores: to see the whole flow, and for tests. Not for quality.
    "tiny": {
        "clips": {"count": 96, "size": 16, "frames": 4},
        "codec": {"patch": [2, 4, 4], "channels": 48},
        "text": {"tokens": 12},
        "partition": {"k": 2, "fine": 12},
        "expert": {
            "width": 64,
            "heads": 2,
            "double_blocks": 1,
            "single_blocks": 2,
            "steps": 150,
            "batch": 8,
            "validate_every": 50,
            "checkpoint_every": 50,
        },
        "router": {
            "width": 24,
            "heads": 1,
            "blocks": 1,
            "steps": 80,
            "batch": 16,
            "validate_every": 20,
            "checkpoint_every": 40,
        },
        "sample": {"steps": 10},
        "evaluate": {"count": 16, "showcase": 6, "frames": 2, "image_size": 64, "pca": 8},
        "islands": {"heartbeat": 2.0, "lease": 10.0},
    },
    # At most 12 minutes on two cores, one emoji package. docs/log.md has the measurements behind the numbers.
    "demo": {
        "clips": {"source": "fluent-emoji", "packages": [3], "min_motion": 0.001, "phases": 8},
        "codec": {"channels": 64},
        "text": {"tokens": 12},
        "partition": {"balanced": True},
        "expert": {"steps": 1000, "batch": 8, "lr": 4e-3},
        "router": {"steps": 500, "batch": 24},
        "sample": {"steps": 12},
        "evaluate": {"count": 94},
    },
    # Hours on two cores, all four packages.
    "long": {
        "clips": {"source": "fluent-emoji", "packages": [1, 2, 3, 4], "min_motion": 0.001, "phases": 8},
        "partition": {"balanced": True},
        "expert": {"width": 192, "heads": 6, "single_blocks": 4, "steps": 1200, "batch": 16, "lr": 3e-3},
        "router": {"steps": 600, "batch": 48},
        "evaluate": {"count": 224, "frames": 8},
    },
    # Small experts that are soon at their capacity, for `archipel study`: five seeds of every arm in a night at most on two
    # cores. Chosen on validation captions of other splits (docs/results has the trials).
    "study": {
        "clips": {"source": "fluent-emoji", "packages": [1, 2, 3, 4], "min_motion": 0.001, "phases": 8},
        "partition": {"k": 4, "features": "text", "balanced": True},
        "expert": {
            "width": 64,
            "heads": 2,
            "double_blocks": 1,
            "single_blocks": 2,
            "prediction": "x0",
            "steps": 1200,
            "batch": 8,
            "lr": 6e-3,
            "validate_every": 250,
            "checkpoint_every": 600,
        },
        "router": {
            "width": 16,
            "heads": 1,
            "blocks": 1,
            "steps": 400,
            "batch": 32,
            "validate_every": 50,
            "checkpoint_every": 200,
        },
        "evaluate": {"count": 112},
        "study": {"small_batch_lr": 3e-3},
    },
    # Minutes on one GPU, all four packages at 64x64 and 16 frames.
    "gpu": {
        "clips": {
            "source": "fluent-emoji",
            "packages": [1, 2, 3, 4],
            "frames": 16,
            "fps": 8.0,
            "size": 64,
            "min_motion": 0.001,
            "phases": 6,
        },
        "codec": {"channels": 96},
        "expert": {
            "width": 384,
            "heads": 6,
            "double_blocks": 2,
            "single_blocks": 8,
            "steps": 8000,
            "batch": 32,
            "lr": 1e-3,
            "validate_every": 500,
            "checkpoint_every": 500,
        },
        "router": {"width": 128, "heads": 4, "blocks": 2, "steps": 4000, "batch": 96},
        "evaluate": {"count": 224, "frames": 8, "image_size": 224},
    },
    # Paris 2.0 (arXiv 2605.26064) as far as it is published, and Open-Sora 2.0 (arXiv 2503.09642), whose recipe it follows:
    # three FLUX experts on HunyuanVideo's latents, T5-v1.1-XXL and CLIP ViT-L/14. To `plan` nothing is needed; to train,
    # give --data, --codec, --text and (as the paper does) --weights. Not published, and chosen here: clips per step, steps,
    # and the router's steps; the router is a DiT of about 100 M parameters as there.
    "paris2": {
        "clips": {"frames": 29, "fps": 24.0, "size": 256},
        "codec": {
            "kind": "autoencoder",
            "model": "AutoencoderKLHunyuanVideo",
            "patch": [4, 8, 8],
            "channels": 16,
            "causal": True,
        },
        "text": {"encoder": "t5+clip", "tokens": 512, "width": 4096, "pooled_width": 768},
        "expert": {
            "backbone": "flux",
            "width": 3072,
            "heads": 24,
            "rope_axes": [16, 56, 56],
            "double_blocks": 19,
            "single_blocks": 38,
            "patch": 2,
            "steps": 20_000,
            "batch": 64,
            "lr": 5e-5,
            "warmup": 0,
            "cooldown": 0.0,
            "weight_decay": 0.0,
            "text_dropout": 0.316,
            "pooled_dropout": 0.316,
            "shift": 2.83,
            "validate_every": 500,
            "checkpoint_every": 500,
        },
        "router": {
            "width": 768,
            "heads": 12,
            "blocks": 11,
            "rope_axes": [16, 24, 24],
            "steps": 20_000,
            "batch": 64,
            "lr": 1e-4,
            "validate_every": 500,
            "checkpoint_every": 500,
        },
        "sample": {"steps": 50, "shift": 2.83, "guidance": 7.5},
        "evaluate": {"count": 2048, "frames": 8, "image_size": 224},
    },
}


def values(name: str) -> dict[str, Any]:
    """The preset's values. Raises ConfigError naming the nearest preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(
            f"--preset {name!r} is not one of {', '.join(PRESETS)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return PRESETS[name]


def without_source(preset: dict[str, Any]) -> dict[str, Any]:
    """The preset's values without those that only make sense for the source it was made for."""
    only = {"source", "path", "packages", "variants", "count", "license"}
    clips = {key: value for key, value in preset.get("clips", {}).items() if key not in only}
    return {**preset, "clips": clips}


def fit_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in ``rope_axes`` where width or heads were given without them, so that one dial derives the rest."""
    from archipel.config import rope_axes_for

    filled = dict(values)
    for name in ("expert", "router"):
        part = dict(values.get(name, {}))
        width, heads = part.get("width"), part.get("heads")
        if (
            isinstance(width, int)
            and isinstance(heads, int)
            and heads > 0
            and width % heads == 0
            and "rope_axes" not in part
        ):
            axes = rope_axes_for(width // heads)
            if axes is not None:
                part["rope_axes"] = list(axes)
                filled[name] = part
    return filled
