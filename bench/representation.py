"""Which representation works small: what codecs cost, and samples at an equal budget of training FLOPs.

    python -m bench.representation [--tflop 6] [--arms NAME ...] [--autoencoder-seconds 180] [--work DIR] [--out FILE]

The demo's clips (one emoji package), one network per arm through the project's own training loop, one seed. Captions of
train and validation are asked for; the test split is not looked at. Distances as the project defines them:

- FD: Frechet on EfficientNet appearance in a PCA of real training clips, generated for train captions against all
  real training clips; KID the same for validation captions against the validation clips (unbiased at any number).
- own: cosine between the features of a generated clip and of the real clip of its caption; R@5: the own real clip is
  among the five nearest. Both about the mean of the real training clips.

Minutes an arm at the default budget; ``--work`` keeps decoded clips between calls, and a sheet of samples per arm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel import cache, config, presets, store
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.contracts import Codec, Conditioning
from archipel.data.stage import ingest
from archipel.encoders import codecs
from archipel.encoders.features import APPEARANCE, extract
from archipel.encoders.text import open_text
from archipel.ensemble.guidance import Guided
from archipel.evaluation.distances import GroupKernel, Moments, fit_pca, frechet
from archipel.flow import draws, samplers
from archipel.manifest import read_manifest, rows_of
from archipel.partition.shards import write_rows
from archipel.partition.sheets import draw
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training.batches import open_shard
from archipel.training.loop import Settings, fit
from archipel.training.objective import FlowObjective
from bench import common, conv_autoencoder

WHAT = "codecs and samples at equal training FLOPs, one seed"
RECIPE = {"batch": 24, "lr": 4e-3, "validate_every": 10**6, "checkpoint_every": 10**6}
ASKED = 48  # train captions that are generated
ARMS: dict[str, tuple[dict[str, Any], str]] = {  # codec, prediction
    "pca 4x8x8 C=64 gamma .5": ({"channels": 64, "gamma": 0.5}, "velocity"),
    "pca 4x8x8 C=96 gamma 0": ({"channels": 96, "gamma": 0.0}, "velocity"),
    "pca 4x8x8 C=96 gamma .5": ({"channels": 96, "gamma": 0.5}, "velocity"),
    "pca 4x8x8 C=96 gamma 1": ({"channels": 96, "gamma": 1.0}, "velocity"),
    "pca 4x8x8 C=96 gamma .5 x0": ({"channels": 96, "gamma": 0.5}, "x0"),
    "pca 8x4x4 C=64 gamma .5": ({"patch": (8, 4, 4), "channels": 64, "gamma": 0.5}, "velocity"),
    "pixels 4x8x8 x0": ({"kind": "pixels"}, "x0"),
}
BLOCKS = ((4, 8, 8), (2, 8, 8), (8, 4, 4), (4, 4, 4))
CHANNELS = (32, 64, 96, 128)
SMALL = {
    "clips": {"source": "shapes", "count": 60, "min_motion": 0.0},
    "expert": {"width": 32, "heads": 1},
    "sample": {"steps": 2},
    "evaluate": {"frames": 2, "image_size": 32},
}


@dataclass(frozen=True)
class World:
    """The clips: rows of ``pixels`` uint8 (N, F, H, W, 3), further windows, captions, content groups, splits."""

    settings: config.RunConfig
    pixels: np.ndarray
    phases: np.ndarray | None
    text: Conditioning
    group: np.ndarray
    train: np.ndarray
    held: np.ndarray

    @classmethod
    def read(cls, values: dict[str, Any], folder: Path) -> World:
        """Decode the clips into ``folder``, or find them there."""
        made = (folder / "run.toml").exists()
        run = Run.open(folder) if made else Run.create(folder, config.build(values))
        ingest(run, StopFlag())
        entry, clips = cache.open_kind(run.cache, "pixels"), read_manifest(run.manifest)
        names = sorted({clip.group for clip in clips})
        return cls(
            run.config,
            entry["clips"][:],
            entry["phases"][:] if "phases" in entry.names else None,
            open_text(run.config.text).encode([clip.caption for clip in clips]),
            np.array([names.index(clip.group) for clip in clips]),
            np.array(rows_of(clips, "train")),
            np.array(rows_of(clips, "validation")),
        )

    def windows(self) -> np.ndarray:
        """Every window of the training clips, uint8 (N P, F, H, W, 3)."""
        first = self.pixels[self.train, None]
        every = first if self.phases is None else np.concatenate([first, self.phases[self.train]], 1)
        return every.reshape(-1, *first.shape[2:])


# --- codecs ----------------------------------------------------------------------------------------------------------


def fitted(world: World, settings: config.Codec) -> Codec:
    windows = world.windows()
    return codecs.fit_codec(settings, windows, np.arange(len(windows)))


def codec_table(world: World, seconds: float) -> list[dict[str, Any]]:
    """PSNR and seams on validation clips. Real clips' own seams stand beside each codec's (blocks differ)."""
    held = codecs.from_uint8(world.pixels[world.held])
    F, size = held.shape[2], held.shape[3]
    candidates: list[tuple[str, Codec, dict[str, Any]]] = []
    for patch in BLOCKS:
        for channels in CHANNELS:
            codec = fitted(world, config.Codec(patch=patch, channels=channels))
            candidates.append((f"pca {'x'.join(map(str, patch))} C={channels}", codec, {}))
    if seconds > 0:
        network, steps = conv_autoencoder.train(codecs.from_uint8(world.windows()), 96, seconds)
        note = {"note": f"{sum(p.numel() for p in network.parameters())} parameters, {seconds:g} s, {steps} steps"}
        candidates.append(("convolutional autoencoder C=96", network, note))  # type: ignore[arg-type]
    rows = []
    for name, codec, note in candidates:
        pt, ph, pw = codec.patch  # type: ignore[attr-defined]
        lost = codecs.round_trip(codec, held)
        rows.append({"codec": name, "tokens": (F // pt) * (size // ph) * (size // pw), **lost, "note": "", **note})
    return rows


# --- samples ---------------------------------------------------------------------------------------------------------


def write_shard(world: World, codec: Codec, folder: Path) -> None:
    def encode(clips: np.ndarray) -> np.ndarray:
        flat = codec.encode(codecs.from_uint8(clips.reshape(-1, *clips.shape[-4:]))).numpy()
        return flat.reshape(*clips.shape[:-4], *flat.shape[1:])

    text = {name: getattr(world.text, name).numpy() for name in ("tokens", "mask", "pooled")}
    tensors = {"latents": encode(world.pixels), **text}
    more = {} if world.phases is None else {"phases": encode(world.phases)}
    folder.mkdir()
    for split, rows, extra in (("train", world.train, more), ("validation", world.held, {})):
        whole = {"cluster": np.zeros(len(rows), np.int64), "row": rows}
        write_rows(folder / f"{split}.safetensors", tensors | extra, rows, whole)
    store.write_card(folder, "shard", "bench", ["train.safetensors", "validation.safetensors"])


def generate(settings: config.RunConfig, model: Any, codec: Codec, text: Conditioning, at_once: int = 32) -> np.ndarray:
    """uint8 (N, F, H, W, 3): one clip per caption, noise by its place."""
    shape, velocity, made = flops.latent_shape(settings), Guided(model, settings.sample.guidance), []
    for begin in range(0, len(text), at_once):
        part = text[slice(begin, begin + at_once)]
        noise = torch.from_numpy(draws.clip_noise(range(begin, begin + len(part)), shape))
        made.append(codec.decode(samplers.sample(velocity, noise, part, steps=settings.sample.steps)))
    return codecs.to_uint8(torch.cat(made))


class Judge:
    """Features of the real clips, and what generated ones are worth beside them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.real = self.features(world.pixels)
        train = self.real[world.train]
        self.project = fit_pca(train, max(2, min(world.settings.evaluate.pca, ASKED // 2, len(train) // 3)))
        self.asked = world.train[np.linspace(0, len(world.train) - 1, min(ASKED, len(world.train))).astype(int)]

    def features(self, clips: np.ndarray) -> np.ndarray:
        return extract([APPEARANCE], clips, self.world.settings.evaluate)[APPEARANCE].numpy().astype(np.float64)

    def own(self, made: np.ndarray, rows: np.ndarray, among: np.ndarray) -> tuple[float, float]:
        """Cosine to the own real clip, and how often it is among the five nearest of ``among``."""
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(self.project, (made, self.real[among])))
        near = a @ b.T
        mine = near[np.arange(len(rows)), np.searchsorted(among, rows)]
        return float(mine.mean()), float(((near > mine[:, None]).sum(1) < 5).mean())

    def row(self, made: np.ndarray) -> dict[str, float]:
        """Scores of clips made for ``asked`` and then for the validation captions."""
        world, count = self.world, len(self.asked)
        features = self.features(made)
        train, held = features[:count], features[count:]
        distance = frechet(Moments.of(self.project(train)), Moments.of(self.project(self.real[world.train])))
        group = world.group[world.held]
        kernel = GroupKernel.of(held, group, self.real[world.held], group, int(world.group.max()) + 1)
        row = {"FD train": distance, "KID held": float(kernel.estimate()[0])}
        row["own train"], row["R@5 train"] = self.own(train, self.asked, world.train)
        row["own held"], row["R@5 held"] = self.own(held, world.held, world.held)
        return row


def seams(codec: Codec, made: np.ndarray) -> dict[str, float | None]:
    """Seams of generated clips at the codec's own borders."""
    measured = codecs.round_trip(codec, codecs.from_uint8(made))
    return {name: measured[f"{name}_original"] for name in ("seam_space", "seam_time")}


def sample_table(world: World, arms: list[str], tflop: float, work: Path) -> Iterator[dict[str, Any]]:
    judge = Judge(world)
    ask = np.concatenate([judge.asked, world.held])
    real, text = world.pixels[ask], world.text[torch.from_numpy(ask)]
    nothing = dict.fromkeys(("steps", "GFLOP a clip", "seconds a step", "seam_space", "seam_time"))
    yield {"arm": "real clips", **nothing, **judge.row(real)}
    for arm in arms:
        codec_values, prediction = ARMS[arm]
        over = {"expert": {**RECIPE, "prediction": prediction}, "codec": codec_values}
        settings = config.build(config.merge(world.settings.model_dump(mode="json"), over))
        codec = fitted(world, settings.codec)
        step = flops.training_flops(flops.expert_forward_flops(settings), 1, settings.expert.batch)
        steps = max(1, round(tflop * 1e12 / step))
        model = build_expert(settings, seed=0)
        with tempfile.TemporaryDirectory() as name:
            write_shard(world, codec, Path(name) / "shard")
            shard, dropout = open_shard(Path(name) / "shard"), settings.expert.text_dropout
            objective = FlowObjective(model, shard, seed=0, batch=settings.expert.batch, text_dropout=dropout)
            began = time.perf_counter()
            fit(objective, Settings.of(settings.expert, steps=steps), Path(name) / "job", run_id="bench", label=arm)
            seconds = (time.perf_counter() - began) / steps
        made = generate(settings, model, codec, text)
        middle = made.shape[1] // 2
        draw(np.stack([made[:, middle], real[:, middle]], 1), work / "sheets" / f"{arm.replace(' ', '_')}.png")
        facts = {"steps": steps, "GFLOP a clip": step / settings.expert.batch / 1e9, "seconds a step": seconds}
        yield {"arm": arm, **facts, **judge.row(made), **seams(codec, made)}


def run(
    small: bool = False,
    tflop: float = 6.0,
    arms: list[str] | None = None,
    seconds: float = 180.0,
    work: Path | None = None,
) -> dict[str, Any]:
    """``small`` takes drawn shapes, a narrow network and next to no training."""
    values = config.merge(presets.values("demo"), SMALL if small else {})
    tflop, seconds = (0.001, 0.5) if small else (tflop, seconds)
    with tempfile.TemporaryDirectory() as name, common.Benchmark("representation", WHAT, ("torch", "diffusers")) as b:
        folder = work or Path(name)
        (folder / "sheets").mkdir(parents=True, exist_ok=True)
        world = World.read(values, folder / "clips")
        b.facts |= {"training clips": len(world.train), "validation clips": len(world.held)}
        b.facts |= {"TFLOP an arm": tflop, "recipe": RECIPE}
        b.tables["codecs on validation clips"] = codec_table(world, seconds)
        b.tables["samples at equal training FLOPs"] = list(sample_table(world, arms or list(ARMS), tflop, folder))
    return b.record


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tflop", type=float, default=6.0, help="training budget of an arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--autoencoder-seconds", type=float, default=180.0, help="0 leaves the autoencoder out")
    parser.add_argument("--work", type=Path, help="folder to keep decoded clips and sheets in")
    given = parser.parse_args()
    common.finish(
        given,
        lambda: run(
            given.small, tflop=given.tflop, arms=given.arms, seconds=given.autoencoder_seconds, work=given.work
        ),
    )


if __name__ == "__main__":
    main()
