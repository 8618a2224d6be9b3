"""The partition stage: features -> clusters of whole content groups -> quality, contact sheets, shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.cache import open_kind
from archipel.config import FeatureName, RunConfig
from archipel.errors import ArchipelError, DamagedError
from archipel.manifest import SPLITS, Clip, read_manifest, rows_of
from archipel.partition import balance, controls, kmeans, quality
from archipel.partition.assignment import load_assignment, nearest
from archipel.partition.kmeans import Centroids, Groups
from archipel.partition.points import HELD, Points, Side, Table, blocks, total
from archipel.partition.shards import write_shards
from archipel.partition.sheets import write_sheets
from archipel.progress import Progress, StopFlag, log_to
from archipel.run import Run

__all__ = ["FEATURES", "Clustering", "load_assignment", "nearest", "partition"]

logger = logging.getLogger("archipel")

# config.partition.features -> (kind of cache entry, its tensors side by side)
FEATURES: dict[FeatureName, tuple[str, tuple[str, ...]]] = {
    "efficientnet": ("features", ("efficientnet-appearance",)),
    "transnet": ("features", ("transnet",)),
    "text": ("text", ("pooled",)),
    "motion": ("features", ("efficientnet-motion",)),
    "appearance+motion": ("features", ("efficientnet-appearance", "efficientnet-motion")),
}


def partition(run: Run, stop: StopFlag | None = None) -> None:
    """Write ``partition/`` and every shard; what is done already is left as it is.

    Fits on the training split alone; validation and test groups go to the nearest centroid. The card comes last, and
    the same run gives the same bytes again. Raises MissingStageError where *prepare* has not finished, ArchipelError
    where whole content groups cannot fill k clusters of at least two training clips.
    """
    run.need(run.clips, "prepare")
    if not run.done(run.partition):
        with log_to(run.log("partition")):
            _cluster(run, stop)
    write_shards(run, stop)


def _cluster(run: Run, stop: StopFlag | None) -> None:
    part = run.config.partition
    clips = read_manifest(run.manifest)
    check_groups(clips)
    kind, names = FEATURES[part.features]
    entry = open_kind(run.cache, kind)
    parts = [entry[name] for name in names]
    if len(parts[0]) != len(clips):
        raise DamagedError(
            f"{entry.folder} has {len(parts[0])} rows, {run.manifest} has {len(clips)}: run `archipel prepare` again"
        )
    with Progress("partition: clusters", 3 + quality.RERUNS) as bar:
        scale = unit_scale(parts, np.array(rows_of(clips, "train"), np.int64)) if len(parts) > 1 else None
        result = Clustering(clips, Side(parts, scale), run.config)
        bar.advance()
        numbers = _measure(result, stop, bar)
        folder = run.partition
        files = _write_tables(folder, result, numbers)
        bar.advance()
        if stop:
            raise stop.error("partition")
        pixels = open_kind(run.cache, "pixels")["clips"]
        files += write_sheets(folder, pixels, clips, result.cluster, result.distance, part.k)
        bar.advance()
    for split in SPLITS:
        logger.info("partition: %s clips per cluster: %s", split, numbers["sizes"]["clips"][split])
    store.write_card(
        folder,
        "partition",
        run.id,
        files,
        k=part.k,
        method=part.method,
        features=entry.folder.name + "/" + "+".join(names),
        rows=len(clips),
    )


def check_groups(clips: Sequence[Clip]) -> None:
    """Refuse a manifest in which a content group straddles splits: a cluster would leak across them."""
    split: dict[str, str] = {}
    for clip in clips:
        if split.setdefault(clip.group, clip.split) != clip.split:
            raise ArchipelError(
                f"content group {clip.group!r} has clips in {split[clip.group]} and in {clip.split} "
                f"(clip {clip.file}): all clips of a group belong in one split; correct the group or split column of the source"
            )


def unit_scale(parts: Sequence[Table], train: np.ndarray) -> np.ndarray:
    """Factors (sum of D,) float32 that give each of several features (N, D), laid side by side, unit total variance over
    the rows ``train``: none of them decides the clusters by being larger or wider. One that does not vary stays as it is."""
    factors = []
    for part in parts:
        variance = 0.0
        if len(train):
            mean = total(part, train) / len(train)
            variance = float((total(part, train, mean) / len(train)).sum())
        factors.append(np.full(part.shape[1], 1 / np.sqrt(variance) if variance > 0 else 1.0, np.float32))
    return np.concatenate(factors)


class Clustering:
    """A partition in memory: ``cluster`` and ``fine`` (N,) int64, ``distance`` (N,) float64 per clip; its centroids.

    Features (N, D) are read by block, and their points held where they are few enough (``points.HELD``).
    """

    def __init__(self, clips: Sequence[Clip], features: Side, config: RunConfig) -> None:
        self.clips, self.config, self.scale = clips, config, features.scale
        self.train = np.array(rows_of(list(clips), "train"), np.int64)
        if not len(self.train):
            raise ArchipelError(
                "no clip is in the training split: give more clips, or a larger first share in clips.split"
            )
        raw: Table = (
            features[:] if 8 * len(features) * features.shape[1] <= HELD else features
        )  # read once, where it fits
        mean = (total(raw, self.train) / len(self.train)).astype(np.float32)
        self.points = Points(raw, mean)
        del raw
        groups = kmeans.gather(self.points, [clips[row].group for row in self.train], self.train)
        self.centroids, owner, self.moved = assign_training(groups, mean, config, config.partition_seed)
        self.offset = np.zeros(config.partition.k, np.float32)
        if config.partition.balanced and config.partition.method != "random":
            self.offset = balance.offsets(kmeans.distances(groups.points, self.centroids.coarse), groups.clips)
        self.groups = groups
        self.cluster = np.full(len(clips), -1, np.int64)
        self.cluster[self.train] = owner[groups.of_clip]
        for split in SPLITS[1:]:
            self._place(split)
        self.distance, self.fine = np.empty(len(clips)), np.empty(len(clips), np.int64)
        for part in blocks(len(clips)):
            points, own = self.points[part], self.centroids.coarse[self.cluster[part]].astype(np.float64)
            self.distance[part] = np.clip(1.0 - (points * own).sum(1), 0.0, 2.0)
            self.fine[part] = kmeans.closest(points, self.centroids.fine)

    def _place(self, split: Any) -> None:
        """Groups that no centroid was fitted on: to the nearest (by the offsets, where clusters are balanced), or dealt
        out for the random control."""
        rows = np.array(rows_of(list(self.clips), split), np.int64)
        if not len(rows):
            return
        groups = kmeans.gather(self.points, [self.clips[row].group for row in rows], rows)
        if self.config.partition.method == "random":
            owner = controls.deal(groups.clips, self.config.partition.k, self.config.partition_seed, split)
        else:
            owner = (kmeans.distances(groups.points, self.centroids.coarse) + self.offset).argmin(1)
        self.cluster[rows] = owner[groups.of_clip]

    def again(self, rerun: int) -> np.ndarray:
        """Labels of the training clips from another seed."""
        _, owner, _ = assign_training(
            self.groups, self.centroids.mean, self.config, self.config.partition_seed + (rerun << 32)
        )
        return np.asarray(owner[self.groups.of_clip])


def assign_training(
    groups: Groups, mean: np.ndarray, config: RunConfig, seed: int
) -> tuple[Centroids, np.ndarray, int]:
    """Centroids, cluster (G,) of every training group, and how many groups were moved to fill a cluster.

    For the random control the centroids are the mean directions of what was dealt to each cluster.
    """
    part = config.partition
    found = kmeans.fit(groups, mean, part.k, part.fine, seed)
    if part.method == "random":
        owner = controls.deal(groups.clips, part.k, seed)
    elif part.balanced:
        found, owner = balance.refine(groups, found)
    distance = kmeans.distances(groups.points, found.coarse)
    if part.method != "random" and not part.balanced:
        owner = distance.argmin(1)
    owner, moved = kmeans.repair(owner, distance, groups.clips)
    if part.method == "random" or moved:
        coarse = balance.means(groups, owner, found.coarse)
        found = Centroids(found.mean, coarse, found.fine, kmeans.distances(found.fine, coarse).argmin(1))
    return found, owner, moved


def _measure(result: Clustering, stop: StopFlag | None, bar: Progress) -> dict[str, Any]:
    part, train = result.config.partition, result.train

    def again(rerun: int) -> np.ndarray:
        if stop:
            raise stop.error("partition")
        bar.advance()
        return result.again(rerun)

    sizes = quality.sizes(result.clips, result.cluster, part.k)
    share = np.bincount(result.centroids.fine_cluster, minlength=part.k) / len(result.centroids.fine_cluster)
    counted, shown = sizes["clips"]["train"], train[quality.spaced(len(train))]
    return {
        "method": part.method,
        "features": part.features,
        "k": part.k,
        "balanced": part.balanced,
        "sizes": sizes,
        "largest_share": max(counted) / sum(counted),
        "silhouette": quality.silhouette(result.points[shown], result.cluster[shown]),
        "stability": quality.stability(result.cluster[train], again),
        "fine": {"centroids": len(result.centroids.fine), "asked": part.fine, "share": share.tolist()},
        "moved_groups": result.moved,
    }


def _write_tables(folder: Path, result: Clustering, numbers: dict[str, Any]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = result.centroids
    tensors = {
        "mean": found.mean,
        "coarse": found.coarse,
        "fine": found.fine,
        "fine_cluster": found.fine_cluster.astype(np.int64),
        "offset": result.offset,
        **({} if result.scale is None else {"scale": result.scale}),
    }
    store.write_tensors(folder / "centroids.safetensors", tensors)
    table = pa.table(
        {
            "id": [clip.id for clip in result.clips],
            "group": [clip.group for clip in result.clips],
            "split": [clip.split for clip in result.clips],
            "cluster": pa.array(result.cluster, pa.int64()),
            "fine": pa.array(result.fine, pa.int64()),
            "distance": pa.array(result.distance.astype(np.float32), pa.float32()),
        }
    )
    with store.aside(folder / "assignment.parquet") as temporary:
        pq.write_table(table, temporary)
    store.write_json(folder / "quality.json", numbers)
    return ["assignment.parquet", "centroids.safetensors", "quality.json"]
