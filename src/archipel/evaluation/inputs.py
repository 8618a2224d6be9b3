"""What an evaluation reads: samples of every arm, their features (made once, kept beside the samples), real clips."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archipel import store
from archipel.cache import open_kind
from archipel.config import FEATURE_NETWORK, Evaluate
from archipel.errors import ArchipelError, DamagedError
from archipel.evaluation import probe
from archipel.manifest import Clip, Split, read_manifest, rows_of
from archipel.partition.points import Table
from archipel.progress import Progress, StopFlag
from archipel.run import Run

APPEARANCE, MOTION, TRANSNET = "efficientnet-appearance", "efficientnet-motion", "transnet"
EXTRACTORS = (APPEARANCE, MOTION, TRANSNET)
NETWORK = {APPEARANCE: "efficientnet", MOTION: "efficientnet", TRANSNET: "transnet"}
LAYER = {
    APPEARANCE: "pooled features, mean over frames",
    MOTION: "pooled features, root mean square change between frames",
    TRANSNET: "last hidden layer, mean over frames",
}
CODEC, REAL, STATIC, REVERSED = "codec", "real", "static", "reversed"
REFERENCE = 4000
_CHUNK = 16  # clips between looks at the stop flag

Extract = Callable[[Sequence[str], np.ndarray, Evaluate], Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """clips: uint8 (N, F, H, W, 3), memory-mapped; features: extractor -> (N, D) float32."""

    name: str
    clips: np.ndarray
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """Everything scores are computed from.

    arms: codec, real, then strategies; rows, captions, groups: one per generated clip (N); cluster: of the captions;
    reference: real clips of the split to compare with (M rows, see ``reference_rows``); train: real training clips;
    features, text: of all clips, read when rows are asked for; changed: features of static and reversed real clips.
    """

    run: Run
    split: Split
    clips: list[Clip]
    arms: dict[str, Arm]
    rows: np.ndarray
    captions: list[str]
    prompts: str
    identity: str
    reference: np.ndarray
    train: np.ndarray
    features: Mapping[str, Table]
    text: Table
    changed: dict[str, dict[str, np.ndarray]]
    missing: list[str]

    def groups(self, rows: np.ndarray) -> list[str]:
        return [self.clips[row].group for row in rows]


def real_identity(run: Run, clips: Sequence[Clip], reference: np.ndarray) -> str:
    """Which real clips the arms are compared with: their bytes, and how frames were cut out of them."""
    window = run.config.clips.model_dump(mode="json", include={"frames", "fps", "start", "size", "crop", "background"})
    return store.sha256_json({"clips": [clips[row].sha256 for row in reference], "window": window})


def probe_extractors(run: Run) -> tuple[str, ...]:
    """Features the probe reads: those of the network that did not make the partition."""
    made = FEATURE_NETWORK[run.config.partition.features]
    return (TRANSNET,) if made == "efficientnet" else (APPEARANCE, MOTION)


def default_extract(names: Sequence[str], clips: np.ndarray, config: Evaluate) -> Mapping[str, Any]:
    from archipel.encoders.features import extract

    return extract(names, clips, config)


def features_identity(config: Evaluate) -> dict[str, Any]:
    """All that decides generated clips' features, apart from the clips: weights, code version, frames, size."""
    from archipel.encoders.weights import FEATURES_CODE, weights_hash

    weights = {name: weights_hash(name) for name in sorted(set(NETWORK.values()))}
    return {"weights": weights, "code": FEATURES_CODE, "frames": config.frames, "size": config.image_size}


def read_inputs(run: Run, stop: StopFlag | None = None, extract: Extract = default_extract) -> Inputs:
    """Read samples and features of the configured split, extracting what is not there yet.

    Raises MissingStageError before *prepare*, *partition* or *generate* have finished, DamagedError where samples do not
    fit the manifest, Stopped (with the features made so far kept) where ``stop`` is set.
    """
    config, split = run.config.evaluate, run.config.evaluate.split
    folder = run.samples(split)
    run.need(folder, "generate")
    clips = read_manifest(run.manifest)
    rows, captions, digest = _read_prompts(run, clips)
    entry = open_kind(run.cache, "features")
    cached = {name: entry[name] for name in EXTRACTORS}
    text = open_kind(run.cache, "text")["pooled"]
    for name, table in {**cached, "text": text}.items():
        if len(table) != len(clips):
            raise DamagedError(
                f"the cached {name} has {len(table)} rows, {run.manifest} has {len(clips)}: run `archipel prepare` again"
            )
    names = [CODEC, REAL, *dict.fromkeys(config.arms)]
    present = [name for name in names if (folder / f"{name}.safetensors").exists()]
    if REAL not in present:
        raise DamagedError(f"{folder / 'real.safetensors'} is missing: run `archipel generate --arms` again")
    videos = {name: _read_clips(run, name, len(rows)) for name in present}
    unique = np.sort(np.unique(rows, return_index=True)[1])
    work: list[tuple[str, np.ndarray, tuple[str, ...]]] = [
        (name, videos[name], EXTRACTORS) for name in present if name != REAL
    ]
    reading = probe_extractors(run)
    work += [
        (STATIC, probe.static(videos[REAL][unique]), reading),
        (REVERSED, probe.backwards(videos[REAL][unique]), reading),
    ]
    made = _features(run, work, stop, extract)
    arms = {name: Arm(name, videos[name], made[name]) for name in present if name != REAL}
    arms[REAL] = Arm(REAL, videos[REAL], {name: table[rows] for name, table in cached.items()})
    reference = reference_rows(clips, split, rows, run.config.clips_seed)
    return Inputs(
        run=run,
        split=split,
        clips=clips,
        arms={name: arms[name] for name in present},
        rows=rows,
        captions=captions,
        prompts=digest,
        identity=real_identity(run, clips, reference),
        reference=reference,
        train=np.array(rows_of(clips, "train"), np.int64),
        features=cached,
        text=text,
        changed={STATIC: made[STATIC], REVERSED: made[REVERSED]},
        missing=[name for name in names if name not in present],
    )


