"""``archipel admit``: the owner's door. What a stranger trained is checked here before any ensemble loads it.

The answer is a rule and a sentence. What is admitted from a bucket is copied to a key named by the sha256 of its card, which
lists the rest by sha256; what is not changes nothing, but for a note why. Bounds, bar and keys are the owner's own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archipel import FORMAT, store
from archipel.errors import ArchipelError, DamagedError
from archipel.islands import bundle, keys
from archipel.islands import trust as trusting
from archipel.islands.bucket import Bucket
from archipel.islands.bundle import CALIBRATION, Held, Job
from archipel.islands.card import CARD, CONFIG, LISTED, METRICS, MODEL, Card, Commit, parse_commit
from archipel.islands.claims import chain
from archipel.islands.objects import Objects, StoreError, decode, encode
from archipel.islands.remote import Admitted, cached_run, fetch_base, listed_files, read_admitted
from archipel.islands.strict import Refusal, parse_json, shown
from archipel.islands.trust import Source
from archipel.run import ROUTER, Run, begins_with_base

RULES = ("format", "path", "size", "shape", "config", "finite", "checksum", "signature", "fence", "loss")
LOADED = (CARD, CONFIG, MODEL)  # what an ensemble needs of a result
_COMMIT = 16 << 10  # bytes of committed.json


@dataclass(frozen=True)
class Answer:
    """``rule`` names what was broken (see RULES), None where admitted; ``detail`` says where and how, or what was measured."""

    admitted: bool
    rule: str | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_bucket(where: str | Path) -> bool:
    """Whether something is a URL or a published folder, as opposed to a run on this machine."""
    return "://" in str(where) or (Path(where) / keys.PUBLISHED).is_file()


def admit(
    where: str | Path, name: str, *, run_id: str | None = None, trust: Path | None = None, reopen: bool = False
) -> Answer:
    """Check job ``name``'s result in a bucket (its committed result) or a run's folder, and admit it or say why not.

    ``trust``: the owner's trust.toml, found as ``trust.find`` says where None. ``reopen``: after a refusal from a bucket,
    let islands take the job again. Raises ArchipelError for wrong use, StoreError; never for what a stranger wrote.
    """
    if is_bucket(where):
        source = trusting.find(trust, None)
        bucket = Bucket.open(where, run_id or source.trust.run or None)
        _check_published(bucket, source)
        bucket.check_job(name)
        return _Bucket(bucket, name, source).answer(reopen)
    run = Run.open(where)
    source = trusting.find(trust, run.root)
    _check_run(run, run_id, source)
    run.expert(name)  # names the jobs there are
    if reopen:
        raise ArchipelError("--reopen is for buckets: in a run's folder remove the expert's folder and train it again")
    return _folder(run, name, source)


def _check_run(run: Run, run_id: str | None, source: Source) -> None:
    for wanted in (run_id, source.trust.run):
        if wanted and not run.id.startswith(wanted):
            raise ArchipelError(f"{run.root} holds run {run.id[:12]}, not {wanted[:12]}")


def _check_published(bucket: Bucket, source: Source) -> None:
    """A store could swap the shards that the loss is measured on, with the list of their hashes: the owner may pin it."""
    wanted = source.trust.published
    if wanted and store.sha256_bytes(bucket.objects.get(keys.PUBLISHED) or b"") != wanted:
        raise DamagedError(
            f"{keys.PUBLISHED} in {bucket.url} is not the one that published = {wanted[:12]}... in {source.path} pins: "
            "somebody replaced the list of the run's files"
        )


# --- a run's folder --------------------------------------------------------------------------------------------------


def _folder(run: Run, name: str, source: Source) -> Answer:
    folder, pointer = run.expert(name), run.root / keys.ADMITTED / f"{name}.json"
    try:
        if not folder.is_dir():
            raise Refusal("format", f"there is no result at {folder}: `archipel train {run.root} {name}` makes one")
        told, sha256 = check(run, name, folder, run.root, source.trust, admitted(run))
    except Refusal as refusal:
        known, card = admitted(run).get(name), folder / CARD
        if known is not None and card.is_file() and known.sha256 == store.sha256_file(card):
            pointer.unlink(missing_ok=True)  # what is refused today is not admitted any longer
        return Answer(False, refusal.rule, refusal.detail)
    store.write_json(pointer, _pointer(run.id, name, sha256, 0, _sizes(folder, LOADED)))
    return Answer(True, None, told)


def check(
    run: Run, name: str, folder: Path, root: Path, rules: trusting.Trust, known: Mapping[str, Admitted]
) -> tuple[str, str]:
    """Hold the result of job ``name`` in ``folder`` (somewhere in ``root``) to every rule of a run's folder; its loss is measured on
    the run's own shard. ``known``: what is admitted already. Returns what was measured, in words, and the card's sha256.
    Raises Refusal.
    """
    job = Job(run.config, run.id, name, _own_base(run))
    bundle.check_listing(folder, root)
    if rules.signature.required:
        raise Refusal("signature", "a run's folder has no signatures, and trust.toml requires them")
    card, sha256 = bundle.check_card(folder, job, rules.bounds)
    bundle.check_files(folder, card, job, rules.bounds)
    if name == ROUTER and (folder / CALIBRATION).exists():
        bundle.check_calibration(folder, card, job)
    _check_not_another(known, name, card)
    shard = run.shard(name)
    run.need(shard, "partition")
    _check_intact(shard)
    held = Held(shard / "validation.safetensors", store.read_card(shard, "shard") or {}, run.base)
    _check_clips(card, held, job)
    return bundle.check_loss(folder, card, job, held, rules.loss), sha256


def _own_base(run: Run) -> str | None:
    """sha256 of the weights that the run's jobs begin with; None where they begin with none."""
    if not begins_with_base(run.config):
        return None
    run.need(run.base, "prepare")
    _check_intact(run.base)
    return str((store.read_card(run.base, "base") or {})["sha256"])


