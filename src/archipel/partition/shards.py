"""Shards: what a job trains on and nothing more. One folder per cluster, and ``all`` for the monolith and the router.

A shard is a copy, not a set of links into the cache: it can be carried to an island and read without the rest of the
run. Test clips are in no shard. In a run with a shared start (``expert.warm_start``) a shard also carries the weights that
its job begins with, ``init.safetensors``, once they are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.cache import Entry, open_kind
from archipel.errors import DamagedError
from archipel.manifest import Split, read_manifest, rows_of
from archipel.partition.assignment import load_assignment
from archipel.progress import Progress, StopFlag, log_to
from archipel.run import MONOLITH, TRUNK, Run, begins_with_base

SHARD_SPLITS: tuple[Split, ...] = ("train", "validation")
INIT = "init.safetensors"
STILLS = ("first", "last")  # latents of a clip's first and last frame as stills, where expert.tasks gives frames
_ROWS = 256  # rows held in memory at a time
_CODES = {"float32": "F32", "int64": "I64", "bool": "BOOL"}


def write_shards(run: Run, stop: StopFlag | None = None) -> None:
    """Write the shard of every cluster and of ``all``; those of this partition that are there already are kept.

    Tensors of ``train.safetensors`` and ``validation.safetensors`` (N may be 0 in the latter): latents f32
    (N, C, T, H, W), tokens f32 (N, L, D), mask bool (N, L), pooled f32 (N, P), cluster i64 (N,), row i64 (N,), the
    clip's row in the manifest; further windows phases f32 (N, P - 1, C, T, H, W) in ``train`` only. Where ``expert.tasks``
    gives frames: first, last f32 (N, C, H, W), and phases_first, phases_last (N, P - 1, C, H, W) beside phases.
    Raises MissingStageError where the partition or a cache entry is missing, DamagedError where they do not fit.

    Where the run has a shared start that is trained, its weights go into each shard, and what the card says of them as
    "init": {"sha256", "flops", "steps"}.
    """
    run.need(run.partition, "partition")
    clips, cluster = read_manifest(run.manifest), load_assignment(run)
    latents, text = open_kind(run.cache, "latents"), open_kind(run.cache, "text")
    for entry in (latents, text):
        if entry.rows != len(clips):
            raise DamagedError(
                f"{entry.folder} has {entry.rows} rows, {run.manifest} has {len(clips)}: run `archipel prepare` again"
            )
    if run.config.expert.given_frames and not set(STILLS) <= set(latents.names):
        raise DamagedError(
            f"{latents.folder} has no latents of first and last frames, which expert.tasks = {list(run.config.expert.tasks)} "
            "gives: run `archipel prepare` again"
        )
    names = [*run.expert_names, MONOLITH]
    rows = {split: np.array(rows_of(clips, split), np.int64) for split in SHARD_SPLITS}
    source, start = source_of(run, latents, text), _start(run)
    missing = [name for name in names if not _current(run, name, source, start)]
    if not missing:
        return
    with log_to(run.log("partition")), Progress("partition: shards", len(missing)) as bar:
        for name in missing:
            if stop:
                raise stop.error("partition")
            _write_shard(run, name, rows, cluster, latents, text, source, start)
            bar.advance()


def _current(run: Run, name: str, source: dict[str, str], start: Mapping[str, Any] | None) -> bool:
    """Whether a shard is committed by this run, cut from this very partition and cache, and whole; with the shared start,
    where that is here (a shard that brought it along from elsewhere keeps it)."""
    card = store.read_card(run.shard(name))
    if card is None or card.get("run") != run.id or card.get("source") != source:
        return False
    return whole(run.shard(name), card) and (start is None or card.get("init") == start)


def _start(run: Run) -> dict[str, Any] | None:
    """What shards say about the shared start; None where the run has none, or it is not trained here."""
    if run.config.expert.warm_start != TRUNK or begins_with_base(run.config) or not run.done(run.expert(TRUNK)):
        return None
    card = store.read_card(run.expert(TRUNK)) or {}
    return {key: card[key] for key in ("sha256", "flops", "steps")}


def carries_start(run: Run) -> bool:
    """Whether every shard carries the weights that its job begins with; or ``base/`` has them, where jobs begin with that."""
    if begins_with_base(run.config):
        return run.done(run.base)
    cards = [store.read_card(run.shard(name)) or {} for name in (*run.expert_names, MONOLITH)]
    return all(INIT in card.get("files", {}) for card in cards)


def source_of(run: Run, latents: Entry, text: Entry) -> dict[str, str]:
    """What a shard is cut from: hash of the assignment, cache folders of latents and text."""
    card = store.read_card(run.partition, "partition") or {"files": {}}
    assignment = card["files"].get("assignment.parquet", {}).get("sha256", "")
    return {"assignment": assignment, "latents": latents.folder.name, "text": text.folder.name}


def whole(folder: Path, card: Mapping[str, Any]) -> bool:
    """Whether every listed file has its size; hashes are `verify`'s work."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in card["files"].items()
    )


