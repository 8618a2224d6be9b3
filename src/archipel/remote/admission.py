"""``archipel admit RUN 2 --remote``: an expert whose weights stay elsewhere is let in by its signed card and what it answers.

The rules are those of ``islands.admission`` as far as there are files to hold to them: ``signature`` (always required here),
``config`` and ``checksum`` of the card, ``shape`` of what it offers, ``loss`` measured through its endpoint on the job's own
validation clips. What is admitted is one card at one address; ``site.toml`` and ``trust.toml`` are this machine's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import FORMAT, store
from archipel.contracts import Velocity
from archipel.ensemble.parts import RunFolder, Source, open_source
from archipel.errors import ArchipelError, LostExpertError
from archipel.islands import admission as rules
from archipel.islands import bundle
from archipel.islands import trust as trusting
from archipel.islands.admission import Answer
from archipel.islands.bundle import Held, Job
from archipel.islands.card import Card, parse_card
from archipel.islands.remote import BucketRun, fetch_published
from archipel.islands.strict import Refusal, check_magic, parse_json, shown
from archipel.islands.trust import Trust
from archipel.remote import known, signing, wire
from archipel.remote.expert import Offer
from archipel.remote.known import Admission, Place
from archipel.remote.link import Link
from archipel.remote.wire import Shapes

_MORE = 1 << 16  # bytes of a description beside the card
_MOST_ROWS, _MOST_STEPS = 4096, 100_000


@dataclass(frozen=True)
class _Told:
    """What an endpoint says of itself; nothing of it is believed but the card, and that only as far as it is signed."""

    card: bytes
    signature: str
    signer: str
    rows: int
    steps: int


def admit(where: str | Path, name: str, *, run_id: str | None = None, trust: Path | None = None) -> Answer:
    """Check the remote expert ``name`` of the run in a folder or bucket, and admit it or say why not.

    Raises ArchipelError for wrong use, where site.toml has no such section, and where the endpoint does not answer (then an
    earlier admission stays).
    """
    source = open_source(where, run_id)
    place = known.places(source).get(name)
    if place is None:
        file = known.home_of(source)[0] / "site.toml"
        raise ArchipelError(f"{file} has no [remote.{name}]: it says where expert {name} is asked (docs/remote.md)")
    token = place.token()
    if token is None:
        raise ArchipelError(
            f"{place.file}: remote.{name}.token_env names {place.site.token_env}, which is not set in the environment"
        )
    own = isinstance(source, RunFolder)
    owner = trusting.find(trust, source.run.root if own else None)
    if owner.trust.run and owner.trust.run != source.run.id:
        raise ArchipelError(f"{where} holds run {source.run.id[:12]}, not {owner.trust.run[:12]}")
    folder = known.home_of(source)[1]
    link = place.link(token)
    try:
        admission, said = _check(source, place, link, owner.trust)
    except Refusal as refusal:
        known.forget(folder, name)  # what it is now is not what was admitted
        return Answer(False, refusal.rule, refusal.detail)
    except LostExpertError as error:
        raise ArchipelError(f"expert {name} at {place.origin} was not admitted: {error.reason}") from error
    finally:
        link.close()
    known.record(folder, admission)
    return Answer(True, None, said)


def _check(source: Source, place: Place, link: Link, trust: Trust) -> tuple[Admission, str]:
    run, name = source.run, place.name
    answer = link.ask("GET", wire.DESCRIBE, seconds=place.site.seconds, most=2 * trust.bounds.card + _MORE)[1]
    told = _described(answer, run.id, name)
    if len(told.card) > trust.bounds.card:
        raise Refusal("size", f"the card has {len(told.card)} bytes, at most {trust.bounds.card} are read")
    if wrong := signing.refused(trust.signature, run.id, name, told.card, told.signature, told.signer):
        raise Refusal("signature", wrong)
    job = Job(run.config, run.id, name, _base(source))
    check_magic("the card", told.card[:512])
    card = parse_card(parse_json(told.card, "the card"), run.config, run.id, name, job.base)
    shapes, version = Shapes.of(card.network), store.sha256_bytes(told.card)
    held = _held(source, name)
    rules._check_clips(card, held, job)
    offer = Offer(name, version, shapes, run.config.expert.prediction, told.rows, told.steps)
    said = _measure(known.expert(place, offer), card, job, held, trust)
    signer = next(key.name for key in trust.signature.keys if key.key == told.signer)
    admission = Admission(
        run=run.id,
        name=name,
        where=place.where,
        sha256=version,
        signer=signer,
        prediction=offer.prediction,
        latent=list(shapes.latent),
        text=list(shapes.text),
        image=shapes.image,
        rows=told.rows,
        steps=told.steps,
        measured=said,
    )
    return admission, f"card {version[:12]} signed by {signer}, asked at {place.where}; {said}"


def _described(data: bytes, run_id: str, name: str) -> _Told:
    """Raises Refusal ("format", "config") for a description that is none, or of another run or expert."""
    value = parse_json(data, "the description")
    if not isinstance(value, dict) or value.get("kind") != wire.KIND or value.get("format") != FORMAT:
        raise Refusal("format", "it does not describe a remote expert of this format")
    for key, want in (("run", run_id), ("expert", name)):
        if value.get(key) != want:
            raise Refusal("config", f"it is {key} {shown(value.get(key))}, not {want[:12]}")
    texts = {key: value.get(key) for key in ("card", "signature", "signer")}
    bounds: Any = value.get("limits")
    if not all(isinstance(text, str) for text in texts.values()) or not isinstance(bounds, dict):
        raise Refusal("format", "its description has no card, signature, signer or limits")
    rows, steps = bounds.get("rows"), bounds.get("steps")
    if type(rows) is not int or type(steps) is not int or not 1 <= rows <= _MOST_ROWS or not 0 <= steps <= _MOST_STEPS:
        raise Refusal("format", f"its limits are {shown(rows)} rows and {shown(steps)} steps")
    return _Told(str(texts["card"]).encode(), str(texts["signature"]), str(texts["signer"]), rows, steps)


def _measure(velocity: Velocity, card: Card, job: Job, held: Held, trust: Trust) -> str:
    """The loss rule, through the endpoint. Raises Refusal("loss"), LostExpertError."""
    from archipel.training import heldout

    if not trust.loss.required:
        return "its loss was not measured, as trust.toml wants it"
    found = heldout.measure_velocity(job.config, velocity, held.validation)
    if not found.clips:
        raise Refusal("loss", "there are no validation clips to measure it on (loss.required = false asks for none)")
    bars = (trust.loss.bar, trust.loss.overall)
    return bundle.hold_to_bar(found, bars, "a network that says nothing", card, trust.loss)


def _base(source: Source) -> str | None:
    """sha256 of the weights that the run's jobs begin with, where they do."""
    return source._bucket.base if isinstance(source, BucketRun) else rules._own_base(source.run)


def _held(source: Source, name: str) -> Held:
    """The job's validation clips, from this machine's own shard or as they were published."""
    run = source.run
    shard = run.shard(name)
    if isinstance(source, BucketRun):
        fetch_published(source._bucket, f"shards/{name}", shard)
    else:
        run.need(shard, "partition")
        rules._check_intact(shard)
    return Held(shard / "validation.safetensors", store.read_card(shard, "shard") or {})
