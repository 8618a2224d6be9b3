"""``archipel export``: a run as a folder in the form that diffusers writes, with nothing in it that has to be run.

    model_index.json                        components by class; "archipel": configuration, shapes, calibration
    expert_0/ .. expert_K-1/ monolith/      config.json, diffusion_pytorch_model.safetensors: diffusers' classes and names
    router/                                 the same, and calibration.json
    transformer/                            where experts are adapters: their base (see ``adapted``)
    vae/ text_encoder/ tokenizer/ (_2)      codec and text encoder
    scheduler/                              FlowMatchEulerDiscreteScheduler with the run's shift
    archipel.json  README.md                what everything is (sha256 of every file), and the model card

Written aside and renamed into place as a whole.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel import FORMAT, __version__, store
from archipel.config import RunConfig
from archipel.ensemble.parts import Source, open_source
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.exchange import adapted as adapters
from archipel.exchange import model_card, sides
from archipel.exchange.opened import INDEX, PIPELINE
from archipel.routing.router import CALIBRATION, read_calibration
from archipel.run import MONOLITH, ROUTER, Run

FACTS = "archipel.json"
CONFIG, WEIGHTS = "config.json", sides.DIFFUSERS_WEIGHTS
CARD = "README.md"
KINDS = ("export", "expert-export")
_CALIBRATION_KEYS = ("t", "temperature", "temperature_null", "prior")


@dataclass
class Export:
    """What was written: the folder, the experts in it, those that are missing, and bytes in all."""

    folder: Path
    experts: list[str]
    missing: list[str]
    bytes: int
    notes: list[str] = field(default_factory=list)


def export(
    where: Path | str,
    folder: Path,
    *,
    run_id: str | None = None,
    force: bool = False,
    partial: bool = False,
    monolith: bool = False,
    licence: str = "",
) -> Export:
    """Write the run at ``where`` (a folder, or the URL of a bucket) as an export.

    ``force``: an earlier export there is replaced; anything else never is. ``partial``: also without all experts.
    ``monolith``: with the monolith, for comparison. ``licence``: of the weights, for the model card.
    Raises MissingStageError naming what is not trained yet, ArchipelError, DamagedError; then nothing is left behind.
    """
    source = open_source(where, run_id)
    run, there = source.run, source.look()
    missing = [name for name in run.expert_names if name not in there]
    wanted = [name for name in (*run.expert_names, ROUTER, *([MONOLITH] if monolith else ())) if name not in there]
    if partial and len(missing) < len(run.expert_names):
        wanted = [name for name in wanted if name not in missing]
    if wanted:
        raise MissingStageError(
            f"not there yet in {source.where}: {', '.join(wanted)}: {source.how(wanted)}"
            + ("" if partial or ROUTER in wanted else ", or export those that are there (--partial)")
        )
    names = [*(name for name in run.expert_names if name in there), ROUTER, *([MONOLITH] if monolith else ())]
    with aside_folder(folder, is_export, force) as made:
        index, cards = _write_parts(source, names, there, made)
        facts = _facts(run, cards, made)
        store.write_json(made / INDEX, {**index, "archipel": facts})
        store.write_text(made / CARD, model_card.write(run, cards, missing, licence))
        files = listed(made)
        said = {"made_by": f"archipel {__version__}", **about(source, cards, licence), "missing": missing}
        store.write_json(made / FACTS, {"format": FORMAT, "kind": KINDS[0], **said, "files": files})
        size = sum(int(entry["bytes"]) for entry in files.values())
    return Export(folder, [name for name in names if name.isdigit()], missing, size)


def about(source: Source, cards: Mapping[str, dict[str, Any]], licence: str) -> dict[str, Any]:
    """What archipel.json says of an export: run, source and licence of the clips, codec, text, and the parts' cards."""
    run = source.run
    return {
        "run": run.id,
        "licence": licence,
        "source": model_card.source_of(run),
        "codec": codec_sha256(source.codec()),
        "text": text_said(run),
        "cards": {name: _public(card) for name, card in cards.items()},
    }


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: {"sha256", "bytes"}} of everything in a folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": store.sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }


def codec_sha256(folder: Path) -> str | None:
    """sha256 of a codec's weights as its card states it; None where there is none."""
    card = store.read_card(folder, "codec") or {"files": {}}
    found = card["files"].get("model.safetensors", {}).get("sha256")
    return found if isinstance(found, str) else None


def text_said(run: Run) -> dict[str, Any]:
    """What decides the numbers that a caption becomes: encoder, tokens, and sha256 of its weights where it is from outside."""
    text = run.config.text
    return {"encoder": text.encoder, "tokens": text.tokens, "sha256": text.sha256}