def _write_shard(
    run: Run,
    name: str,
    rows_by_split: Mapping[Split, np.ndarray],
    cluster: np.ndarray,
    latents: Entry,
    text: Entry,
    source: dict[str, str],
    start: dict[str, Any] | None,
) -> None:
    folder, k = run.shard(name), run.config.partition.k
    there = _current(run, name, source, None)  # but for the shared start
    (folder / "card.json").unlink(missing_ok=True)  # until it is written again the folder claims nothing
    counts = {}
    stills = STILLS if run.config.expert.given_frames else ()
    tensors: dict[str, Any] = {
        **{key: latents[key] for key in ("latents", *stills)},
        **{key: text[key] for key in ("tokens", "mask", "pooled")},
    }
    phases = [key for key in ("phases", *(f"phases_{still}" for still in stills)) if "phases" in latents.names]
    for split in SHARD_SPLITS:
        rows = rows_by_split[split]
        if name != MONOLITH:
            rows = rows[cluster[rows] == int(name)]
        counts[split] = len(rows)
        if there:
            continue
        # Further windows of a clip are for training only: validation is one number per clip, whatever they are.
        more = {key: latents[key] for key in phases} if split == "train" else {}
        write_rows(folder / f"{split}.safetensors", tensors | more, rows, {"cluster": cluster[rows], "row": rows})
    train = cluster[rows_by_split["train"]]
    fields: dict[str, Any] = (
        {"prior": (np.bincount(train, minlength=k) / max(len(train), 1)).tolist()} if name == MONOLITH else {}
    )
    files = [f"{split}.safetensors" for split in SHARD_SPLITS]
    (folder / INIT).unlink(missing_ok=True)
    if start is not None:
        with store.aside(folder / INIT) as temporary:
            shutil.copyfile(run.expert(TRUNK) / "model.safetensors", temporary)
        if store.sha256_file(folder / INIT) != start["sha256"]:
            raise DamagedError(f"{run.expert(TRUNK)} is not what its card says: remove it and train the trunk again")
        files, fields = [*files, INIT], {**fields, "init": start}
    store.write_card(
        folder,
        "shard",
        run.id,
        files,
        cluster=None if name == MONOLITH else int(name),
        clusters=k,
        counts=counts,
        latent_shape=list(tensors["latents"].shape[1:]),
        text_shape=list(tensors["tokens"].shape[1:]),
        pooled_width=int(tensors["pooled"].shape[1]),
        source=source,
        **fields,
    )


def write_rows(path: Path, tensors: Mapping[str, Any], rows: np.ndarray, whole: Mapping[str, np.ndarray]) -> None:
    """A safetensors file: chosen ``rows`` (N,) of row-sliceable ``tensors``, and ``whole`` arrays (N,) as they are.

    Streams: holds ``_ROWS`` rows at a time, so that a shard may be larger than memory.
    """
    shapes = {key: (np.dtype(value.dtype), (len(rows), *value.shape[1:])) for key, value in tensors.items()}
    shapes |= {key: (value.dtype, value.shape) for key, value in whole.items()}
    # Wide numbers first: with a header of a multiple of 8 bytes every tensor is aligned in the map.
    names = sorted(shapes, key=lambda key: (-shapes[key][0].itemsize, key))
    header, begin = {}, 0
    for key in names:
        dtype, shape = shapes[key]
        end = begin + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with store.aside(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in names:
            for start in range(0, len(rows), _ROWS):
                part = slice(start, start + _ROWS)
                values = tensors[key][rows[part]] if key in tensors else whole[key][part]
                file.write(np.ascontiguousarray(values).tobytes())