def _check_intact(shard: Path) -> None:
    problems = store.check_card(shard)
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: run `archipel partition` again")


# --- a bucket --------------------------------------------------------------------------------------------------------


class _Bucket:
    """One admission from a bucket."""

    def __init__(self, bucket: Bucket, name: str, source: Source) -> None:
        self.bucket, self.objects, self.name, self.trust = bucket, bucket.objects, name, source.trust
        self.job = Job(bucket.config, bucket.id, name, bucket.base)
        self.opening, self.above, self.top = 0, 0, 0
        self.found = False  # whether anything is committed
        self.commit: Commit | None = None

    def answer(self, reopen: bool) -> Answer:
        with tempfile.TemporaryDirectory(prefix="archipel-admit-") as scratch:
            try:
                return Answer(True, None, self._check(Path(scratch)))
            except Refusal as refusal:
                detail = refusal.detail
                if self.found:
                    self._record(refusal)
                    detail += self._reopen() if reopen else ""
                return Answer(False, refusal.rule, detail)

    def _check(self, scratch: Path) -> str:
        self._standing()
        commit = self._committed()
        message = trusting.payload(self.bucket.id, self.name, commit.fence, commit.sha256)
        wrong = trusting.check_signature(self.trust.signature, self.name, message, commit.signature, commit.signer)
        if wrong:
            raise Refusal("signature", wrong)
        folder = scratch / "result"
        folder.mkdir()
        card = self._fetch(commit, folder)
        bundle.check_files(folder, card, self.job, self.trust.bounds)
        _check_not_another(admitted(self.bucket), self.name, card)
        held = self._held_out(scratch)
        _check_clips(card, held, self.job)
        told = bundle.check_loss(folder, card, self.job, held, self.trust.loss)
        self._copy(folder, commit, card, held)
        return told

    # --- what is committed --------------------------------------------------------------------------------------

    def _standing(self) -> None:
        """The gapless chain of claims, and what the owner reopened."""
        _check_links(self.objects, keys.job(self.name))
        listed = {entry.key for entry in self.objects.list(keys.job(self.name))}
        self.top = chain({fence for key in listed if (fence := keys.fence_of(key)) is not None})
        while keys.reopened(self.name, self.opening + 1) in listed:
            self.opening += 1
        if self.opening:
            above = decode(self.objects.get(keys.reopened(self.name, self.opening))).get("above")
            self.above = above if isinstance(above, int) else self.top

    def _committed(self) -> Commit:
        """The committed result, held to its claim. Raises Refusal("fence")."""
        key = keys.committed(self.name, self.opening)
        with _refusing("size", key):
            try:
                data = self.objects.get(key, _COMMIT)
            except DamagedError:
                self.found = True  # islands count it as done, so that it must be possible to reopen
                raise
        if data is None:
            raise Refusal("fence", f"job {self.name} has no committed result yet")
        self.found = True
        commit = parse_commit(parse_json(data, key, numbers="fence"), key)
        fence = commit.fence
        if not 1 <= fence <= keys.MAX_FENCE:
            raise Refusal("fence", f"{key}: fence {shown(fence)} is not between 1 and {keys.MAX_FENCE}")
        self.commit = commit
        if fence > self.top:
            raise Refusal("fence", f"{key}: fence {fence} was never claimed; the claims go up to {self.top}")
        if fence <= self.above:
            raise Refusal("fence", f"{key}: fence {fence} is from before the job was reopened (above {self.above})")
        if commit.name != self.name or commit.key != keys.result(self.name, fence):
            raise Refusal("fence", f"{key} points to {shown(commit.key)} of job {shown(commit.name)}")
        claim = keys.claim(self.name, fence)
        with _refusing("size", claim):
            holder = decode(self.objects.get(claim, _COMMIT))
        if holder.get("nonce") != commit.nonce or holder.get("fence") != fence or holder.get("name") != self.name:
            raise Refusal("fence", f"{key} was not written by the holder of {claim}: their nonces differ")
        return commit

    def _fetch(self, commit: Commit, folder: Path) -> Card:
        """Bring the result into ``folder``: names and sizes from the listing first, then the card, then what it lists."""
        most = bundle.limits(self.trust.bounds, self.job)
        allowed, prefix = frozenset({*LISTED, CARD}), commit.key + "/"
        entries = self.objects.list(commit.key)
        for entry in entries:
            bundle.check_name(entry.key.removeprefix(prefix), allowed)
            if entry.size > most[entry.key.removeprefix(prefix)]:
                raise Refusal("size", f"{entry.key} has {entry.size} bytes, at most {most[entry.key[len(prefix) :]]}")
        if missing := allowed - {entry.key.removeprefix(prefix) for entry in entries}:
            raise Refusal("format", f"{prefix}{sorted(missing)[0]} is missing")
        with _refusing("size", prefix + CARD):
            data = self.objects.get(prefix + CARD, most[CARD]) or b""
        if store.sha256_bytes(data) != commit.sha256:
            raise Refusal("checksum", f"{prefix}{CARD} is not what was committed: its sha256 differs")
        store.write_bytes(folder / CARD, data)
        card, _ = bundle.check_card(folder, self.job, self.trust.bounds)
        if card.island is not None and card.island.get("fence", commit.fence) != commit.fence:
            raise Refusal("fence", f"{CARD} is of attempt {shown(card.island.get('fence'))}, not {commit.fence}")
        sizes = {entry.key.removeprefix(prefix): entry.size for entry in entries}
        for name in (CONFIG, METRICS, MODEL):
            if sizes[name] != card.files[name].bytes:
                raise Refusal("checksum", f"{prefix}{name} has {sizes[name]} bytes, not those that the card lists")
            with _refusing("checksum", prefix + name):
                wanted = card.files[name]
                self.objects.fetch(prefix + name, folder / name, sha256=wanted.sha256, size=wanted.bytes)
        return card

    def _held_out(self, scratch: Path) -> Held:
        """The job's validation clips and the card of their shard, as the owner published them."""
        folder, (any_key, *_) = scratch / "shard", self.bucket.shard(self.name)
        prefix = any_key.rpartition("/")[0]
        for file in (CARD, "validation.safetensors"):
            self.bucket.fetch(f"{prefix}/{file}", folder / file)
        base = None
        if self.job.config.expert.lora_rank and self.name != ROUTER and self.trust.loss.required:
            base = fetch_base(self.bucket, cached_run(self.bucket))
        return Held(folder / "validation.safetensors", store.read_card(folder, "shard") or {}, base)

    # --- the owner's word ---------------------------------------------------------------------------------------

    def _copy(self, folder: Path, commit: Commit, card: Card, held: Held) -> None:
        """Copy what ensembles load to keys named by the card's sha256; the pointer last."""
        names = [*LOADED]
        if self.name == ROUTER:
            from archipel.routing import heldout

            value = heldout.calibrate(
                self.bucket.config, self.bucket.id, folder, held.validation, held.card["prior"], card.sha256
            )
            store.write_json(folder / CALIBRATION, value)
            names.append(CALIBRATION)
        for name in names:
            self.objects.put(keys.admitted(commit.sha256, name), folder / name)
        pointer = _pointer(self.bucket.id, self.name, commit.sha256, commit.fence, _sizes(folder, names))
        self.objects.put(keys.admitted(self.name), encode(pointer))
        note = keys.refused(self.name, commit.fence)
        if self.objects.get(note, _COMMIT) is not None:  # by stricter rules, before
            self.objects.remove([note])

    def _record(self, refusal: Refusal) -> None:
        """Note why; and take an earlier admission of the very same result back."""
        commit = self.commit
        fence = commit.fence if commit is not None else 0
        value = {"format": FORMAT, "name": self.name, "fence": fence, "rule": refusal.rule, "detail": refusal.detail}
        self.objects.put(keys.refused(self.name, fence), encode(value))
        known = admitted(self.bucket).get(self.name)
        if commit is not None and known is not None and known.sha256 == commit.sha256:
            self.objects.remove([keys.admitted(self.name)])

    def _reopen(self) -> str:
        """Let islands take the job again: nothing of the attempts so far counts any longer."""
        number = self.opening + 1
        value = {"format": FORMAT, "name": self.name, "opening": number, "above": self.top}
        self.objects.create(keys.reopened(self.name, number), encode(value))
        return f"; job {self.name} is open again for attempts above {self.top}"


