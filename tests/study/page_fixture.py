"""A fabricated study folder of the shapes that a study writes: numbers that hang together, small clips that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from archipel import store

SEEDS = (0, 1, 2, 3, 4)
FRAMES, SIZE, CLIPS = 8, 32, 8
HOSTILE = "<script>alert('x')</script> & \"quoted\" | ball"
PRIMARY = "KID-efficientnet-appearance"
EXTRACTORS = ("efficientnet-appearance", "efficientnet-motion", "transnet", "i3d")
GOOD = {
    "real": 0.0004,
    "codec": 0.0061,
    "top1": 0.0224,
    "top2": 0.0241,
    "full": 0.0318,
    "ancestral": 0.0289,
    "calibrated-top1": 0.0219,
    "monolith": 0.0471,
    "monolith-small-batch": 0.0402,
    "monolith-short": 0.0633,
    "monolith-wide": 0.0377,
    "random-shards": 0.0512,
    "uniform": 0.0894,
    "oracle": 0.0197,
    "k8": 0.0265,
}
TITLES = {
    "real": ("Real clips", "real"),
    "codec": ("Codec only", "real"),
    "top1": ("Archipelago, top-1", "archipelago"),
    "top2": ("Archipelago, top-2", "archipelago"),
    "full": ("Archipelago, full mixture", "archipelago"),
    "ancestral": ("Archipelago, ancestral", "archipelago"),
    "calibrated-top1": ("Archipelago, top-1, calibrated", "archipelago"),
    "monolith": ("Monolith", "monolith"),
    "monolith-small-batch": ("Monolith, batch B/K, K times the steps", "monolith"),
    "monolith-short": ("Monolith stopped at 1/K of the compute", "control"),
    "monolith-wide": ("Monolith, parameters matched, equal FLOPs", "control"),
    "random-shards": ("Experts on random shards", "control"),
    "uniform": ("Uniform mixture", "control"),
    "oracle": ("Oracle router", "bound"),
    "k8": ("K = 8 at the same compute", "ablation"),
}


def interval(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def _clips(noise: float, lag: float, seed: int) -> np.ndarray:
    """Discs that go round on white: uint8 (N, F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    clips = np.full((CLIPS, FRAMES, SIZE, SIZE, 3), 255.0)
    for n in range(CLIPS):
        for f in range(FRAMES):
            phase = 2 * np.pi * (f / FRAMES + n / CLIPS + lag)
            reach = np.hypot(x - SIZE / 2 - 7 * np.cos(phase), y - SIZE / 2 - 6 * np.sin(phase * (1 + n % 2)))
            inside = np.clip(8.5 - reach, 0, 1)[..., None]
            clips[n, f] = clips[n, f] * (1 - inside) + np.array([40 + 25 * n, 130, 220 - 20 * n]) * inside
    return np.clip(clips + rng.normal(0, noise, clips.shape), 0, 255).astype(np.uint8)


def costs(arm: str) -> dict[str, Any]:
    if arm in ("real", "codec"):
        return {}
    short = arm == "monolith-short"
    own = 3_412_000 if TITLES[arm][1] in ("archipelago", "ablation") or arm in ("oracle", "uniform") else 1_130_000
    per_step = {"top2": 2, "full": 4, "uniform": 4}.get(arm, 1)
    return {
        "parameters": own,
        "active": 1_130_000 * per_step,
        "training_flops": 2.1e14 if short else 8.43e14 if own > 2e6 else 8.4e14,
        "samples": 256_000 if not short else 64_000,
        "updates": 16_000 if arm in ("monolith", "monolith-short") else 64_000,
        "sampling_flops": 2.4e10 * per_step,
        "evaluations": 24 * per_step,
    }


def _protocol(extractor: str, where: str, groups: int) -> dict[str, Any]:
    return {
        "estimator": "KID: cubic kernel, unbiased, over pairs of different content groups",
        "extractor": extractor,
        "weights": "ab12" * 16,
        "layer": "features",
        "resize": 128,
        "frames": FRAMES,
        "n": 160,
        "clips": "cd34" * 16,
        "reference": 160,
        "groups": groups,
        "divisor": "",
        "split": where,
        "prompts": "ef56" * 16,
        "pca": 0,
    }


def rows(groups: int) -> list[dict[str, Any]]:
    """table.json"""
    found = []
    for where, worse in (("test", 1.0), ("train", 0.8)):
        for arm, good in GOOD.items():
            base = good * worse
            values = {}
            for place, name in enumerate(EXTRACTORS):
                tail = "FVD" if name == "i3d" else f"FD-{name}"
                values[f"KID-{name}"] = (base * (1 + place / 4), 0.12 * base + 1e-4, name)
                if arm != "real":
                    values[f"excess-{tail}"] = (400 * base, 55 * base, name)
                values[tail] = (14 + 400 * base, 3.0, name)
            values["CLIP"] = (0.24 - base, 0.004, "clip")
            values["aesthetic"] = (4.1 - 6 * base, 0.03, "clip-aesthetic")
            values["flow-motion"] = (0.71 - 2 * base, 0.05, "optical-flow")
            for name in ("precision", "recall", "density", "coverage"):
                values[name] = (0.7 - 4 * base, 0.05, "efficientnet-appearance")
            values["train-over-test"] = (0.5 + base / 4, 0.02, "efficientnet-appearance")
            for metric, (value, width, extractor) in values.items():
                found.append(
                    {
                        "arm": arm,
                        "metric": metric,
                        **interval(value, width),
                        "n": 160 * len(SEEDS),
                        "groups": groups,
                        "seeds": len(SEEDS),
                        "protocol": _protocol(extractor, where, groups),
                        "set": where,
                    }
                )
    return found


def _comparisons(ratio: dict[str, float] | None) -> list[dict[str, Any]]:
    found = []
    for where in ("test", "train"):
        for metric in [f"KID-{name}" for name in EXTRACTORS] + ["excess-FVD"]:
            for arm in ("top1", "top2", "random-shards"):
                scale = 400 if "FVD" in metric else 1
                first = (where, metric, arm) == ("test", PRIMARY, "top1")
                gap = (GOOD[arm] - GOOD["monolith-small-batch"]) * scale
                own = GOOD["monolith-small-batch"] / GOOD[arm]
                found.append(
                    {
                        "set": where,
                        "metric": metric,
                        "arm": arm,
                        "baseline": "monolith-small-batch",
                        "primary": first,
                        "circle": "transnet" in metric,
                        "difference": interval(gap, abs(gap) * 0.3),
                        "ratio": ratio if first else None if "motion" in metric else interval(own, 0.24),
                        "verdict": f"{arm} against the monolith on {metric}, as the interval says.",
                    }
                )
    return found


def _ablations() -> list[dict[str, Any]]:
    experts = [
        {
            "name": f"K = {k}",
            "points": [[x, 0.05 / (1 + x / k), 0.045 / (1 + x / k), 0.055 / (1 + x / k)] for x in range(1, 8)],
        }
        for k in (2, 4)
    ]
    own = [["cluster 0", 0.012, 0.009, 0.015], ["cluster 1", 0.019, 0.014, 0.024], ["cluster 2", 0.016, 0.012, 0.02]]
    others = [["cluster 0", 0.051, 0.04, 0.06], ["cluster 1", 0.043, 0.033, 0.052], ["cluster 2", 0.062, 0.05, 0.073]]
    return [
        {
            "name": "specialisation",
            "title": "Specialisation",
            "question": "Does an expert know its own cluster's captions better than the others'?",
            "about": "Every expert alone, on 24 captions of its own cluster and of the others.",
            "columns": ["expert", "own captions", "others' captions", "clips"],
            "rows": [[f"expert {k}", interval(own[k][1], 0.003), interval(others[k][1], 0.01), 24] for k in range(3)],  # type: ignore[arg-type]
            "chart": {
                "kind": "bars",
                "x": "expert",
                "y": PRIMARY,
                "series": [{"name": "own captions", "points": own}, {"name": "others' captions", "points": others}],
            },
            "verdict": "Yes: each expert is nearer to real clips on its own captions; no interval overlaps.",
        },
        {
            "name": "router-time",
            "title": "The router over time",
            "question": "When does the router know?",
            "about": "Accuracy by time.",
            "columns": ["K", "accuracy"],
            "rows": [["2", 0.91], ["4", "not measured"], ["8", None]],
            "chart": {"kind": "lines", "x": "t, from clip to noise", "y": "error", "series": experts},
            "verdict": "Late.",
        },
        {
            "name": "crossed",
            "title": "Clusters by text, appearance and motion",
            "question": "Does it matter by what clips are clustered?",
            "about": "",
            "columns": ["clusters by", "KID"],
            "rows": [["text", interval(0.024, 0.004)], ["motion", interval(0.031, 0.004)]],
            "chart": {
                "kind": "intervals",
                "x": "clusters by",
                "y": PRIMARY,
                "series": [{"name": "", "points": [["text", 0.024, 0.02, 0.028], ["motion", 0.031, None, None]]}],
            },
            "verdict": "No difference between text and motion can be told.",
        },
    ]


def study(groups: int = 140, ratio: dict[str, float] | None = None) -> dict[str, Any]:
    """study.json"""
    captions = [f"a {thing} number {n}" for n, thing in enumerate(["red ball", "whale", HOSTILE, "owl"] * 2)]
    arms = [
        {
            "name": name,
            "title": title,
            "family": family,
            "member": "main" if name in ("top1", "monolith") else name,
            "about": f"About {title.lower()}.",
            "costs": costs(name),
        }
        for name, (title, family) in TITLES.items()
    ]
    shown = ["real", "codec", "top1", "top2", "full", "monolith", "monolith-small-batch", "random-shards"]
    pair = {"set": "test", "metric": PRIMARY, "arm": "top1", "baseline": "monolith-small-batch"}
    points = [
        {"seed": s, "arm": 0.022 + 0.002 * s * (-1) ** s, "baseline": 0.04 + 0.003 * (s - 2) - (0.02 if s == 4 else 0)}
        for s in SEEDS
    ]
    flops = [1e13, 3e13, 1e14, 3e14, 1e15]
    return {
        "format": 1,
        "run": "0123456789abcdef" * 4,
        "name": "emoji",
        "commit": "2dc05fb76b26026389e25f4774b732fcaefa8f5b",
        "seeds": list(SEEDS),
        "split_note": "70/10/20 by content group; every choice was made on validation, test was opened once.",
        "primary": {"arm": "top1", "metric": PRIMARY},
        "goal": {"ratio": 2.0, "low": 1.5},
        "fps": 8,
        "sets": {
            "test": {"title": "Test captions", "split": "test", "clips": 160, "groups": groups, "prompts": "ef" * 32},
            "train": {
                "title": "Training captions, new noise",
                "split": "train",
                "clips": 160,
                "groups": groups,
                "prompts": "ab" * 32,
            },
        },
        "members": [
            {
                "name": "main",
                "title": "Experts, router, monolith",
                "about": "",
                "overrides": {},
                "jobs": ["0", "1", "2", "router", "monolith"],
                "seeds": list(SEEDS),
            },
            {
                "name": "random-shards",
                "title": "Random shards",
                "about": "dealt out",
                "overrides": {"partition.method": "random"},
                "jobs": ["0", "1", "2"],
                "seeds": list(SEEDS),
            },
        ],
        "arms": arms,
        "baseline": {
            "chosen": "monolith-small-batch",
            "set": "validation",
            "metric": PRIMARY,
            "candidates": [
                {"arm": name, **interval(GOOD[name] * 1.1, 0.005)} for name in ("monolith", "monolith-small-batch")
            ],
        },
        "comparisons": _comparisons(ratio or interval(1.79, 0.31)),
        "copying": {
            "test": {"verdict": "top1 lies no nearer to training clips than unseen real clips do.", "grew": False}
        },
        "paired": [{**pair, "points": points}, {**pair, "set": "train", "points": points[:3]}],
        "ablations": _ablations(),
        "curve": {
            "x": "training FLOPs per arm",
            "points": [
                {
                    "label": f"width {width}, {place}",
                    "width": width,
                    "flops": f,
                    "ratio": interval(1.1 + 0.2 * place + 16 / width, 0.2),
                    "metric": PRIMARY,
                }
                for width in (64, 128)
                for place, f in enumerate(flops)
            ],
        },
        "pilot": {
            "about": "Two seeds by batch rule and width.",
            "trials": [
                {
                    "arm": arm,
                    "overrides": {"expert.batch": batch},
                    "seed": s,
                    "metric": PRIMARY,
                    "value": 0.04 + 0.001 * s,
                }
                for arm in ("top1", "monolith")
                for batch in (4, 16)
                for s in (0, 1)
            ],
            "chosen": {"expert.batch": 4},
        },
        "samples": {
            where: {
                "rule": "the first 8 captions, seed 0",
                "rows": [{"caption": c, "cluster": n % 3} for n, c in enumerate(captions)],
                "arms": shown,
            }
            for where in ("test", "train")
        },
        "notes": ["The partition was made with transnet; the primary metric uses another extractor."],
        "limits": ["32 x 32 pixels and 8 frames."],
        "seconds": {"train": 18000.0, "score": 2400.0},
    }


def write_study(
    folder: Path, groups: int = 140, ratio: dict[str, float] | None = None, shown: tuple[str, ...] = ()
) -> Path:
    """A finished study under ``folder``; returns it. ``shown``: arms with kept clips (without it, eight)."""
    value = study(groups, ratio)
    for part in value["samples"].values():
        part["arms"] = list(shown) or part["arms"]
    store.write_json(folder / "study.json", value)
    store.write_json(folder / "table.json", rows(groups))
    for where, part in value["samples"].items():
        for place, arm in enumerate(part["arms"]):
            noise = {"real": 0.0, "codec": 5.0}.get(arm, 6.0 + 500 * GOOD[arm])
            clips = _clips(noise, 0.0 if place < 2 else 0.03 * place, place + len(where))
            store.write_tensors(folder / "samples" / where / "s0" / f"{arm}.safetensors", {"clips": clips})
    return folder
