"""What a card and a commit may say: every key known, every number finite and in range, everything as ``run.toml`` has it.

A card is a stranger's word. Nothing in it decides anything by itself: what matters is compared with the run or measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archipel import FORMAT, store
from archipel.config import RunConfig
from archipel.islands import keys
from archipel.islands.network import wanted_config, wanted_facts, wanted_start, wanted_work
from archipel.islands.strict import Refusal, shown
from archipel.run import ROUTER, begins_with_base

MODEL, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.jsonl", keys.CARD
LISTED = frozenset({MODEL, CONFIG, METRICS})
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}")
_MAX_FREE = 20_000  # values in the parts of a card that are a record of machines only

Whole = Annotated[int, Field(ge=0, le=1 << 62)]
Number = Annotated[float, Field(ge=0, le=1e12)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Free = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _File(_Part):
    sha256: Hash
    bytes: Whole


class _Score(_Part):
    """One validation, of an expert or of the router."""

    loss: Number
    times: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(max_length=64)]
    bins: Annotated[list[Number], Field(max_length=64)]
    with_text: Number | None = None
    without_text: Number | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    tasks: dict[Literal["text", "head", "loop", "tail"], Number] | None = None


class _Validation(_Part):
    raw: _Score | None = None
    ema: _Score | None = None


class _Best(_Part):
    step: Whole
    loss: Number


class _Start(_Part):
    """The shared start of a warm run: the trunk's weights, and what they cost."""

    sha256: Hash
    flops: Annotated[int, Field(ge=0)]
    steps: Whole


class Card(_Part):
    """``card.json`` of a trained job. ``build``, ``builds``, ``touched`` and ``island`` are a record and free in form."""

    format: Literal[1]
    kind: Literal["expert"]
    run: Hash
    name: str
    cluster: int | None
    network: Free
    sha256: Hash
    parameters: Whole
    steps: Whole
    batch: Whole
    samples: Whole
    train_clips: Annotated[int, Field(ge=1, le=1 << 40)]
    validation_clips: Whole
    epochs: Number
    forward_flops: Whole
    flops: Annotated[int, Field(ge=0)]
    seconds: Number
    resumed: Whole
    validation: _Validation
    best: _Best | None
    build: Free
    threads: Annotated[int, Field(ge=1, le=1 << 20)]
    builds: Annotated[list[Free], Field(min_length=1, max_length=100_000)]
    bitwise: bool
    touched: Free
    warm_start: _Start | None = None
    base: Hash | None = None
    island: Free | None = None
    files: dict[str, _File]
    check: Hash | None = None

    @property
    def claimed(self) -> float | None:
        """The held-out loss that the card claims for its weights; None where it claims none."""
        if self.best is not None:
            return self.best.loss
        return None if self.validation.ema is None else self.validation.ema.loss


class Commit(_Part):
    """``committed.json``."""

    format: Literal[1]
    name: str
    fence: int
    nonce: Annotated[str, Field(min_length=8, max_length=128)]
    key: str
    sha256: Hash
    island: Annotated[str, Field(max_length=256)] | None = None
    signature: Annotated[str, Field(max_length=256)] | None = None
    signer: Annotated[str, Field(max_length=256)] | None = None


def parse_commit(value: Any, where: str) -> Commit:
    """Raises Refusal("fence")."""
    if not isinstance(value, dict):
        raise Refusal("fence", f"{where} is no JSON object")
    try:
        return Commit.model_validate(value)
    except ValidationError as error:
        raise Refusal("fence", _said(where, error)) from error


