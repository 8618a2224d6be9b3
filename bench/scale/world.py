"""Runs of any number of clips, as *prepare* leaves them, without decoding or encoding anything.

Latents, text and features are drawn at random around 32 topics, small, and written in the cache's own format and its own cut into
shards, but without waiting for the disk after every file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from archipel import cache, config, store
from archipel.manifest import Clip, Split, write_manifest
from archipel.run import Run

TOPICS = 32
LATENT, TEXT, POOLED, PIXELS = (4, 1, 2, 2), (4, 8), 16, (2, 4, 4, 3)
WIDTHS = {"transnet": 64, "efficientnet-appearance": 32, "efficientnet-motion": 32}
PER_SHARD = {"pixels": 32, "latents": 64, "text": 64, "features": 16}  # as *prepare* cuts them
CAPTIONS = 256  # that arms are evaluated on
_SEED = 20261123


def _draw(kind: str, begin: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([_SEED, len(kind), begin]))


def topic(rows: np.ndarray) -> np.ndarray:
    """Topic of each row's content group (two neighbouring clips are one group)."""
    return (rows // 2 * 2654435761 % 4294967296) % TOPICS


def _centres(width: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([_SEED, width])).normal(size=(TOPICS, width)).astype(np.float32)


def arrays(kind: str, begin: int, end: int, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """The tensors of rows [begin, end) of one kind of cache entry."""
    n, draw = end - begin, _draw(kind, begin)
    about = topic(np.arange(begin, end))
    if kind == "pixels":
        return {"clips": draw.integers(0, 256, (n, *PIXELS), np.uint8)}
    if kind == "latents":
        return {"latents": draw.standard_normal((n, *LATENT), np.float32)}
    if kind == "text":
        mask = np.arange(TEXT[0])[None] < draw.integers(1, TEXT[0] + 1, n)[:, None]
        pooled = _centres(POOLED)[about] + draw.standard_normal((n, POOLED), np.float32)
        return {"tokens": draw.standard_normal((n, *TEXT), np.float32), "mask": mask, "pooled": pooled}
    return {
        name: _centres(width)[about] + 1.5 * draw.standard_normal((n, width), np.float32)
        for name, width in widths.items()
    }


def write_entry(run: Run, kind: str, n: int, make: Callable[[int, int], dict[str, np.ndarray]]) -> None:
    """A committed entry of the cache, as ``cache.build`` leaves it."""
    from safetensors.numpy import save

    spec, per_shard = {"scale": 1}, PER_SHARD[kind]
    folder = run.cache / f"{kind}-{cache.key_of(kind, spec, n, per_shard)[:24]}"
    folder.mkdir(parents=True)
    files, shards, layout = {}, {}, {}
    for number, begin in enumerate(range(0, n, per_shard)):
        made = make(begin, min(begin + per_shard, n))
        data = save({name: np.ascontiguousarray(made[name]) for name in sorted(made)})
        name = f"shard-{number:05d}.safetensors"
        (folder / name).write_bytes(data)
        layout = {key: [str(one.dtype), *map(int, one.shape[1:])] for key, one in sorted(made.items())}
        files[name] = {"sha256": store.sha256_bytes(data), "bytes": len(data)}
        shards[name] = {"sha256": files[name]["sha256"], "rows": len(next(iter(made.values()))), "layout": layout}
    card = {"format": 1, "kind": "cache", "run": run.id, "entry": kind, "key": "", "spec": spec, "items": n, "rows": n}
    card |= {"names": sorted(layout), "layout": layout, "shards": shards, "files": files}
    store.write_sealed(folder / "card.json", card)
    cache.set_index(run.cache, {kind: folder.name})


def clip(row: int) -> Clip:
    group = row // 2
    split: Split = "train" if group % 10 < 7 else "validation" if group % 10 == 7 else "test"
    return Clip(f"{row:016x}", f"{row:064x}", f"{row}.mp4", f"a clip about {group}", f"group {group}", split, 0.1)


def settings(k: int = 8, *, balanced: bool = False) -> config.RunConfig:
    return config.build(
        {
            "partition": {"k": k, "balanced": balanced},
            "evaluate": {"arms": ["top1"], "count": CAPTIONS, "pca": 16, "primary": "KID-efficientnet-appearance"},
        }
    )


def make_run(root: Path, n: int, k: int = 8, *, balanced: bool = False, widths: dict[str, int] | None = None) -> Run:
    """A run of ``n`` clips up to and with *prepare*; one that is there is opened."""
    if (root / "clips" / "card.json").exists():
        return Run.open(root)
    run = Run.create(root, settings(k, balanced=balanced))
    write_manifest(run.manifest, [clip(row) for row in range(n)])
    for kind in PER_SHARD:
        write_entry(run, kind, n, lambda begin, end, kind=kind: arrays(kind, begin, end, widths or WIDTHS))  # type: ignore[misc]
    store.write_card(run.clips, "clips", run.id, ["manifest.parquet"])
    return run


def make_samples(run: Run, n: int) -> None:
    """Samples of three arms on test captions, one of each content group first: noise, since only time and memory matter."""
    folder = run.samples(run.config.evaluate.split)
    if run.done(folder):
        return
    test = [row for row in range(0, n, 2) if clip(row).split == "test"][:CAPTIONS]
    for number, name in enumerate(("codec", "real", "top1")):
        clips = np.random.Generator(np.random.PCG64([_SEED, number])).integers(0, 256, (len(test), *PIXELS), np.uint8)
        store.write_tensors(folder / f"{name}.safetensors", {"clips": clips})
    store.write_json(folder / "prompts.json", [{"caption": clip(row).caption, "row": row} for row in test])
    files = ["prompts.json", *(f"{name}.safetensors" for name in ("codec", "real", "top1"))]
    store.write_card(folder, "samples", run.id, files)


def extract(names: Any, clips: np.ndarray, _: Any) -> dict[str, np.ndarray]:
    """Stands in for the judges, whose time per clip is a constant: random features of the run's widths."""
    draw = np.random.Generator(np.random.PCG64([_SEED, len(clips), int(clips.sum())]))
    return {name: draw.standard_normal((len(clips), WIDTHS[name]), np.float32) for name in names}