def is_export(folder: Path) -> bool:
    """Whether a folder was written by ``archipel export`` (and so may be replaced by another)."""
    path = folder / FACTS
    return path.is_file() and store.read_json(path).get("kind") in KINDS


@contextlib.contextmanager
def aside_folder(folder: Path, replaceable: Any, force: bool) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; on leaving without an error it takes its place.

    Raises ArchipelError where something is there already: with ``force`` only what ``replaceable(folder)`` says may go.
    After an error ``folder`` is as it was.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArchipelError(f"{folder} is a file or a link: give a new folder")
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not replaceable(folder):
        raise ArchipelError(f"{folder} is not empty and no export of Archipel: choose another folder")
    if filled and not force:
        raise ArchipelError(f"{folder} holds an export already: choose another folder, or replace it with --force")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    made.chmod(0o755)
    try:
        yield made
        old = made.with_suffix(".old")
        if folder.is_dir():
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError:
            if old.is_dir():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_parts(
    source: Source, names: list[str], there: Mapping[str, str], made: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Networks, codec, text encoder and scheduler; returns model_index.json without our own entry, and the cards."""
    import diffusers

    index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": diffusers.__version__}
    cards: dict[str, dict[str, Any]] = {}
    adapted = source.run.config.expert.lora_rank > 0
    for name in names:
        target, folder = made / (f"expert_{name}" if name.isdigit() else name), source.folder(name, there[name])
        if adapted and name != ROUTER:
            cards[name] = adapters.write_adapter(folder, target)
            continue
        cards[name] = copy_network(folder, target)
        index[target.name] = ["diffusers", store.read_json(target / CONFIG)["_class_name"]]
    if adapted:
        adapters.write_base(source, made / adapters.BASE)
        index[adapters.BASE] = ["diffusers", store.read_json(made / adapters.BASE / CONFIG)["_class_name"]]
    _write_calibration(source, source.folder(ROUTER, there[ROUTER]), made)
    config = source.run.config
    index["vae"] = sides.write_codec(source.codec(), made / "vae")
    index |= sides.write_text(source, made)
    index["scheduler"] = sides.write_scheduler(made / "scheduler", config)
    return index, cards


def copy_network(folder: Path, target: Path) -> dict[str, Any]:
    """Configuration and weights of a trained part under diffusers' names, held to its card, which is returned.

    Copied, never linked: whoever saves over an export must not write into the run.
    """
    card = store.read_card(folder)
    if card is None:
        raise MissingStageError(f"{folder} is not finished")
    target.mkdir(parents=True)
    for name, new in ((CONFIG, CONFIG), ("model.safetensors", WEIGHTS)):
        shutil.copyfile(folder / name, target / new)
        wanted = card["files"].get(name, {}).get("sha256")
        if store.sha256_file(target / new) != wanted:
            raise DamagedError(f"{folder / name} is not what its card says: run `archipel verify`, or try again")
    return card


def _write_calibration(source: Source, folder: Path, made: Path) -> None:
    found = read_calibration(source.run, folder)
    if found is None and not source.uncalibrated:
        raise MissingStageError(f"{folder} is not calibrated: run `archipel route {source.where}` first")
    if found is not None:
        store.write_json(made / ROUTER / CALIBRATION, found.to_json())


def _facts(run: Run, cards: Mapping[str, dict[str, Any]], made: Path) -> dict[str, Any]:
    """The entry "archipel" of model_index.json: all that loading needs."""
    path = made / ROUTER / CALIBRATION
    value = store.read_json(path) if path.is_file() else None
    return {
        "format": FORMAT,
        "run": run.id,
        "config": public_config(run.config),
        "experts": {name: card["network"] for name, card in cards.items() if name.isdigit()},
        **{name: cards[name]["network"] for name in (ROUTER, MONOLITH) if name in cards},
        **({} if value is None else {"calibration": {key: value[key] for key in _CALIBRATION_KEYS}}),
    }


def public_config(config: RunConfig) -> dict[str, Any]:
    """``run.toml`` without where things lay on the machine that made it: an export's own folders instead."""
    values = config.model_dump(mode="json")
    for section, key, own in (
        ("clips", "path", "clips"),
        ("codec", "path", "vae"),
        ("text", "path", "text_encoder"),
        ("expert", "weights", "transformer"),
    ):
        if values[section].get(key):
            values[section][key] = own
    return values


_CARD_KEYS = (
    "cluster", "network", "sha256", "parameters", "steps", "batch", "samples", "train_clips", "validation_clips", "epochs",
    "forward_flops", "flops", "seconds", "validation", "build", "touched", "warm_start", "imported",
)  # fmt: skip


def _public(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a trained part's card says of it, but for how its training went on its machine."""
    return {key: card[key] for key in _CARD_KEYS if key in card}