def parse_card(value: Any, config: RunConfig, run_id: str, name: str, base: str | None = None) -> Card:
    """A card held to its run, and to the sha256 of the weights that its jobs begin with, where they do. Raises Refusal: "path"
    for a file that it may not list, "checksum" for a broken seal, else "config"."""
    where = CARD
    if not isinstance(value, dict):
        raise Refusal("config", f"{where} is no JSON object")
    if (version := value.get("format")) != FORMAT or isinstance(version, bool):
        raise Refusal("config", f"{where}: format is {shown(version)}, this Archipel reads {FORMAT}")
    _check_listed(value.get("files"))
    try:
        card = Card.model_validate(value)
    except ValidationError as error:
        raise Refusal("config", _said(where, error)) from error
    if "check" in value and not store.sealed(value):
        raise Refusal("checksum", f"{where} is not what was written: its own sha256 does not fit")
    wanted: dict[str, Any] = {"run": run_id, "name": name, **wanted_work(config, name)}
    for key, want in wanted.items():
        if getattr(card, key) != want:
            raise Refusal("config", f"{where}: {key} is {shown(getattr(card, key))}, run.toml makes it {want!r}")
    if not _same(card.network, wanted_facts(config, name, base)):
        raise Refusal("config", f"{where}: network is {shown(card.network)}, run.toml makes another")
    began = base if begins_with_base(config) and not config.expert.warm_start and name != ROUTER else None
    if card.base != began:
        raise Refusal("config", f"{where}: base is {shown(card.base)}, the run's is {shown(began)}")
    started = None if card.warm_start is None else (card.warm_start.steps, card.warm_start.flops)
    if started != wanted_start(config, name):
        raise Refusal(
            "config", f"{where}: warm_start is {shown(started)}, run.toml makes it {wanted_start(config, name)}"
        )
    if card.sha256 != card.files[MODEL].sha256:
        raise Refusal("checksum", f"{where}: sha256 and files.{MODEL}.sha256 differ")
    if abs(card.epochs - card.samples / card.train_clips) > 1e-3:
        raise Refusal("config", f"{where}: epochs is {card.epochs}, samples / train_clips is not")
    for key in ("build", "builds", "touched", "island"):
        _check_free(getattr(card, key), f"{where}: {key}")
    return card


def check_config(value: Any, config: RunConfig, name: str) -> None:
    """``config.json``: exactly the run's own architecture. Raises Refusal("config")."""
    if not isinstance(value, dict):
        raise Refusal("config", f"{CONFIG} is no JSON object")
    wanted = wanted_config(config, name)
    version = value.get("_diffusers_version")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise Refusal("config", f"{CONFIG}: _diffusers_version is {shown(version)}")
    for key in sorted(set(value) - set(wanted) - {"_diffusers_version"}):
        raise Refusal("config", f"{CONFIG}: {shown(key)} is no key of this run's network")
    for key, want in wanted.items():
        if key not in value:
            raise Refusal("config", f"{CONFIG}: {key} is missing, run.toml makes it {want!r}")
        if not _same(value[key], want):
            raise Refusal("config", f"{CONFIG}: {key} is {shown(value[key])}, run.toml makes it {want!r}")


def _check_listed(files: Any) -> None:
    """Names first: what a card lists must be the three files of a result, whatever else is wrong with it."""
    if not isinstance(files, dict):
        raise Refusal("config", f"{CARD} does not list its files")
    for file in files:
        if file in LISTED:
            continue
        odd = any(mark in file for mark in ("/", "\\", "..", "\0", ":")) or not file.isascii() or not file.isprintable()
        known = file.endswith((".safetensors", ".json", ".jsonl"))
        raise Refusal("path" if odd or known else "format", f"{CARD} lists {shown(file)}, which is no file of a result")
    if missing := LISTED - set(files):
        raise Refusal("config", f"{CARD} does not list {sorted(missing)[0]}")


def _check_free(value: Any, where: str) -> None:
    """Records of machines: plain JSON of a bearable amount; depth and finiteness were checked when it was parsed."""
    count, todo = 0, [value]
    while todo:
        part = todo.pop()
        count += 1
        if count > _MAX_FREE:
            raise Refusal("size", f"{where} holds more than {_MAX_FREE} values")
        if isinstance(part, Mapping):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            todo += part
        elif isinstance(part, str) and len(part) > 4096:
            raise Refusal("size", f"{where} holds a text of {len(part)} characters")


def _same(found: Any, wanted: Any) -> bool:
    """Equal in value and type: True is not 1, and 2.0 is not 2."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return set(found) == set(wanted) and all(_same(found[key], part) for key, part in wanted.items())
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return bool(found == wanted)


def _said(where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: {shown(key)} is no key that belongs there"
    if first["type"] == "missing":
        return f"{where}: {shown(key)} is missing"
    return f"{where}: {shown(key)} is {shown(first['input'])}: {first['msg'][0].lower() + first['msg'][1:]}"
