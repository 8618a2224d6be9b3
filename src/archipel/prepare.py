"""The prepare stage: clips in, and everything that later stages read about them: codec, latents, text, features.

Each part is one entry of the cache, or the codec's folder, under the hash of all that made it. What is there is left
alone, so a second call costs reading the manifest and hashing three weight files; torch is not even imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import cache, store
from archipel.config import Text, written
from archipel.encoders.weights import CODEC_CODE, FEATURES_CODE, TEXT_CODE, weights_hash
from archipel.errors import ArchipelError, DamagedError
from archipel.manifest import Clip, read_manifest, rows_of
from archipel.progress import StopFlag, log_to
from archipel.run import Run
from archipel.spread import Arrays, Make, Spread, over_ranges, pack_json, unpack_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from archipel.encoders.autoencoders import Autoencoder
    from archipel.encoders.codecs import PatchPCA, Pixels
    from archipel.encoders.text import MiniLM
    from archipel.encoders.transformers_text import TransformersText

logger = logging.getLogger("archipel")
_CLIPS_AT_ONCE = 32


def prepare(run: Run, stop: StopFlag | None = None, spread: Spread | None = None) -> None:
    """Do what is missing of: ingest, codec, latents, text, features; and name the entries in the cache's index.

    Interrupted work continues at the first missing shard. With ``spread`` clips are decoded and encoded on other machines
    and written here: the same bytes, where the same number of threads computes them.

    Raises Stopped where ``stop`` is set, ArchipelError where the clips are too few for ``partition.k`` or the codec.
    """
    from archipel.data.stage import ingest

    stop = StopFlag() if stop is None else stop
    with log_to(run.log("prepare")):
        ingest(run, stop, spread)
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
        if run.config.text.path:
            from archipel.encoders.taking import take_text

            take_text(run)
        entries = {
            "latents": _latents(run, pixels, source, stop, spread),
            "text": _text(run, clips, source, stop, spread),
            "features": _features(run, pixels, source, stop, spread),
        }
        cache.set_index(run.cache, {kind: entry.folder.name for kind, entry in entries.items()})
        if run.config.codec.path or run.config.text.path:  # gigabytes, of no use to what comes next in this process
            _codec.cache_clear()
            _text_encoder.cache_clear()


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
    """Fit the codec on the training rows into ``run.codec``, with what it costs on train and validation in the card; a trained
    autoencoder is taken there instead."""
    train, validation = (np.array(rows_of(clips, split), np.int64) for split in ("train", "validation"))
    settings = {
        key: one for key, one in written(run.config.codec).items() if key != "path"
    }  # it may move: sha256 is in it
    spec = {"source": dict(source), "codec": settings, "train": store.sha256_json(train.tolist()), "code": CODEC_CODE}
    spec["seed"] = run.config.clips_seed
    if _codec_is(run, spec):
        return
    with store.lock(run.cache / ".codec.lock", f"the codec of {run.root}"):
        if _codec_is(run, spec):
            return
        from archipel.encoders import codecs

        rows = pixels["clips"]
        if run.config.codec.kind == codecs.AUTOENCODER:
            from archipel.encoders.taking import take_codec

            card = take_codec(run, rows, {"train": train, "validation": validation}, spec, stop)
            _say_round_trip(card["codec"]["model"], card["round_trip"])
            return
        codec = codecs.fit_codec(run.config.codec, rows, train, seed=run.config.clips_seed, stop=stop)

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
        _say_round_trip(codec.name, report)


def _say_round_trip(codec: str, report: Mapping[str, Any]) -> None:
    for name, numbers in report.items():
        logger.info("prepare: codec %s on %s clips: %s", codec, name, numbers)


def _codec_is(run: Run, spec: Mapping[str, Any]) -> bool:
    """Whether ``run.codec`` holds the codec of this spec, whole."""
    card = store.read_card(run.codec, "codec")
    return card is not None and run.done(run.codec) and card.get("spec") == spec and not store.check_card(run.codec)


# --- entries ---------------------------------------------------------------------------------------------------------


def _build(
    run: Run,
    kind: str,
    spec: Mapping[str, Any],
    items: int,
    make: Make,
    give: Callable[[int, int], Arrays],
    needs: Sequence[str],
    stop: StopFlag,
    spread: Spread | None,
    per_shard: int = 64,
) -> cache.Entry:
    """One entry of the cache: ``make`` of what ``give`` says each shard needs, here or wherever ``spread`` does it."""
    return cache.build(
        run.cache, kind, spec, items, lambda begin, end: make(run.root, give(begin, end)),
        run_id=run.id, label=f"prepare: {kind}", stop=stop, per_shard=per_shard,
        make_all=None if spread is None else lambda ranges: over_ranges(spread, make, give, ranges, run.root, needs),
    )  # fmt: skip


def _rows_of(entry: cache.Entry, names: Sequence[str]) -> Callable[[int, int], Arrays]:
    """Rows [begin, end) of an entry; its files are opened when the first are asked for."""
    held: dict[str, cache.Rows] = {}

    def give(begin: int, end: int) -> Arrays:
        if not held:
            held.update({name: entry[name] for name in names if name in entry.names})
        return {name: rows[begin:end] for name, rows in held.items()}

    return give


@functools.lru_cache(maxsize=1)
def _codec(folder: Path, card: str) -> PatchPCA | Pixels | Autoencoder:
    """The codec, once per process and card (its sha256)."""
    from archipel.encoders.codecs import load_codec

    return load_codec(folder)


@functools.lru_cache(maxsize=1)
def _text_encoder(folder: Path, card: str, settings: str) -> MiniLM | TransformersText:
    """The text encoder of some settings (JSON), once per process and card of ``folder`` ("": the packaged one needs none)."""
    import torch

    from archipel.encoders.text import MiniLM, open_text

    encoder = open_text(Text.model_validate_json(settings), folder)
    return encoder.to("cuda") if torch.cuda.is_available() and not isinstance(encoder, MiniLM) else encoder


def _open_text(root: Path, config: Text) -> MiniLM | TransformersText:
    card = store.sha256_file(root / "text" / "card.json") if config.path else ""
    return _text_encoder(root / "text", card, config.model_dump_json())


def _latents(
    run: Run, pixels: cache.Entry, source: Mapping[str, Any], stop: StopFlag, spread: Spread | None
) -> cache.Entry:
    """latents float32 (N, C, T, H, W), and phases (N, P - 1, C, T, H, W) where clips have further windows; where the experts
    are given frames, first and last (N, C, H, W), and phases_first and phases_last (N, P - 1, C, H, W): stills of them."""
    card = store.read_card(run.codec, "codec")
    assert card is not None  # fit_codec has just seen to it
    encoder = {"name": card["codec"]["name"], "weights": card["files"]["model.safetensors"]["sha256"]}
    # Patch and gamma are in the card, not in the tensors.
    spec = {**source, "encoder": {**encoder, "settings": card["spec"]["codec"]}, "dtype": "float32", "code": CODEC_CODE}
    rows = _rows_of(pixels, ("clips", "phases"))
    if not run.config.expert.given_frames:
        return _build(run, "latents", spec, pixels.rows, make_latents, rows, ["codec"], stop, spread)
    spec["stills"] = ["first", "last"]

    def give(begin: int, end: int) -> Arrays:
        return {**rows(begin, end), "stills": np.ones(1, np.bool_)}

    return _build(run, "latents", spec, pixels.rows, make_latents, give, ["codec"], stop, spread)


def make_latents(root: Path, given: Arrays) -> Arrays:
    """Clips uint8 (B, F, H, W, 3), phases (B, P - 1, F, H, W, 3) -> latents (B, C, T, H, W) float32, and theirs; with
    ``stills`` latents (B, C, H, W) of their first and last frames as well (see ``codecs.still_latents``)."""
    import torch

    from archipel.encoders import codecs

    codec = _codec(root / "codec", store.sha256_file(root / "codec" / "card.json"))
    device = codecs.device_of(codec)

    def make(clips: np.ndarray, prefix: str, name: str) -> Arrays:
        made = {name: codec.encode(codecs.from_uint8(clips).to(device)).cpu().numpy()}
        for still, frame in (("first", 0), ("last", -1)) if "stills" in given else ():
            frames = torch.from_numpy(np.ascontiguousarray(clips[:, frame])).to(device)
            made[prefix + still] = codecs.still_latents(codec, frames, clips.shape[1]).cpu().numpy()
        return made

    made = dict(make(given["clips"], "", "latents"))
    if "phases" in given:
        more = given["phases"]
        for name, values in make(more.reshape(-1, *more.shape[2:]), "phases_", "phases").items():
            made[name] = values.reshape(*more.shape[:2], *values.shape[1:])
    return made


def _text(run: Run, clips: list[Clip], source: Mapping[str, Any], stop: StopFlag, spread: Spread | None) -> cache.Entry:
    """tokens float32 (N, L, D), mask bool (N, L), pooled float32 (N, P)."""
    captions = [clip.caption for clip in clips]
    config = run.config.text
    spec = {
        "clips": source["clips"],
        "captions": store.sha256_json(captions),
        "encoder": _text_identity(run),
        "tokens": config.tokens,
        "dtype": "float32",
        "code": TEXT_CODE,
    }
    said: list[bool] = []

    def give(begin: int, end: int) -> Arrays:
        if not said:
            said.append(True)
            _say_truncated(len(_open_text(run.root, config).truncated(captions)), len(captions), config.tokens)
        settings = {"text": pack_json(config.model_dump(mode="json"))} if config.path else {}
        return {"captions": pack_json(captions[begin:end]), "length": np.array([config.tokens]), **settings}

    needs = ["text"] if config.path else []
    return _build(run, "text", spec, len(clips), make_text, give, needs, stop, spread)


def _text_identity(run: Run) -> dict[str, Any]:
    """What decides an encoder's numbers: its name and weights; from outside, everything that was taken into ``run.text``."""
    config = run.config.text
    if not config.path:
        return {"name": config.encoder, "weights": weights_hash(config.encoder)}
    card = store.read_card(run.text, "text")
    assert card is not None  # take_text has just seen to it
    files = {name: entry["sha256"] for name, entry in card["files"].items()}
    return {"name": config.encoder, "weights": store.sha256_json(files), "padding": config.padding}