def reference_rows(clips: Sequence[Clip], split: str, rows: np.ndarray, seed: int) -> np.ndarray:
    """Rows of the real clips that arms are held against: those whose captions were used, and one of every other group.

    Not simply the whole split: captions are taken group by group, and a group of many variants would weigh more in the
    reference than among the generated clips, which a distance would count as a difference. Of more than ``REFERENCE`` other
    groups so many are drawn: work grows with the square of the reference, and its share of an interval's width vanishes.
    """
    used = np.unique(rows)
    seen = {clips[row].group for row in used}
    others: dict[str, list[int]] = {}  # by content group
    for row, clip in enumerate(clips):
        if clip.split == split and clip.group not in seen:
            others.setdefault(clip.group, []).append(row)
    draw = np.random.Generator(np.random.PCG64([seed, len(clips)]))
    more = [members[int(draw.integers(len(members)))] for _, members in sorted(others.items())]
    if len(more) > REFERENCE:
        more = np.array(more)[np.sort(draw.permutation(len(more))[:REFERENCE])].tolist()
    return np.sort(np.concatenate([used, np.array(more, np.int64)])).astype(np.int64)


def _read_prompts(run: Run, clips: list[Clip]) -> tuple[np.ndarray, list[str], str]:
    path = run.samples(run.config.evaluate.split) / "prompts.json"
    if not path.exists():
        raise DamagedError(f"{path} is missing: run `archipel generate --arms` again")
    prompts = store.read_json(path)
    try:
        rows = np.array([int(prompt["row"]) for prompt in prompts], np.int64)
        captions = [str(prompt["caption"]) for prompt in prompts]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is not a list of prompts with caption and row ({error!r})") from error
    if not len(rows) or rows.min() < 0 or rows.max() >= len(clips):
        raise DamagedError(f"{path} names rows outside the manifest's {len(clips)}: generate the samples again")
    return rows, captions, store.sha256_json([[int(row), caption] for row, caption in zip(rows, captions, strict=True)])


def _read_clips(run: Run, name: str, count: int) -> np.ndarray:
    path = run.samples(run.config.evaluate.split) / f"{name}.safetensors"
    found = store.map_tensors(path).get("clips")
    if found is None or found.dtype != np.uint8 or found.ndim != 5 or len(found) != count:
        shape = "no clips" if found is None else f"{found.dtype} {found.shape}"
        raise DamagedError(f"{path} holds {shape}, expected uint8 clips ({count}, F, H, W, 3): generate the arm again")
    return found


def _digest(clips: np.ndarray) -> str:
    """sha256 of the clips' bytes; of mapped ones no copy is made."""
    return hashlib.sha256(np.ascontiguousarray(clips).data).hexdigest()


def _features(
    run: Run, work: Sequence[tuple[str, np.ndarray, tuple[str, ...]]], stop: StopFlag | None, extract: Extract
) -> dict[str, dict[str, np.ndarray]]:
    """Features of every named set of clips, from the files beside the samples where clips and extractors are the same."""
    config, folder = run.config.evaluate, run.samples(run.config.evaluate.split) / "features"
    identity = features_identity(config)
    made: dict[str, dict[str, np.ndarray]] = {}
    with Progress("evaluate: features", sum(len(clips) for _, clips, _ in work)) as bar:
        for name, clips, names in work:
            key = store.sha256_json({**identity, "names": names, "clips": _digest(clips)})[:16]
            path = folder / f"{name}-{key}.safetensors"
            if not path.exists():
                parts: list[Mapping[str, Any]] = []
                for begin in range(0, len(clips), _CHUNK):
                    if stop:
                        raise stop.error("evaluate")
                    part = np.array(clips[begin : begin + _CHUNK])  # a writable copy, as torch wants
                    parts.append(extract(names, part, config))
                    bar.advance(len(part), name)
                tensors = {one: np.concatenate([np.asarray(part[one], np.float32) for part in parts]) for one in names}
                for old in folder.glob(f"{name}-{'?' * 16}.safetensors"):
                    old.unlink()
                store.write_tensors(path, tensors)
            else:
                bar.advance(len(clips), name)
            made[name] = {one: np.asarray(table) for one, table in store.map_tensors(path).items()}
            for one, table in made[name].items():
                if not np.isfinite(table).all():
                    raise ArchipelError(
                        f"{path}: {one} holds numbers that are not finite; the arm's clips are unusable"
                    )
    return made
