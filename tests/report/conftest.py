"""A small finished run, fabricated: files of the shapes that the stages write, with clips that move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import config as configuration
from archipel import store
from archipel.run import Run

K, STEPS, N, FRAMES, SIZE = 3, 12, 16, 8, 32
ARMS = ("top1", "top2", "full", "threshold", "ancestral", "oracle", "monolith")
THINGS = (
    "red ball",
    "blue square",
    "green star",
    "yellow cat",
    "whale",
    "<script>alert('x')</script> & \"quoted\" ball",
)
COLOURS = ((214, 64, 60), (60, 110, 214), (70, 160, 90), (240, 190, 60), (70, 140, 180), (160, 90, 190))


def _clips(noise: float, lag: float, seed: int) -> np.ndarray:
    """Discs and squares that move over white: uint8 (N, F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    clips = np.full((N, FRAMES, SIZE, SIZE, 3), 255.0)
    for n in range(N):
        for f in range(FRAMES):
            phase = 2 * np.pi * (f / FRAMES + n / N + lag)
            cx, cy = SIZE / 2 + 7 * np.cos(phase), SIZE / 2 + 6 * np.sin(phase * (1 + n % 2))
            reach = np.hypot(x - cx, y - cy) if n % 2 else np.maximum(abs(x - cx), abs(y - cy))
            inside = np.clip(8.5 - reach, 0, 1)[..., None]
            clips[n, f] = clips[n, f] * (1 - inside) + np.array(COLOURS[n % len(COLOURS)]) * inside
    clips += rng.normal(0, noise, clips.shape)
    return np.clip(clips, 0, 255).astype(np.uint8)


def _weights(seed: int, hard: bool) -> np.ndarray:
    """Router weights (N, S, K) that start at a prior and grow certain."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (N, 1, K)) * np.linspace(0.3, 4, STEPS)[None, :, None] + rng.normal(
        0, 0.3, (N, STEPS, K)
    )
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (np.eye(K)[shares.argmax(-1)] if hard else shares).astype(np.float32)


def write_samples(run: Run) -> None:
    folder = run.samples("test")
    prompts = [
        {
            "caption": f"a {THINGS[n % len(THINGS)]} number {n}",
            "row": n,
            "id": f"{n:016x}",
            "group": f"g{n}",
            "cluster": n % K,
        }
        for n in range(N)
    ]
    store.write_json(folder / "prompts.json", prompts)
    names = ["prompts.json"]
    for place, arm in enumerate(("real", "codec", *ARMS)):
        clips = _clips({"real": 0, "codec": 6, "monolith": 26}.get(arm, 16), 0 if place < 2 else 0.03 * place, place)
        tensors: dict[str, np.ndarray] = {"clips": clips, "seeds": np.arange(N)}
        if arm in ("top1", "top2", "full", "threshold", "ancestral"):
            tensors["weights"] = _weights(place, arm == "top1")
        store.write_tensors(folder / f"{arm}.safetensors", tensors)
        names.append(f"{arm}.safetensors")
    store.write_card(folder, "samples", run.id, names, protocol={"split": "test"})


def write_training(run: Run) -> None:
    rng = np.random.default_rng(1)
    for place, name in enumerate([*run.expert_names, "monolith"]):
        folder = run.expert(name)
        folder.mkdir(parents=True)
        for step in range(10, 1001, 10):
            loss = 0.35 + (0.8 + 0.1 * place) * np.exp(-step / 180) + rng.normal(0, 0.015)
            line: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": 0.4, "lr": 2e-3, "seconds": step * 0.1}
            if step % 100 == 0:
                bins = [loss * (0.4 + abs(i - 3.5) / 4) for i in range(8)]
                part = {"loss": loss, "times": [(i + 0.5) / 8 for i in range(8)], "bins": bins}
                line |= {
                    "validation": loss * 1.08,
                    "validation_ema": loss * 1.05,
                    "validation_detail": {"raw": part, "ema": part},
                }
            store.append_jsonl(folder / "metrics.jsonl", line)
        touched = {
            "read": [f"shards/{name}/train.safetensors", "run.toml"],
            "wrote": [f"experts/{name}/model.safetensors"],
            "connected": [],
            "evidence": "Python's audit hook; not native code",
        }
        store.write_bytes(folder / "model.safetensors", bytes([place] * 64))
        store.write_card(
            folder,
            "expert",
            run.id,
            ["model.safetensors"],
            cluster=name,
            steps=1000,
            flops=2.1e14 * (3 if name == "monolith" else 1),
            resumed=place,
            threads=1,
            sha256="ab" * 32,
            build={"torch": "2.13.0", "cpu": "x86-64"},
            touched=touched,
        )


def write_router(run: Run) -> None:
    folder = run.expert("router")
    folder.mkdir(parents=True, exist_ok=True)
    times = [(i + 0.5) / 8 for i in range(8)]

    def branch(best: float) -> dict[str, Any]:
        bins = [
            {
                "t": t,
                "accuracy": best - (best - 0.45) * t**2,
                "cross_entropy": 0.3 + (1.2 - best) * t,
                "ece": 0.02 + 0.05 * t,
            }
            for t in times
        ]
        return {"accuracy": best - 0.1, "cross_entropy": 0.6, "ece": 0.04, "bins": bins}

    confusion = [[80, 12, 8], [9, 61, 30], [2, 14, 84]]
    quality = {
        "n": 24,
        "t": times,
        "prior": {"accuracy": 0.45, "cross_entropy": 1.05, "ece": 0.01},
        "with_text": branch(0.95),
        "without_text": branch(0.85),
        "confusion": {"with_text": confusion, "without_text": confusion},
    }
    store.write_json(folder / "quality.json", quality)
    store.write_json(folder / "calibration.json", {"t": times, "temperature": [1.2] * 8, "temperature_null": [1.3] * 8})


def write_ledger(run: Run, ratio: float = 1.004, matched: bool = True) -> None:
    experts = dict.fromkeys(run.expert_names, 210000000000000.0)
    arms = {
        name: {
            "updates": 1000,
            "flops": flops,
            "samples": 16000,
            "epochs": 145.5,
            "seconds": 71.2,
            "parameters": 1_130_000,
        }
        for name, flops in {**experts, "router": 3e12, "monolith": 6.3e14}.items()
    }
    sampling = {
        "per_clip": {"top1": {"experts": 1e9, "router": 3e7, "total": 1.03e9}, "threshold": {"total": 3e9}},
        "bounds": {"threshold": "at most"},
    }
    store.write_json(
        run.ledger,
        {
            "experts": experts,
            "router": 3e12,
            "monolith": 6.3e14,
            "ratio": ratio,
            "matched": matched,
            "arms": arms,
            "sampling": sampling,
        },
    )


def write_partition(run: Run) -> None:
    from PIL import Image

    folder = run.partition
    folder.mkdir(parents=True)
    sizes = {"train": [44, 31, 35], "validation": [7, 4, 5], "test": [12, 9, 11]}
    quality = {
        "method": "kmeans",
        "features": "transnet",
        "k": K,
        "sizes": {"clips": sizes, "groups": sizes},
        "silhouette": 0.183,
        "stability": {"adjusted_rand": [0.8, 0.7], "mean": 0.75, "min": 0.7, "reruns": 2},
        "fine": {"centroids": 36, "asked": 48, "share": [0.4, 0.3, 0.3]},
        "largest_share": 0.4,
        "moved_groups": 0,
    }
    store.write_json(folder / "quality.json", quality)
    captions = {
        str(k): [{"caption": f"a {thing}", "id": "0" * 16, "distance": 0.1} for thing in THINGS] for k in range(K)
    }
    store.write_json(folder / "captions.json", captions)
    clips = _clips(0, 0, 0)
    for k in range(K):
        sheet = Image.new("RGB", (4 * 102, 3 * 102), "#d8d8d8")
        for place in range(12):
            picture = Image.fromarray(clips[(place * K + k) % N, 0]).resize((96, 96), Image.Resampling.NEAREST)
            sheet.paste(picture, (place % 4 * 102 + 3, place // 4 * 102 + 3))
        sheet.save(folder / f"sheet-{k}.png")


def write_clips(run: Run) -> None:
    folder = run.clips
    folder.mkdir(parents=True)
    rejected = 'file,reason\nanim-1.webp,truncated\nanim-2.webp,truncated\n"<b>x</b>.webp",no caption\n'
    (folder / "rejected.csv").write_text(rejected)
    store.write_card(
        folder,
        "clips",
        run.id,
        ["rejected.csv"],
        provenance={"license": "MIT <i>says the package</i>", "packages": {"emoji <3>": "sha512-0"}},
        counts={
            "candidates": 160,
            "used": 157,
            "groups": 150,
            "train": 110,
            "validation": 16,
            "test": 31,
            "rejected": {"truncated": 2, "no caption": 1},
        },
    )


EXTRACTORS = ("efficientnet-appearance", "efficientnet-motion", "transnet")


def _interval(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def _score_rows(gap: float) -> list[dict[str, Any]]:
    rows = []
    for place, arm in enumerate(("codec", "real", *ARMS)):
        base = {"codec": 0.008, "real": 0.0004, "monolith": 0.061}.get(arm, 0.061 + gap + 0.003 * place)
        for name in EXTRACTORS:
            for metric, value in (
                (f"KID-{name}", base),
                (f"FD-{name}", 14 + 400 * base),
                (f"excess-FD-{name}", 400 * base),
            ):
                if not (arm == "real" and metric.startswith("excess")):
                    rows.append({"arm": arm, "metric": metric, **_interval(value, value * 0.16 + 1e-4)})
        more = {"motion": 0.05, "retrieval@1": 0.2 - 0.01 * place, "train-over-test": 0.48, "share-nearer-train": 0.5}
        more |= {"precision": 0.6, "coverage": 0.5, **{f"cluster-share-{k}": 0.33 for k in range(K)}}
        rows += [{"arm": arm, "metric": metric, **_interval(value, 0.02)} for metric, value in more.items()]
    return rows


def _compared(gap: float) -> list[dict[str, Any]]:
    rows = []
    for kind, scale in (("KID", 1.0), ("excess-FD", 400.0)):
        ratio = _interval(0.66, 0.12) if kind == "KID" else None
        gaps = {"difference": _interval(gap * scale, 0.008 * scale), "ratio": ratio}
        rows += [{"metric": f"{kind}-{name}", "arm": "top1", "baseline": "monolith", **gaps} for name in EXTRACTORS]
    return rows


def _probe(withheld: bool) -> dict[str, Any]:
    table = [
        {"clips": name, "n": 32, "similarity": _interval(0.4, 0.03), "retrieval@1": _interval(0.3, 0.05)}
        for name in ("real", "codec", "reversed", "static")
    ]
    reason = "retrieval of real clips is 4.0%, under 3 times chance" if withheld else ""
    return {"withheld": withheld, "reason": reason, "chance": {"retrieval@1": 1 / 32}, "table": table}


def write_scores(run: Run, gap: float = -0.021, groups: int = 140, grew: bool = False, withheld: bool = False) -> None:
    """Scores in which the archipelago's distance is ``gap`` (plus or minus 0.008) from the monolith's."""
    protocol = {"estimator": "kid, unbiased", "extractor": "efficientnet", "resize": 128, "split": "test"}
    rows = [{**row, "n": 96, "groups": groups, "protocol": protocol} for row in _score_rows(gap)]
    store.write_json(run.scores("test"), rows)
    clusters = {
        "data_train": [0.40, 0.28, 0.32],
        "captions": [0.37, 0.31, 0.32],
        "arms": {arm: [0.5, 0.2, 0.3] for arm in ("real", "codec", *ARMS)},
    }
    few = [f"too few clips to conclude: {groups} content groups, at least 100 are needed"] if groups < 100 else []
    said = "top1 lies no nearer to training clips than unseen real clips do; 0.5 is no copying."
    extra = {
        "format": 1,
        "run": run.id,
        "clips": 96,
        "groups": groups,
        "comparisons": _compared(gap),
        "clusters": clusters,
        "notes": [*few, "The partition was made with transnet: no circle."],
        "probe": _probe(withheld),
        "copying": {"extractor": "efficientnet-appearance", "grew": grew, "verdict": said},
        "extractors": {"circle": False, "sentence": "no circle"},
    }
    store.write_json(run.scores("test").with_name("test.extra.json"), extra)


@pytest.fixture
def empty_run(tmp_path: Path) -> Run:
    """A run that was only made."""
    values = {"clips": {"count": 157, "license": ""}, "partition": {"k": K}, "expert": {"steps": 1000}}
    return Run.create(tmp_path / "emoji", configuration.build(values))


@pytest.fixture
def full_run(empty_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with every file there is; its page shows few clips, for speed."""
    for name, count in (("ROWS", 2), ("OTHER_ROWS", 1)):
        monkeypatch.setattr(f"archipel.report.samples.{name}", count)
    for write in (
        write_clips,
        write_partition,
        write_training,
        write_router,
        write_ledger,
        write_samples,
        write_scores,
    ):
        write(empty_run)
    return empty_run


@pytest.fixture
def all_pictures(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same run, with as many clips as a page really shows."""
    for name, count in (("ROWS", 12), ("OTHER_ROWS", 6)):
        monkeypatch.setattr(f"archipel.report.samples.{name}", count)
    return full_run


@pytest.fixture
def scores_of() -> Callable[..., None]:
    """``write_scores``, for tests that need other scores."""
    return write_scores