def make_text(root: Path, given: Arrays) -> Arrays:
    """Captions and their length in tokens -> tokens (B, L, D) float32, mask (B, L) bool, pooled (B, P) float32."""
    settings = unpack_json(given["text"]) if "text" in given else {"tokens": int(given["length"][0])}
    condition = _open_text(root, Text.model_validate(settings)).encode(unpack_json(given["captions"]))
    return {"tokens": condition.tokens.numpy(), "mask": condition.mask.numpy(), "pooled": condition.pooled.numpy()}


def _say_truncated(count: int, total: int, tokens: int) -> None:
    if count:
        logger.warning(
            "prepare: %d of %d captions are longer than text.tokens = %d and lose their end", count, total, tokens
        )


def _features(
    run: Run, pixels: cache.Entry, source: Mapping[str, Any], stop: StopFlag, spread: Spread | None
) -> cache.Entry:
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
    rows = _rows_of(pixels, ("clips",))

    def give(begin: int, end: int) -> Arrays:
        return {**rows(begin, end), "judge": pack_json(judge.model_dump(mode="json"))}

    # The slowest part: smaller shards, so that little is lost to an interruption and the bar moves.
    return _build(run, "features", spec, pixels.rows, make_features, give, [], stop, spread, per_shard=16)


def make_features(root: Path, given: Arrays) -> Arrays:
    """Clips uint8 (B, F, H, W, 3) -> each of the networks' features (B, D) float32."""
    from archipel.config import Evaluate
    from archipel.encoders.features import NAMES, extract

    judge = Evaluate.model_validate(unpack_json(given["judge"]))
    return {name: values.numpy() for name, values in extract(NAMES, given["clips"], judge).items()}
