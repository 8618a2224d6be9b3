"""A result of a job, as files in a folder: every rule that needs nothing but the files, the run and the owner's trust.

Cheap rules come first, so that a hostile bundle is refused before much of it is read; torch is imported for the last
rule only, when all others have passed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel import store
from archipel.config import RunConfig
from archipel.errors import DamagedError
from archipel.islands.card import CARD, CONFIG, LISTED, METRICS, MODEL, Card, check_config, parse_card
from archipel.islands.network import wanted_tensors
from archipel.islands.strict import (
    Refusal,
    check_file,
    check_finite,
    check_magic,
    parse_json,
    read_bounded,
    read_header,
    shown,
)
from archipel.islands.trust import Bounds, Loss
from archipel.run import ROUTER

if TYPE_CHECKING:
    from archipel.training.heldout import Measured

CALIBRATION = "calibration.json"
_ENTRIES = 1000  # files in one folder
_LINE = 64 << 10  # bytes of one line of metrics.jsonl
_CHECKPOINT = re.compile(r"[0-9]{8}")
# What a training leaves beside its result, and what a killed writer leaves of it; none of it is ever loaded here.
_BESIDE = frozenset({"progress.json", CALIBRATION, "quality.json"})
_ASIDE = re.compile(
    r"\.(model|config|card|metrics|progress|calibration|quality)[A-Za-z0-9._]{0,60}\.tmp(\.(safetensors|json|jsonl))?"
)


@dataclass(frozen=True)
class Job:
    """Which job of which run the files are to be the result of; ``base``: sha256 of the weights that the run's jobs begin
    with, where they do."""

    config: RunConfig
    run_id: str
    name: str
    base: str | None = None


@dataclass(frozen=True)
class Held:
    """What the result is measured on: the shard's validation clips and the numbers of its card; and the folder of the base,
    where the result is an adapter."""

    validation: Path
    card: Mapping[str, Any]
    base: Path | None = None


def limits(bounds: Bounds, job: Job) -> dict[str, int]:
    """Most bytes of each file of a result. Weights have hardly a choice: their shapes are the run's."""
    tensors = wanted_tensors(job.config, job.name)
    exact = 4 * sum(math.prod(shape) for shape in tensors.values()) + 8 + 4096 + 512 * (len(tensors) + 1)
    return {
        CARD: bounds.card,
        CONFIG: bounds.config,
        METRICS: bounds.metrics,
        MODEL: min(bounds.weights, exact),
    }


def check_name(name: str, allowed: frozenset[str]) -> None:
    """Refuse any file but those of a result. Raises Refusal("format") for other formats, ("path") for odd names."""
    if name in allowed:
        return
    if not name.isascii() or not name.isprintable() or name.startswith(".") or name in ("..", "."):
        raise Refusal("path", f"{shown(name)} is no name of a result's file")
    if name.endswith((".safetensors", ".json", ".jsonl")):
        raise Refusal("path", f"{shown(name)} does not belong to a result")
    raise Refusal("format", f"{shown(name)}: only safetensors and JSON are admitted")


