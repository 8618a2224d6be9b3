"""``archipel pack``: a finished run as a small folder that generates, in half precision: what ships in ``archipel.box``.

    run.toml                      the run's own, byte for byte, so that its id stays
    experts/K/  router/  codec/   configuration, weights in float16, metrics, calibration; cards that name the originals' sha256
    box.json                      what it is: files, admission, how far it is from the original, examples, the monolith's record
    README.md  sheet.webp  beside.webp      the model card and what it shows

What is loaded from it is computed with in float32. It is admitted by the rules that hold for anybody's experts, on the numbers that are
loaded; its velocities and clips are held to the original's. Nothing is left behind where something of this fails.
"""

from __future__ import annotations

import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archipel import FORMAT, __version__, box, store
from archipel.backbones.base import CONFIG, WEIGHTS
from archipel.errors import ArchipelError, DamagedError
from archipel.exchange import agreement, pack_card, sheets
from archipel.exchange.folder import aside_folder, listed
from archipel.islands import admission, trust
from archipel.islands.card import METRICS
from archipel.islands.strict import Refusal
from archipel.routing.router import CALIBRATION, read_calibration, seal
from archipel.run import MONOLITH, ROUTER, Run, begins_with_base

MOST_FILE, MOST_ALL = 16_000_000, 48_000_000  # bytes
_MOST_STILL, _MOST_MOVING = 400_000, 600_000
SHEET, BESIDE = pack_card.SHEET, pack_card.BESIDE
EXAMPLES, SEED, STRATEGY = 20, 1, "top1"
_CARD_OWN = ("format", "kind", "run", "files", "check")  # of a card: what every writer says anew
_ABSOLUTE = re.compile(r"(?<![\w.:/)\]])/(?:home|root|tmp|work|Users|var|mnt|opt|srv|private|scratch|data)/\w")

Tell = Callable[[str], None]


@dataclass
class Packed:
    """What was written: the folder, bytes in all, and what was found on the way."""

    folder: Path
    bytes: int
    notes: list[str] = field(default_factory=list)


def pack(
    root: Path,
    folder: Path,
    *,
    name: str = "",
    licence: str = "",
    command: str = "",
    commit: str = "",
    force: bool = False,
    tell: Tell = lambda _: None,
) -> Packed:
    """Write the run at ``root`` as a box. ``name``: of the model (default: the folder's); ``command``, ``commit``: how the run was
    made, for its card; ``licence``: of the weights; ``force``: an earlier box there is replaced.

    Raises MissingStageError naming what is not there yet, ArchipelError for a run that cannot be packed, is too large, is not
    admitted, or differs too much in half precision; then ``folder`` is as it was.
    """
    run = Run.open(root)
    _check_kind(run)
    parts = [*run.expert_names, ROUTER]
    for part in (*parts, MONOLITH):
        run.need(run.expert(part), "route" if part == ROUTER else f"train RUN {part}")
    run.need(run.codec, "prepare")
    captions = sheets.examples(run, EXAMPLES)
    with aside_folder(folder, box.is_box, force) as made:
        shutil.copyfile(run.root / "run.toml", made / "run.toml")
        tell("half precision")
        originals = {part: _part(run, part, made) for part in parts}
        originals["codec"] = _codec(run, made)
        _check_sizes(made)
        admitted = {}
        for part in parts:
            tell(f"admission: {part}")
            admitted[part] = _admit(run, part, made)
        tell("velocities of both")
        found = agreement.velocities(run, Run.open(made))
        tell(f"clips of {len(captions)} captions: packed, original, monolith")
        clips = agreement.clips(run, made, captions, SEED, STRATEGY)
        found["clips"] = agreement.compare(clips.packed, clips.original)
        sheets.still(clips.packed, captions, made / SHEET, _MOST_STILL)
        heads, fps = ("archipelago", MONOLITH), run.config.clips.fps
        sheets.moving(clips.packed, clips.monolith, captions, heads, fps, made / BESIDE, _MOST_MOVING)
        facts = {
            "format": FORMAT,
            "kind": box.KIND,
            "name": name or folder.name,
            "run": run.id,
            "made_by": f"archipel {__version__}",
            "command": command,
            "commit": commit,
            "licence": licence,
            "dtype": "float16",
            "originals": originals,
            "admitted": admitted,
            "bars": trust.find(None, run.root).trust.loss.model_dump(),
            "agreement": found,
            "examples": {
                "rule": sheets.RULE.format(count=EXAMPLES),
                "seed": SEED,
                "strategy": STRATEGY,
                "captions": captions,
            },
            "monolith": _record(run, MONOLITH),
        }
        store.write_text(made / box.CARD, pack_card.write(run, made, facts))
        facts["files"] = listed(made)
        store.write_json(made / box.FACTS, facts)
        _check_sizes(made)
        _check_names(run, made)
        size = _size(made)
    told, worst = found["clips"], max(found["velocity"].values())
    notes = [
        f"velocities: at most {worst:.2%} from the original's (root mean square; {found['tolerance']:.0%} allowed)",
        f"clips: {told['mean']:.1f} dB from the original's in the mean, {told['min']:.1f} dB at least, of {told['n']}",
        *(f"admitted {part}: {said}" for part, said in admitted.items()),
    ]
    return Packed(folder, size, notes)