def _check_links(objects: Objects, prefix: str) -> None:
    """A store on a disk may hold links, which could lead anywhere: refuse them before anything is read."""
    if objects.root is None:
        return
    top = objects.root / prefix
    for path in (top.parent, top, *(top.rglob("*") if top.is_dir() and not top.is_symlink() else ())):
        if path.is_symlink():
            where = path.relative_to(objects.root).as_posix()
            raise Refusal("path", f"{shown(where)} is a link: a store holds files only")


@contextlib.contextmanager
def _refusing(rule: str, key: str) -> Iterator[None]:
    """What a stranger's object does to a reader is the stranger's fault; a store that stays away is not."""
    try:
        yield
    except StoreError:
        raise
    except DamagedError as error:
        raise Refusal(rule, f"{key}: {error}") from error


# --- both ------------------------------------------------------------------------------------------------------------


def _check_not_another(known: Mapping[str, Admitted], name: str, card: Card) -> None:
    """One job's weights must not stand in for another's, whatever the card says."""
    for other, found in known.items():
        if other != name and found.files.get(MODEL, ("", 0))[0] == card.sha256:
            raise Refusal("checksum", f"{MODEL} is, byte for byte, that of job {other}, which is admitted already")


def _check_clips(card: Card, held: Held, job: Job) -> None:
    """The card's counts of clips, and what the router is measured against, are the shard's own."""
    counts = held.card.get("counts")
    if not isinstance(counts, dict):
        raise DamagedError("the shard's card.json does not count its clips: run `archipel partition` again")
    for split in ("train", "validation"):
        if getattr(card, f"{split}_clips") != counts.get(split):
            raise Refusal(
                "config",
                f"{CARD}: {split}_clips is {getattr(card, f'{split}_clips')}, the shard has {counts.get(split)}",
            )
    begun = None if card.warm_start is None else card.warm_start.model_dump()
    if begun is not None and job.base is not None and begun["sha256"] != job.base:
        raise Refusal("config", f"{CARD}: warm_start is not the base that the run's experts are adapters of")
    if begun is not None and job.base is None and begun != held.card.get("init"):
        raise Refusal("config", f"{CARD}: warm_start is not the start that the job's shard carries")
    prior = held.card.get("prior", [])
    if job.name == ROUTER and not (
        len(prior) == job.config.partition.k and all(isinstance(p, float) and 0 < p <= 1 for p in prior)
    ):
        raise DamagedError("the shard's card.json does not give the clusters' shares: run `archipel partition` again")


