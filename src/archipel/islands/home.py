"""An island's own folder: a run with the shards and checkpoints that its jobs need, brought from the bucket and verified."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError, DamagedError, LockedError
from archipel.islands import keys, network
from archipel.islands.answers import say
from archipel.islands.bucket import Bucket, File, checkpoints
from archipel.islands.claims import Claim, State
from archipel.islands.launch.local import steps_of
from archipel.islands.remote import fetch_published
from archipel.islands.strict import Refusal, check_finite, parse_json, read_header, shown
from archipel.partition.shards import INIT
from archipel.progress import Progress, StopFlag
from archipel.run import Run, starts_warm

logger = logging.getLogger("archipel")
_MARK = "attempt.json"  # in a job's local folder: which opening of the job it belongs to
_MANIFEST, _STATE = "manifest.json", "state.safetensors"
_GROUPS = frozenset({"weight", "average", "moment1", "moment2", "best"})
_SHARD_FILES = {keys.CARD, "train.safetensors", "validation.safetensors"}


@contextlib.contextmanager
def own(bucket: Bucket, work: Path | None, name: str) -> Iterator[tuple[Path, str]]:
    """The island's folder, held by a lock, and its name. Without --work the first free one in the cache folder."""
    if work is not None:
        with store.lock(work / ".locks" / "island.lock", f"the island's folder {work}"):
            yield work, _island_name(work, name)
        return
    from archipel.data.fetch import cache_folder

    places = cache_folder() / "islands" / bucket.id[:16]
    for number in range(1000):
        place = places / str(number)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(store.lock(place / ".locks" / "island.lock", f"the island's folder {place}"))
            except LockedError:
                continue
            yield place, _island_name(place, name)
            return
    raise ArchipelError(f"{places} holds a thousand busy islands: give a folder with --work")


def _island_name(place: Path, wanted: str) -> str:
    """``--name``, or a name that says nothing of machine or user, the same each time for one folder."""
    if wanted:
        if not wanted.isascii() or not wanted.replace("-", "").replace("_", "").isalnum() or len(wanted) > 64:
            raise ArchipelError(f"--name {wanted!r}: at most 64 letters, digits, '-' and '_'")
        return wanted
    path = place / "island.txt"
    if not path.exists():
        store.write_text(path, f"island-{os.urandom(3).hex()}\n")
    return path.read_text(encoding="utf-8").strip()[:64] or "island"


def materialise(bucket: Bucket, folder: Path) -> Run:
    """The island's folder as a run: the bucket's run.toml, byte for byte."""
    path = folder / "run.toml"
    if path.exists():
        if path.read_bytes() != bucket.run_toml:
            raise ArchipelError(f"{folder} is the folder of an island of another run: give another with --work")
        if any((folder / part).exists() for part in ("clips", "codec", "partition")):
            raise ArchipelError(
                f"{folder} is the folder of a run, whose experts an island would replace: give another with --work "
                f"(`archipel train {folder}` trains there)"
            )
    else:
        store.write_bytes(path, bucket.run_toml)
    return Run.open(folder)


def own_folder(run: Run, held: Claim) -> None:
    """The job's local folder: kept from an earlier attempt here, unless the owner has reopened the job since."""
    folder = run.expert(held.name)
    mark = {"opening": held.opening}
    with contextlib.suppress(ArchipelError):
        if (folder / _MARK).exists() and store.read_json(folder / _MARK) == mark:
            return
    shutil.rmtree(folder, ignore_errors=True)
    store.write_json(folder / _MARK, mark)