def check_listing(folder: Path, root: Path) -> None:
    """Names and kinds of everything in a result's folder in the run at ``root``, without opening any of it; a training's
    checkpoints, progress and calibration may lie beside. Raises Refusal ("path", "format", "size")."""
    for place in (folder, *folder.parents):
        if place == root:
            break
        if place.is_symlink():
            raise Refusal("path", f"{place.name} is a link: a bundle holds files only")
    allowed = frozenset({*LISTED, CARD, *_BESIDE})
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= _ENTRIES:
                raise Refusal("size", f"{folder.name} holds more than {_ENTRIES} files")
            if entry.is_symlink():
                raise Refusal("path", f"{shown(entry.name)} is a link: a bundle holds files only")
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "checkpoints":
                    raise Refusal("path", f"{shown(entry.name)} is a folder, which no result has")
                _check_checkpoints(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise Refusal("path", f"{shown(entry.name)} is no regular file")
            elif not _ASIDE.fullmatch(entry.name):
                check_name(entry.name, allowed)


def _check_checkpoints(folder: Path) -> None:
    """A training's own, which nothing loads from here: names and kinds only."""
    for number, path in enumerate(folder.rglob("*")):
        if number >= _ENTRIES:
            raise Refusal("size", f"checkpoints hold more than {_ENTRIES} files")
        parts = path.relative_to(folder).parts
        if path.is_symlink():
            raise Refusal("path", f"checkpoints/{shown('/'.join(parts))} is a link: a bundle holds files only")
        if not (len(parts) <= 2 and _CHECKPOINT.fullmatch(parts[0].removesuffix(".part"))):
            raise Refusal("path", f"checkpoints/{shown('/'.join(parts))} is no checkpoint")
        if len(parts) == 2 and parts[1] not in ("state.safetensors", "manifest.json") and not parts[1].startswith("."):
            raise Refusal("format", f"checkpoints/{shown('/'.join(parts))}: only safetensors and JSON are admitted")


def check_card(folder: Path, job: Job, bounds: Bounds) -> tuple[Card, str]:
    """The card of a result and its sha256. Raises Refusal ("format", "path", "size", "config", "checksum")."""
    data = read_bounded(folder / CARD, bounds.card)
    check_magic(CARD, data[:512])
    card = parse_card(parse_json(data, CARD), job.config, job.run_id, job.name, job.base)
    most = limits(bounds, job)
    for name, entry in card.files.items():
        if entry.bytes > most[name]:
            raise Refusal("size", f"{CARD} lists {name} with {entry.bytes} bytes, at most {most[name]} are read")
    return card, store.sha256_bytes(data)


def check_files(folder: Path, card: Card, job: Job, bounds: Bounds) -> None:
    """Configuration, metrics and weights of a result whose card is checked: size, format, shape, checksum, finite."""
    most = limits(bounds, job)
    for name in sorted(LISTED):
        size = check_file(folder / name, most[name])
        if size != card.files[name].bytes:
            raise Refusal("checksum", f"{name} has {size} bytes, the card says {card.files[name].bytes}")
    small = {name: read_bounded(folder / name, most[name]) for name in (CONFIG, METRICS)}
    for name, data in small.items():
        check_magic(name, data[:512])
        if store.sha256_bytes(data) != card.files[name].sha256:
            raise Refusal("checksum", f"{name} is not what the card says: its sha256 differs")
    check_config(parse_json(small[CONFIG], CONFIG), job.config, job.name)
    _check_metrics(small[METRICS])
    wanted = wanted_tensors(job.config, job.name)
    header = read_header(folder / MODEL, tensors=len(wanted), limit=most[MODEL])
    found = {name: shape for name, (shape, _, _) in header.tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise Refusal(
                "shape", f"{MODEL}: tensor {shown(name)} is {found.get(name)}, run.toml makes it {wanted.get(name)}"
            )
    if store.sha256_file(folder / MODEL) != card.files[MODEL].sha256:
        raise Refusal("checksum", f"{MODEL} is not what the card says: its sha256 differs")
    check_finite(folder / MODEL, header, bounds.magnitude)


def _check_metrics(data: bytes) -> None:
    for number, line in enumerate(data.splitlines(), 1):
        if len(line) > _LINE:
            raise Refusal("size", f"{METRICS} has a line of {len(line)} bytes")
        if not isinstance(parse_json(line, f"{METRICS}, line {number}"), dict):
            raise Refusal("format", f"{METRICS}, line {number} is no JSON object")


def check_calibration(folder: Path, card: Card, job: Job) -> None:
    """A router's calibration beside it, where there is one: of these weights, and with temperatures that can be."""
    from archipel.routing.calibration import Calibration

    data = read_bounded(folder / CALIBRATION, 1 << 20)
    check_magic(CALIBRATION, data[:512])
    value = parse_json(data, CALIBRATION)
    if not isinstance(value, dict) or value.get("run") != job.run_id or value.get("model_sha256") != card.sha256:
        raise Refusal("config", f"{CALIBRATION} is of another router: run `archipel route` to make it anew")
    try:
        found = Calibration.from_json(value, CALIBRATION)
    except DamagedError as error:
        raise Refusal("config", str(error)) from error
    sizes = len(found.prior) == job.config.partition.k and len(found.times) <= 256
    if not sizes or found.temperatures.min() < 0.04 or found.temperatures.max() > 60:
        raise Refusal("config", f"{CALIBRATION} holds temperatures or shares that no fit gives")


def check_loss(folder: Path, card: Card, job: Job, held: Held, trust: Loss) -> str:
    """Measure the held-out loss and hold it to the bar; a sentence with the numbers. Raises Refusal("loss").

    The only rule that imports torch.
    """
    if not trust.required:
        return "its loss was not measured, as trust.toml wants it"
    if held.card["counts"]["validation"] == 0:
        raise Refusal("loss", "there are no validation clips to measure it on (loss.required = false asks for none)")
    if job.name == ROUTER:
        from archipel.routing import heldout as router

        bars, what = (trust.router, trust.router), "the clusters' shares alone"
        found = router.measure(job.config, folder, held.validation, held.card.get("prior", []))
    else:
        from archipel.training import heldout as expert

        bars, what = (trust.bar, trust.overall), "a network that says nothing"
        found = expert.measure(job.config, folder, held.validation, base=held.base)
    return hold_to_bar(found, bars, what, card, trust)


def hold_to_bar(found: Measured, bars: tuple[float, float], what: str, card: Card, trust: Loss) -> str:
    """What was measured, held to ``bars`` (noisier times, all times) of ``what``, and to the card's claim: a sentence with the
    numbers. Raises Refusal("loss")."""
    told = f"held-out loss {found.loss:.4f} on {found.clips} clips"
    for ratio, bar, times in ((found.ratio, bars[0], "the noisier times"), (found.overall, bars[1], "all times")):
        if not ratio <= bar:  # NaN is refused too
            raise Refusal("loss", f"{told}: {ratio:.3f} of that of {what} at {times}, the bar is {bar:g}")
    if card.claimed is None or not abs(card.claimed - found.loss) <= trust.tolerance * max(found.loss, 1e-6):
        raise Refusal("loss", f"{told}, but the card claims {card.claimed}: not the weights that were validated")
    return f"{told}: {found.ratio:.3f} of that of {what}"