def _sizes(folder: Path, names: list[str] | tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": store.sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }


def _pointer(run_id: str, name: str, sha256: str, fence: int, files: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "admitted",
        "run": run_id,
        "name": name,
        "sha256": sha256,
        "fence": fence,
        "files": files,
    }


def admitted(source: Bucket | Run) -> dict[str, Admitted]:
    """The admitted results of a bucket or a run's folder, by job: sha256 of the card, fence (0 for a run's own), and
    {file: (sha256, bytes)} of what ensembles load, which lies at ``keys.admitted(sha256, file)`` in a bucket and in
    ``run.expert(name)`` of a run. Whoever loads it holds it to them. Raises DamagedError for a pointer that is none."""
    if isinstance(source, Run):
        paths = {name: source.root / keys.ADMITTED / f"{name}.json" for name in source.job_names}
        return {name: _read_pointer(path, name) for name, path in paths.items() if path.is_file()}
    there = {entry.key for entry in source.objects.list(keys.ADMITTED)}
    found = {name: read_admitted(source.objects, name) for name in source.jobs if keys.admitted(name) in there}
    return {name: value for name, value in found.items() if value is not None}


def _read_pointer(path: Path, name: str) -> Admitted:
    value = store.read_json(path)
    if not isinstance(value, dict) or value.get("name") != name or not isinstance(value.get("sha256"), str):
        raise DamagedError(f"{path} is not an admission: remove it, and run `archipel admit` again")
    return Admitted(name, value["sha256"], 0, listed_files(value.get("files"), str(path)))
