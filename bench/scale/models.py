"""Cases against the number of experts, of frames and the resolution, on networks of the default sizes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from archipel import config
from archipel.run import Run
from bench.scale import clips as by_clips
from bench.scale import world
from bench.scale.meter import metered

CLIPS = 20_000  # that partitions are made of where the number of experts changes
BATCH = 64
HELD = 4  # experts that fit into the bound on memory
_SMALL = {"expert": {"width": 64, "heads": 2}, "router": {"width": 32, "heads": 1}}


def by_experts(work: Path, k: int) -> dict[str, float]:
    """A partition of 20,000 clips into k clusters."""
    return _partition(work, k, balanced=False)


def by_experts_balanced(work: Path, k: int) -> dict[str, float]:
    """The same with clusters of equal size."""
    return _partition(work, k, balanced=True)


def _partition(work: Path, k: int, *, balanced: bool) -> dict[str, float]:
    from archipel import store
    from archipel.manifest import read_manifest, write_manifest

    root = work / f"experts-{k}-{balanced}"
    source = world.make_run(work / f"clips-{CLIPS}", CLIPS)
    if not root.exists():
        made = Run.create(root, world.settings(k, balanced=balanced))
        (root / "cache").symlink_to(source.cache.resolve())
        write_manifest(made.manifest, read_manifest(source.manifest))
        store.write_card(made.clips, "clips", made.id, ["manifest.parquet"])
    run, found = Run.open(root), {}
    with metered(found):
        by_clips._partition(run)
    return found


def _ensemble(work: Path, k: int) -> Path:
    from bench.sampling import random_run

    root = work / f"ensemble-{k}"
    if not (root / "run" / "run.toml").exists():
        random_run(config.build(config.merge(_SMALL, {"partition": {"k": k}})), root)
    return root / "run"


def _sample(work: Path, k: int, memory: int | None) -> dict[str, float]:
    import torch

    from archipel.backbones import flops
    from archipel.contracts import Conditioning
    from archipel.ensemble.parts import Parts
    from archipel.ensemble.strategies import Mixture, Routed, top_k
    from archipel.flow import draws, samplers
    from bench import common
    from bench.top1 import Dealt

    found: dict[str, float] = {}
    run = Run.open(_ensemble(work, k))
    arrays = common.clip_arrays(run.config, BATCH)
    cond = Conditioning(*(torch.from_numpy(arrays[name]) for name in ("tokens", "mask", "pooled")))
    noise = torch.from_numpy(draws.clip_noise(range(BATCH), flops.latent_shape(run.config)))
    with metered(found), torch.no_grad():
        parts = Parts(run, memory=memory)
        parts.available()
        experts = [parts.expert(name) for name in run.expert_names]
        velocity = Mixture(experts, Routed(Dealt(parts.router), top_k(1)), 2.0)  # type: ignore[arg-type]
        samplers.sample(velocity, noise, cond, steps=2)
    return {**found, "held": round(parts.shelf.used / 2**20, 2), "read": float(sum(parts.shelf.fetched.values()))}


def ensemble(work: Path, k: int) -> dict[str, float]:
    """64 clips, 2 steps, top-1 of k experts of width 64, dealt evenly among them: the worst case. Weights are read as well."""
    return _sample(work, k, None)


def ensemble_bounded(work: Path, k: int) -> dict[str, float]:
    """The same where the router and 4 experts fit into memory."""
    run = Run.open(_ensemble(work, k))
    sizes = [(run.expert(name) / "model.safetensors").stat().st_size for name in ("0", "router")]
    return _sample(work, k, HELD * sizes[0] + sizes[1] + (1 << 20))


def _shaped(frames: int, size: int) -> config.RunConfig:
    return config.build({"clips": {"frames": frames, "size": size}, "expert": {"batch": 4}})


def _step(settings: config.RunConfig) -> dict[str, float]:
    import tempfile

    from archipel.backbones.registry import build_expert
    from archipel.training.batches import open_shard
    from archipel.training.loop import Settings, Trainer
    from archipel.training.objective import FlowObjective
    from bench.training_step import make_shard

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        make_shard(Path(name) / "shard", settings, 16)
        shard = open_shard(Path(name) / "shard")
        trainer = Trainer(
            FlowObjective(build_expert(settings, seed=0), shard, seed=0, batch=settings.expert.batch, text_dropout=0.1),
            Settings.of(settings.expert),
        )
        with metered(found):
            trainer.advance()
            trainer.advance()
    return {**found, "tokens": float(_tokens(settings)), "cpu": found["cpu"] / 2, "wall": found["wall"] / 2}


def _tokens(settings: config.RunConfig) -> int:
    from archipel.backbones import flops

    _, T, H, W = flops.latent_shape(settings)
    return T * H * W + flops.text_shape(settings)[0]


def _codec(settings: config.RunConfig) -> dict[str, float]:
    import torch

    from archipel.encoders.codecs import PatchPCA, from_uint8

    found: dict[str, float] = {}
    clips = np.random.default_rng(0).integers(
        0, 256, (4, settings.clips.frames, settings.clips.size, settings.clips.size, 3), np.uint8
    )
    width = 3 * int(np.prod(settings.codec.patch))
    basis = torch.linalg.qr(torch.randn(width, settings.codec.channels, generator=torch.Generator().manual_seed(0)))[0]
    codec = PatchPCA(
        settings.codec.patch, 0.0, torch.zeros(width), basis.T.contiguous(), torch.ones(len(basis.T)), 1.0, 1.0
    )
    with metered(found), torch.no_grad():
        codec.decode(codec.encode(from_uint8(clips)))
    return found


def step_frames(_: Path, frames: int) -> dict[str, float]:
    """A training step of 4 clips of so many frames of 64x64."""
    return _step(_shaped(frames, 64))


def step_size(_: Path, size: int) -> dict[str, float]:
    """A training step of 4 clips of 16 frames of so many pixels a side."""
    return _step(_shaped(16, size))


def _forward(settings: config.RunConfig) -> dict[str, float]:
    import torch

    from archipel.backbones.registry import build_expert
    from archipel.ensemble.strategies import Mixture, one_each
    from archipel.flow import samplers
    from bench.top1 import inputs, shake

    found: dict[str, float] = {}
    network = build_expert(settings, seed=0)
    shake(network, 1)
    noise, cond = inputs(settings, 4)
    with metered(found), torch.no_grad():
        samplers.sample(Mixture([network], one_each([0] * 4, 1), 2.0), noise, cond, steps=2)
    return {**found, "tokens": float(_tokens(settings))}


def sample_frames(_: Path, frames: int) -> dict[str, float]:
    """4 clips of so many frames of 64x64, 2 Euler steps with guidance."""
    return _forward(_shaped(frames, 64))


def sample_size(_: Path, size: int) -> dict[str, float]:
    """4 clips of 16 frames of so many pixels a side, 2 Euler steps with guidance."""
    return _forward(_shaped(16, size))


def codec_frames(_: Path, frames: int) -> dict[str, float]:
    """4 clips of so many frames of 64x64 through the patch codec and back."""
    return _codec(_shaped(frames, 64))


def codec_size(_: Path, size: int) -> dict[str, float]:
    """4 clips of 16 frames of so many pixels a side through the patch codec and back."""
    return _codec(_shaped(16, size))


Case = Callable[[Path, int], dict[str, Any]]
EXPERTS: dict[str, Case] = {
    "clusters": by_experts,
    "clusters-balanced": by_experts_balanced,
    "ensemble": ensemble,
    "ensemble-bounded": ensemble_bounded,
}
FRAMES: dict[str, Case] = {"step-frames": step_frames, "sample-frames": sample_frames, "codec-frames": codec_frames}
SIZES: dict[str, Case] = {"step-size": step_size, "sample-size": sample_size, "codec-size": codec_size}