def fetch_shard(bucket: Bucket, run: Run, name: str, stop: StopFlag) -> None:
    """Bring what is not here, or not as published; the card last, since a shard with a card is whole."""
    folder = run.shard(name)
    wanted = {key.rpartition("/")[2]: (key, file) for key, file in bucket.shard(name).items()}
    files = _SHARD_FILES | ({INIT} if starts_warm(run.config) else set())
    if set(wanted) != files:
        raise DamagedError(f"{keys.PUBLISHED} in {bucket.url}: a shard of {', '.join(sorted(wanted))} is none")
    missing = [file for file in sorted(files) if not _is(folder / file, wanted[file][1])]
    if not missing:
        return
    (folder / keys.CARD).unlink(missing_ok=True)
    order = [*(file for file in missing if file != keys.CARD), keys.CARD]
    with Progress(f"fetch shard {folder.name} (kB)", sum(wanted[file][1].size for file in order) // 1000) as bar:
        moved = 0

        def on_bytes(count: int) -> None:
            nonlocal moved
            moved += count
            bar.update(moved // 1000)

        for file in order:
            if stop:
                raise stop.error(f"fetching the shard of job {name}")
            bucket.fetch(wanted[file][0], folder / file, on_bytes)


def fetch_base(bucket: Bucket, run: Run, stop: StopFlag) -> None:
    """Bring the weights that experts begin with or are adapters of, once for all jobs of this folder."""
    if bucket.base is None:
        return
    there = [(run.base / key.rpartition("/")[2], key) for key in bucket.files if key.startswith(f"{keys.BASE}/")]
    if all(_is(path, bucket.files[key]) for path, key in there):
        return
    size = sum(bucket.files[key].size for _, key in there)
    with Progress("fetch base (kB)", max(1, size // 1000)) as bar:
        fetch_published(bucket, keys.BASE, run.base, lambda count: bar.advance(count // 1000))


def _is(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size and store.sha256_file(path) == file.sha256


def fetch_checkpoint(bucket: Bucket, run: Run, state: State, refused: set[tuple[int, int]]) -> tuple[int, int] | None:
    """Bring the furthest good checkpoint of all attempts, unless one as far is here already. Damaged ones are named
    and passed over. Returns its (step, fence), or None where there is none to bring."""
    folder = run.expert(state.name) / "checkpoints"
    here, steps = _furthest(folder), steps_of(run, state.name)
    for step, fence in checkpoints(state):
        if step > steps:
            logger.warning(
                "job %s: checkpoint %d of attempt %d is beyond the end of the training", state.name, step, fence
            )
            continue
        if step <= here:
            return None
        if (step, fence) in refused:
            continue
        key = keys.checkpoint(state.name, fence, step)
        try:
            _bring(bucket, state.name, key, folder / f"{step:08d}", step)
        except DamagedError as error:
            logger.warning("job %s: checkpoint %d of attempt %d is passed over: %s", state.name, step, fence, error)
            say(f"job {state.name}: checkpoint {step} of attempt {fence} is passed over: {error}")
            shutil.rmtree(folder / f"{step:08d}", ignore_errors=True)
            continue
        return step, fence
    return None


def has_checkpoint(run: Run, name: str) -> bool:
    """Whether training would continue and not begin."""
    return _furthest(run.expert(name) / "checkpoints") > 0


def _furthest(folder: Path) -> int:
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / _MANIFEST).exists()), default=0)


def _manifest(bucket: Bucket, key: str) -> dict[str, Any]:
    """A stranger's manifest: JSON without NaN or depth, and without a character that a terminal would obey."""
    data = bucket.objects.get(key)
    if data is None:
        raise DamagedError(f"{key} is missing")
    try:
        value = parse_json(data, key)
    except Refusal as refusal:
        raise DamagedError(f"{key} is damaged: {refusal.detail}") from refusal
    if not isinstance(value, dict) or not _printable(value):
        raise DamagedError(f"{key} is damaged: it is no manifest")
    return value


def _printable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.isprintable() and _printable(part) for key, part in value.items())
    if isinstance(value, list):
        return all(_printable(part) for part in value)
    return not isinstance(value, str) or value.isprintable()


def _check_state(bucket: Bucket, name: str, path: Path, size: int) -> None:
    """Only what a checkpoint of this job holds, and finite: with a NaN the job would fail on every island."""
    wanted = network.wanted_state(bucket.config, name)
    try:
        header = read_header(path, tensors=len(_GROUPS) * len(wanted), limit=size)
        for tensor, (shape, _, _) in header.tensors.items():
            group, _, rest = tensor.partition("/network.")
            if group not in _GROUPS or wanted.get(rest) != shape:
                raise Refusal("shape", f"tensor {shown(tensor)} of shape {shown(shape)} is of another model")
        check_finite(path, header, math.inf)
    except Refusal as refusal:
        raise DamagedError(f"{_STATE} is not a state of job {name}: {refusal.detail}") from refusal


def _most(bucket: Bucket, name: str) -> int:
    """Bytes that a checkpoint of a job can have."""
    wanted = network.wanted_state(bucket.config, name)
    return len(_GROUPS) * (4 * sum(math.prod(shape) for shape in wanted.values()) + 512 * len(wanted)) + 8192


def _bring(bucket: Bucket, name: str, key: str, folder: Path, step: int) -> None:
    """One checkpoint: its manifest is read and checked first, and written last."""
    objects = bucket.objects
    manifest = _manifest(bucket, f"{key}/{_MANIFEST}")
    if not store.sealed(manifest):
        raise DamagedError(f"{key}/{_MANIFEST} is damaged: its content is not what was written")
    if manifest.get("run") != bucket.id or manifest.get("step") != step or manifest.get("name", name) != name:
        raise DamagedError(f"{key}/{_MANIFEST} is not the manifest of job {name} at step {step} of this run")
    listed = manifest.get("files")
    entry = listed.get(_STATE) if isinstance(listed, dict) else None
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(sha256, str) or size <= 0:
        raise DamagedError(f"{key}/{_MANIFEST} does not say what {_STATE} is")
    if size > _most(bucket, name):
        raise DamagedError(f"{key}/{_STATE} is said to have {shown(size)} bytes, which no state of job {name} has")
    free = shutil.disk_usage(folder.parent.parent).free
    if size > free:
        raise ArchipelError(
            f"{key}/{_STATE} has {size / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free in {folder.parent}"
        )
    objects.fetch(f"{key}/{_STATE}", folder / _STATE, sha256=sha256, size=size)
    _check_state(bucket, name, folder / _STATE, size)
    store.write_json(folder / _MANIFEST, manifest)
