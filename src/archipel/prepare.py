"""The prepare stage: clips in, and everything that later stages read about them: codec, latents, text, features.

Each part is one entry of the cache, or the codec's folder, under the hash of all that made it. What is there is left
alone, so a second call costs reading the manifest and hashing three weight files; torch is not even imported.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import cache, store
from archipel.encoders.weights import CODEC_CODE, FEATURES_CODE, TEXT_CODE, weights_hash
from archipel.errors import ArchipelError, DamagedError
from archipel.manifest import Clip, read_manifest, rows_of
from archipel.progress import StopFlag, log_to
from archipel.run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from archipel.encoders.codecs import PatchPCA, Pixels

logger = logging.getLogger("archipel")
_CLIPS_AT_ONCE = 32


def prepare(run: Run, stop: StopFlag | None = None) -> None:
    """Do what is missing of: ingest, codec, latents, text, features; and name the entries in the cache's index.

    Interrupted work continues at the first missing shard. Raises Stopped where ``stop`` is set, ArchipelError where
    the clips are too few for ``partition.k`` or the codec.
    """
    from archipel.data.stage import ingest

    stop = StopFlag() if stop is None else stop
    with log_to(run.log("prepare")):
        ingest(run, stop)
        clips = read_manifest(run.manifest)
        check_groups(run, clips)
        pixels = cache.open_kind(run.cache, "pixels")
        if pixels.rows != len(clips):
            raise DamagedError(
                f"{pixels.folder} has {pixels.rows} rows, {run.manifest} has {len(clips)}: "
                f"remove {run.clips} and run `archipel prepare {run.root}` again"
            )
        source = _source(run, clips, pixels)
        fit_codec(run, clips, pixels, source, stop)
        entries = {
            "latents": _latents(run, pixels, source, stop),
            "text": _text(run, clips, source, stop),
            "features": _features(run, pixels, source, stop),
        }
        cache.set_index(run.cache, {kind: entry.folder.name for kind, entry in entries.items()})


def check_groups(run: Run, clips: list[Clip]) -> None:
    """Refuse a K that the training split's content groups cannot fill: a group is never divided between experts."""
    groups, k = len({clip.group for clip in clips if clip.split == "train"}), run.config.partition.k
    if k > groups:
        raise ArchipelError(
            f"partition.k = {k} is larger than the {groups} content groups of the training split ({len(clips)} clips in all; "
            f"those that were refused are in {run.clips / 'rejected.csv'}): at most {groups} works, or give more clips"
        )


def _source(run: Run, clips: list[Clip], pixels: cache.Entry) -> dict[str, Any]:
    """What every entry depends on: which bytes, in which order, and how the window was cut out of them and resized."""
    window = run.config.clips.model_dump(
        mode="json", include={"frames", "fps", "start", "size", "crop", "background", "phases"}
    )
    return {
        "clips": store.sha256_json([clip.sha256 for clip in clips]),
        "window": window,
        "pixels": pixels.folder.name,
    }


# --- codec -----------------------------------------------------------------------------------------------------------


def fit_codec(
    run: Run, clips: list[Clip], pixels: cache.Entry, source: Mapping[str, Any], stop: StopFlag | None
) -> None:
    """Fit the codec on the training rows into ``run.codec``, with what it costs on train and validation in the card."""
    train, validation = (np.array(rows_of(clips, split), np.int64) for split in ("train", "validation"))
    settings = run.config.codec.model_dump(mode="json")
    spec = {"source": dict(source), "codec": settings, "train": store.sha256_json(train.tolist()), "code": CODEC_CODE}
    spec["seed"] = run.config.run.seed
    if _codec_is(run, spec):
        return
    with store.lock(run.cache / ".codec.lock", f"the codec of {run.root}"):
        if _codec_is(run, spec):
            return
        from archipel.encoders import codecs

        rows = pixels["clips"]
        codec = codecs.fit_codec(run.config.codec, rows, train, seed=run.config.run.seed, stop=stop)

        def batches(chosen: np.ndarray) -> Iterator[Tensor]:
            for begin in range(0, len(chosen), _CLIPS_AT_ONCE):
                if stop:
                    raise stop.error("prepare")
                yield codecs.from_uint8(rows[chosen[begin : begin + _CLIPS_AT_ONCE]])

        report = {
            name: codecs.round_trip(codec, batches(chosen))
            for name, chosen in (("train", train), ("validation", validation))
            if len(chosen)
        }
        codec.save(run.codec, run.id, spec=spec, round_trip=report)
        for name, numbers in report.items():
            logger.info("prepare: codec %s on %s clips: %s", codec.name, name, numbers)


