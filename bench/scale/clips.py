"""Cases against the number of clips: every stage's part that the number of clips decides.

Each is a function (work folder, number of clips) -> measured numbers. Runs are shared between cases of one number of clips; what
a case writes it removes.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from archipel import cache, store
from archipel.manifest import read_manifest, rows_of, write_manifest
from archipel.run import Run
from bench.scale import world
from bench.scale.meter import metered

OPEN_FILES = 1024  # the usual bound of a process, which a shell may have raised
_BATCH, _BATCHES = 64, 100


def _run(work: Path, n: int) -> Run:
    return world.make_run(work / f"clips-{n}", n)


def few_files() -> None:
    """As many open files as a process may usually have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))


def write_cache(work: Path, n: int) -> dict[str, float]:
    """``cache.build`` of n rows of 16 numbers, 16 rows a shard as features have them: what writing costs beside making."""
    found: dict[str, float] = {}
    rows = np.zeros((16, 16), np.float32)
    with tempfile.TemporaryDirectory(dir=work) as name, metered(found):
        entry = cache.build(
            Path(name), "scale", {"v": 1}, n, lambda begin, end: {"rows": rows[: end - begin]},
            run_id="scale", label="scale", per_shard=16,
        )  # fmt: skip
        assert entry.rows == n
    return found


def read_cache(work: Path, n: int) -> dict[str, float]:
    """All features in order, 256 rows at a time, and then random batches of 64, with 1,024 files at most."""
    run, found = _run(work, n), {}
    few_files()
    with metered(found):
        entry = cache.open_kind(run.cache, "features")
        tables = [entry[name] for name in world.WIDTHS]
        total = sum(float(table[begin : begin + 256].sum()) for table in tables for begin in range(0, n, 256))
        for step in range(_BATCHES):
            total += float(tables[0][cache.batch_rows(0, step, _BATCH, n)].sum())
    assert np.isfinite(total)
    return found


def manifest(work: Path, n: int) -> dict[str, float]:
    """Writing and reading the manifest, and the rows of a split once per shard of 8 experts and the monolith, as then."""
    found: dict[str, float] = {}
    path = work / f"manifest-{n}.parquet"
    with metered(found):
        write_manifest(path, [world.clip(row) for row in range(n)])
        clips = read_manifest(path)
        rows_of(clips, "train")
    path.unlink()
    return found


def _partition(run: Run) -> None:
    from archipel.partition import stage

    shutil.rmtree(run.partition, ignore_errors=True)
    stage._cluster(run, None)


def partition(work: Path, n: int) -> dict[str, float]:
    """Clusters (K = 8, 48 fine centroids, features of 64 numbers), quality and contact sheets; no shards."""
    run, found = _run(work, n), {}
    with metered(found):
        _partition(run)
    quality = store.read_json(run.partition / "quality.json")
    return {**found, "silhouette": quality["silhouette"] or 0.0, "stability": quality["stability"]["mean"]}


def partition_wide(work: Path, n: int) -> dict[str, float]:
    """The same with features of 1,024 numbers, as the default network gives them."""
    run = world.make_run(work / f"wide-{n}", n, widths={"transnet": 1024})
    found: dict[str, float] = {}
    with metered(found):
        _partition(run)
    return found


def balanced(work: Path, n: int) -> dict[str, float]:
    """The same with clusters of equal size."""
    root = work / f"balanced-{n}"
    if not root.exists():
        source = _run(work, n)
        made = Run.create(root, world.settings(balanced=True))
        (root / "cache").symlink_to(source.cache.resolve())
        write_manifest(made.manifest, read_manifest(source.manifest))
        store.write_card(made.clips, "clips", made.id, ["manifest.parquet"])
    run, found = Run.open(root), {}
    with metered(found):
        _partition(run)
    return found


def shards(work: Path, n: int) -> dict[str, float]:
    """Cutting the shards of 8 experts and of the monolith, with 1,024 files at most."""
    from archipel.partition.shards import write_shards

    run, found = _run(work, n), {}
    if not run.done(run.partition):
        _partition(run)
    shutil.rmtree(run.root / "shards", ignore_errors=True)
    few_files()
    with metered(found):
        write_shards(run)
    return found


def batches(work: Path, n: int) -> dict[str, float]:
    """Opening the monolith's shard (its bytes are hashed) and 100 random batches of 64 clips."""
    from archipel.partition.shards import write_shards
    from archipel.training.batches import open_shard, training_batch

    run, found = _run(work, n), {}
    if not run.done(run.shard("monolith")):
        if not run.done(run.partition):
            _partition(run)
        write_shards(run)
    with metered(found):
        shard = open_shard(run.shard("monolith"))
        for step in range(_BATCHES):
            training_batch(shard.train, 0, step, _BATCH, shift=1.0, text_dropout=0.1)
    return found


def evaluate(work: Path, n: int) -> dict[str, float]:
    """Scores of an arm and the codec on 256 captions, real clips' features read; judging clips is not in it."""
    from archipel.evaluation.inputs import read_inputs
    from archipel.evaluation.stage import score

    run, found = _run(work, n), {}
    if not run.done(run.partition):
        _partition(run)
    world.make_samples(run, n)
    with metered(found):
        score(read_inputs(run, extract=world.extract))
    return found


CASES: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "write-cache": write_cache,
    "read-cache": read_cache,
    "manifest": manifest,
    "partition": partition,
    "partition-wide": partition_wide,
    "balanced": balanced,
    "shards": shards,
    "batches": batches,
    "evaluate": evaluate,
}


def clean(work: Path, n: int) -> None:
    """Remove what the cases of n clips share."""
    for kind in ("clips", "wide", "balanced"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(work / f"{kind}-{n}")
