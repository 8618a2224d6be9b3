"""Which cluster a clip belongs to: what later stages ask of a finished partition."""

from __future__ import annotations

import numpy as np

from archipel import store
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.partition import kmeans
from archipel.run import Run


def load_assignment(run: Run) -> np.ndarray:
    """Cluster (N,) int64 of every row of the manifest. Raises MissingStageError before *partition*, DamagedError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run.partition / "assignment.parquet"
    if not path.exists():
        raise MissingStageError(f"{path} is not there: run `archipel partition {run.root}` first")
    try:
        cluster = pq.read_table(path, columns=["cluster"])["cluster"].to_numpy().astype(np.int64)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedError(
            f"{path} cannot be read as an assignment ({error}); remove {run.partition} to make it anew"
        ) from error
    if len(cluster) and not 0 <= cluster.min() <= cluster.max() < run.config.partition.k:
        raise DamagedError(
            f"{path} names clusters outside 0 to {run.config.partition.k - 1}; remove {run.partition} to make it anew"
        )
    return np.asarray(cluster)


def nearest(run: Run, features: np.ndarray) -> np.ndarray:
    """Cluster (B,) int64 of the nearest centroid for raw features (B, D) of the extractor the partition was made with
    (of several: side by side).

    Where clusters are balanced, after the partition's offsets. For clips of the run itself ``load_assignment`` is the
    answer (whole groups); this is for clips outside it. In a random partition the centroids lie close together and the
    answer means little.
    """
    run.need(run.partition, "partition")
    found = store.map_tensors(run.partition / "centroids.safetensors")
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != len(found["mean"]):
        raise ArchipelError(
            f"features of shape {features.shape} do not fit centroids of width {len(found['mean'])}: "
            f"the partition was made with {run.config.partition.features}"
        )
    if "scale" in found:
        features = np.asarray(features, np.float64) * found["scale"]
    distance = kmeans.distances(kmeans.project(features, found["mean"]), found["coarse"])
    return np.asarray((distance + found.get("offset", 0)).argmin(1))