def _codec_is(run: Run, spec: Mapping[str, Any]) -> bool:
    """Whether ``run.codec`` holds the codec of this spec, whole."""
    card = store.read_card(run.codec, "codec")
    return card is not None and run.done(run.codec) and card.get("spec") == spec and not store.check_card(run.codec)


# --- entries ---------------------------------------------------------------------------------------------------------


def _latents(run: Run, pixels: cache.Entry, source: Mapping[str, Any], stop: StopFlag) -> cache.Entry:
    """latents float32 (N, C, T, H, W), and phases (N, P - 1, C, T, H, W) where clips have further windows."""
    card = store.read_card(run.codec, "codec")
    assert card is not None  # fit_codec has just seen to it
    encoder = {"name": card["codec"]["name"], "weights": card["files"]["model.safetensors"]["sha256"]}
    # Patch and gamma are in the card, not in the tensors.
    spec = {**source, "encoder": {**encoder, "settings": card["spec"]["codec"]}, "dtype": "float32", "code": CODEC_CODE}
    held: list[tuple[PatchPCA | Pixels, cache.Rows]] = []

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        from archipel.encoders import codecs

        if not held:
            held.append((codecs.load_codec(run.codec), pixels["clips"]))
        codec, rows = held[0]
        made = {"latents": codec.encode(codecs.from_uint8(rows[begin:end])).numpy()}
        if "phases" in pixels.names:
            more = pixels["phases"][begin:end]  # (B, P - 1, F, H, W, 3)
            encoded = codec.encode(codecs.from_uint8(more.reshape(-1, *more.shape[2:]))).numpy()
            made["phases"] = encoded.reshape(*more.shape[:2], *encoded.shape[1:])
        return made

    return cache.build(
        run.cache, "latents", spec, pixels.rows, make, run_id=run.id, label="prepare: latents", stop=stop
    )


def _text(run: Run, clips: list[Clip], source: Mapping[str, Any], stop: StopFlag) -> cache.Entry:
    """tokens float32 (N, L, D), mask bool (N, L), pooled float32 (N, P)."""
    captions = [clip.caption for clip in clips]
    spec = {
        "clips": source["clips"],
        "captions": store.sha256_json(captions),
        "encoder": {"name": run.config.text.encoder, "weights": weights_hash(run.config.text.encoder)},
        "tokens": run.config.text.tokens,
        "dtype": "float32",
        "code": TEXT_CODE,
    }
    held: list[Any] = []

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        if not held:
            from archipel.encoders.text import open_text

            held.append(open_text(run.config.text))
            _say_truncated(len(held[0].truncated(captions)), len(captions), run.config.text.tokens)
        condition = held[0].encode(captions[begin:end])
        return {"tokens": condition.tokens.numpy(), "mask": condition.mask.numpy(), "pooled": condition.pooled.numpy()}

    return cache.build(run.cache, "text", spec, len(clips), make, run_id=run.id, label="prepare: text", stop=stop)


def _say_truncated(count: int, total: int, tokens: int) -> None:
    if count:
        message = f"{count} of {total} captions are longer than text.tokens = {tokens} and lose their end"
        logger.warning("prepare: %s", message)
        print(f"prepare: {message}", file=sys.stderr, flush=True)


def _features(run: Run, pixels: cache.Entry, source: Mapping[str, Any], stop: StopFlag) -> cache.Entry:
    """efficientnet-appearance, efficientnet-motion and transnet, each float32 (N, D)."""
    judge = run.config.evaluate
    spec = {
        **source,
        "encoder": {name: weights_hash(name) for name in ("efficientnet", "transnet")},
        "frames": judge.frames,
        "image_size": judge.image_size,
        "dtype": "float32",
        "code": FEATURES_CODE,
    }
    held: list[cache.Rows] = []

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        from archipel.encoders.features import NAMES, extract

        if not held:
            held.append(pixels["clips"])
        return {name: values.numpy() for name, values in extract(NAMES, held[0][begin:end], judge).items()}

    # The slowest part: smaller shards, so that little is lost to an interruption and the bar moves.
    return cache.build(
        run.cache,
        "features",
        spec,
        pixels.rows,
        make,
        run_id=run.id,
        label="prepare: features",
        stop=stop,
        per_shard=16,
    )