def _check_kind(run: Run) -> None:
    config = run.config
    reasons = {
        "its experts are adapters of a base, or begin with weights from outside": begins_with_base(config),
        "its text encoder is from outside (text.path), and would not be in it": bool(config.text.path),
        "its codec is an autoencoder from outside": config.codec.kind == "autoencoder",
        "run.toml names a path (clips.path), which is nobody else's": bool(config.clips.path),
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise ArchipelError(f"{run.root} cannot be packed: {wrong[0]}; `archipel export` takes any run")


def _halves(source: Path) -> dict[str, np.ndarray]:
    """Weights in float16, held to the card of their folder. Raises DamagedError; ArchipelError for numbers too large for it."""
    if problems := store.check_card(source):
        raise DamagedError(f"{problems[0].path} {problems[0].reason}")
    made = {}
    for name, array in store.map_tensors(source / WEIGHTS).items():
        with np.errstate(over="ignore"):
            made[name] = np.asarray(array, np.float32).astype(np.float16)
        if not np.isfinite(made[name]).all():
            raise ArchipelError(f"{source / WEIGHTS}: {name} holds numbers that half precision cannot, or none at all")
    return made


def _part(run: Run, name: str, made: Path) -> str:
    """Write an expert or the router; returns the sha256 of the original's weights."""
    source, target = run.expert(name), made / run.expert(name).relative_to(run.root)
    card = store.read_card(source) or {}
    original = card["files"][WEIGHTS]
    target.mkdir(parents=True)
    store.write_tensors(target / WEIGHTS, _halves(source), metadata={"format": "pt"})
    for other in (CONFIG, METRICS):
        shutil.copyfile(source / other, target / other)
    rest = {key: value for key, value in card.items() if key not in _CARD_OWN}
    rest["sha256"] = store.sha256_file(target / WEIGHTS)
    store.write_card(
        target, "expert", run.id, [CONFIG, METRICS, WEIGHTS], **rest, packed={"dtype": "float16", "original": original}
    )
    if name == ROUTER:
        _calibration(run, target, str(rest["sha256"]))
    return str(original["sha256"])


def _calibration(run: Run, target: Path, sha256: str) -> None:
    if read_calibration(run) is None:
        raise ArchipelError(f"the router of {run.root} is not calibrated: run `archipel route {run.root}` first")
    value = store.read_json(run.expert(ROUTER) / CALIBRATION)
    rest = {key: part for key, part in value.items() if key != "sha256"}
    store.write_json(target / CALIBRATION, seal({**rest, "model_sha256": sha256}))


def _codec(run: Run, made: Path) -> str:
    card, target = store.read_card(run.codec, "codec") or {}, made / run.codec.relative_to(run.root)
    original = card["files"][WEIGHTS]
    target.mkdir()
    store.write_tensors(target / WEIGHTS, _halves(run.codec))
    rest = {key: value for key, value in card.items() if key not in _CARD_OWN}
    store.write_card(target, "codec", run.id, [WEIGHTS], **rest, packed={"dtype": "float16", "original": original})
    return str(original["sha256"])


def _admit(run: Run, name: str, made: Path) -> str:
    """Hold a packed part to the owner's rules: its numbers as they are loaded, on the run's own held-out clips. Returns what was
    measured. Raises ArchipelError naming the rule."""
    source = made / run.expert(name).relative_to(run.root)
    with tempfile.TemporaryDirectory(prefix="archipel-pack-") as scratch:
        folder = Path(scratch).resolve() / "result"
        folder.mkdir()
        loaded = {key: np.asarray(value, np.float32) for key, value in store.map_tensors(source / WEIGHTS).items()}
        store.write_tensors(folder / WEIGHTS, loaded, metadata={"format": "pt"})
        for other in (CONFIG, METRICS):
            shutil.copyfile(source / other, folder / other)
        card = store.read_card(source) or {}
        rest = {key: value for key, value in card.items() if key not in (*_CARD_OWN, "packed")}
        rest["sha256"] = store.sha256_file(folder / WEIGHTS)
        store.write_card(folder, "expert", run.id, [CONFIG, METRICS, WEIGHTS], **rest)
        rules = trust.find(None, run.root).trust
        try:
            told, _ = admission.check(run, name, folder, folder.parent, rules, {})
        except Refusal as refusal:
            raise ArchipelError(f"{name} is not admitted, {refusal.rule}: {refusal.detail}") from refusal
    return told


def _record(run: Run, name: str) -> dict[str, Any]:
    """What a part's card says of its training."""
    card: Mapping[str, Any] = store.read_card(run.expert(name)) or {}
    names = (
        "sha256",
        "parameters",
        "steps",
        "batch",
        "samples",
        "epochs",
        "forward_flops",
        "flops",
        "seconds",
        "validation",
    )
    return {key: card.get(key) for key in names}


# --- what a box must not be ------------------------------------------------------------------------------------------


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_sizes(made: Path) -> None:
    for path in made.rglob("*"):
        if path.is_file() and path.stat().st_size > MOST_FILE:
            where, size = path.relative_to(made).as_posix(), path.stat().st_size
            raise ArchipelError(f"{where} has {size / 1e6:.1f} MB, a file of a box at most {MOST_FILE / 1e6:g}")
    if (size := _size(made)) > MOST_ALL:
        raise ArchipelError(f"the box has {size / 1e6:.1f} MB, at most {MOST_ALL / 1e6:g} ship")


def _check_names(run: Run, made: Path) -> None:
    """Nothing in a box may name the machine that made it. Raises ArchipelError naming the file."""
    places = {
        str(run.root.absolute()),
        str(run.root.resolve()),
        str(Path.home()),
        str(Path.cwd()),
        tempfile.gettempdir(),
    }
    words = {place for place in (*places, sys.prefix, socket.gethostname()) if len(place) > 5}
    for path in sorted(made.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        where = path.relative_to(made).as_posix()
        if word := next((word for word in words if word.encode() in data), None):
            raise ArchipelError(f"{where} names this machine ({word}): it cannot be passed on")
        text = path.suffix in (".json", ".jsonl", ".toml", ".md")
        if text and (path_named := _ABSOLUTE.search(data.decode())):
            raise ArchipelError(f"{where} names a path of a machine ({path_named.group()}...): it cannot be passed on")
