"""``archipel join``: take a free job, resume it from its last good checkpoint, train it, commit it; again until none is left.

One process is one island. It needs outbound access to the store and nothing else, keeps all it needs in a folder of its
own, and may be killed at any moment: what it had sent is there for whoever takes over.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError, DamagedError, Stopped
from archipel.islands import home, keys
from archipel.islands.answers import say
from archipel.islands.bucket import Bucket
from archipel.islands.claims import Claim, Holder, LostError, State, Watcher, claim
from archipel.islands.launch.local import in_order
from archipel.islands.objects import AwayError, Objects
from archipel.islands.outbox import Outbox
from archipel.progress import StopFlag, log_to
from archipel.run import ROUTER, Run
from archipel.training.local import Local

logger = logging.getLogger("archipel")
# What a checkpoint with right checksums can make of training: its numbers or its manifest are a stranger's.
_POISONED = ("is of another model", "is not finite")
_TRIES = 2  # checkpoints that training may fail on before it begins from the start
EVIDENCE = (
    "keys as logged by the store wrapper of this process; what native code opens or connects to by itself is not seen "
    "here: tests/isolation compares with strace"
)
Train = Callable[..., None]
Sign = Callable[[bytes], Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """How this island works. ``only``: these jobs and no others; ``jobs``: end after so many; ``seconds``: --for;
    ``work``: its folder; ``sign``: signs what it commits; ``local``: how it computes."""

    only: tuple[str, ...] = ()
    seconds: float | None = None
    jobs: int | None = None
    name: str = ""
    work: Path | None = None
    sign: Sign | None = None
    local: Local = field(default_factory=Local)


class _Attempt(StopFlag):
    """The stop flag of one attempt: the island's own, or the loss of the job."""

    def __init__(self, island: StopFlag) -> None:
        super().__init__()
        self._island = island

    def __enter__(self) -> _Attempt:  # signals are the island's
        return self

    def __bool__(self) -> bool:
        return bool(self._island) or super().__bool__()

    def error(self, what: str) -> Stopped:
        return super().error(what) if self.reason is not None else self._island.error(what)


@dataclass
class Island:
    """A running island: the bucket, its own folder as a run, and what it has finished or given up."""

    bucket: Bucket
    run: Run
    name: str
    options: Options
    stop: StopFlag
    train: Train
    watcher: Watcher
    finished: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    mine: set[str] = field(default_factory=set)  # nonces of claims made here: nobody else can be holding them


def join(bucket: Bucket, options: Options, stop: StopFlag) -> list[str]:
    """Work until all jobs are done, ``options.jobs`` are, or ``stop``. Returns the names of the jobs finished here.

    Raises Stopped with every claim given back and the last checkpoint sent, ArchipelError naming jobs that failed here
    (after the others were tried), StoreError where the store stayed away.
    """
    for name in options.only:
        bucket.check_job(name)
    if options.seconds is not None:
        stop.limit(options.seconds)
    bucket.objects.give_up = lambda: bool(stop)
    bucket.objects.probe()
    with home.own(bucket, options.work, options.name) as (folder, name):
        run = home.materialise(bucket, folder)
        with log_to(run.log("join")):
            watcher = Watcher(bucket.config.islands.lease)
            island = Island(bucket, run, name, options, stop, _train, watcher)
            try:
                _work(island)
            except Stopped as error:
                if error.interrupted or not island.failed:
                    raise
                say(str(error))  # the time limit was asked for; what failed before it is told
            finally:
                logger.info("island %s: finished %s", name, ", ".join(island.finished) or "nothing")
    if island.failed:
        name, reason = next(iter(island.failed.items()))
        rest = f" (and {len(island.failed) - 1} more)" if len(island.failed) > 1 else ""
        raise ArchipelError(f"job {name} failed here{rest}: {reason}")
    return island.finished


# --- the loop --------------------------------------------------------------------------------------------------------


def _work(island: Island) -> None:
    wanted = in_order(island.run, list(island.options.only) or island.bucket.jobs)
    limit = island.options.jobs
    while True:
        progress = False
        for name in wanted:
            if name in island.done or name in island.failed:
                continue
            if island.stop:
                raise island.stop.error(f"island {island.name}")
            held = _take(island, name)
            if held is not None:
                progress = True
                _attempt(island, *held)
                if limit is not None and len(island.finished) >= limit:
                    return
        left = [name for name in wanted if name not in island.done and name not in island.failed]
        if not left:
            return
        if not progress:
            _wait(island, left)


def _take(island: Island, name: str) -> tuple[Claim, State] | None:
    """Claim a job that is free. None where it is done, held, or somebody was faster."""
    state = _look(island, name)
    if state is None:
        return None
    mine = state.claim.get("nonce") in island.mine
    if not mine and not island.watcher.free(state):
        return None
    if not mine and not state.released:
        logger.warning("job %s: its holder stood still for %.0f s: taken over", name, island.watcher.still(name))
        say(f"job {name}: its holder stood still for {island.watcher.still(name):.0f} s: taking over")
    held = claim(island.bucket.objects, state, island.name)
    if held is None:
        return None
    island.mine.add(held.nonce)
    # Again, since the last holder may have sent a checkpoint, or its result, between our listing and its release.
    state = _look(island, name)
    return None if state is None or state.opening != held.opening else (held, state)


def _look(island: Island, name: str) -> State | None:
    """A job's state; None where there is nothing to do for it here."""
    try:
        state = island.bucket.state(name)
    except DamagedError as error:  # what lies under one job's keys ends no work on others
        _failed(island, name, str(error))
        return None
    if state.done:
        island.done.add(name)
        shutil.rmtree(island.run.expert(name), ignore_errors=True)  # of an attempt here that was overtaken
        return None
    return state


def _wait(island: Island, left: list[str]) -> None:
    """One heartbeat's pause while others hold what is left."""
    logger.info("waiting: %s held by others", ", ".join(left))
    until = time.monotonic() + island.bucket.config.islands.heartbeat
    while (rest := until - time.monotonic()) > 0:
        if island.stop:
            raise island.stop.error(f"island {island.name}, waiting for jobs {', '.join(left)} of others,")
        time.sleep(min(rest, 0.2))


# --- one attempt -----------------------------------------------------------------------------------------------------


def _attempt(island: Island, held: Claim, state: State) -> None:
    """Train a claimed job to its result. A lost job is left to its new holder, a failed one is not tried again here."""
    config, name = island.bucket.config.islands, held.name
    flag = _Attempt(island.stop)
    # Connections of this attempt's own: what they carried is this attempt's traffic, and a heartbeat never queues
    # behind an upload.
    patience = island.bucket.objects.patience
    objects = Objects.open(island.bucket.url, patience=patience)
    beats = Objects.open(island.bucket.url, patience=config.heartbeat, timeout=max(2.0, config.lease / 4))
    objects.give_up = beats.give_up = lambda: bool(flag)
    logger.info("job %s: fence %d is ours", name, held.fence)
    say(f"island {island.name} works on job {name} (attempt {held.fence})")
    holder = Holder(
        beats,
        held,
        every=config.heartbeat,
        lease=config.lease,
        facts=lambda: _seen(island.run, name, objects, beats),
        on_lost=flag.cancel,
    )
    try:
        with holder:
            committed = _carry_out(island, held, state, objects, beats, holder, flag)
    except LostError as error:
        say(str(error))
        logger.warning(str(error))
    except Stopped:
        if holder.lost is None:
            raise
        say(f"job {name}, fence {held.fence}: {holder.lost}; left to others")
    except AwayError as error:
        say(f"job {name}: {error}")
        logger.warning("job %s: %s", name, error)
    except (ArchipelError, OSError) as error:
        _failed(island, name, _of_disk(error, island.run.root) if isinstance(error, OSError) else str(error))
    except Exception as error:  # out of memory, or a fault of ours: the other jobs may do
        logger.exception("job %s", name)
        first = (str(error).strip().splitlines() or [""])[0][:300]
        _failed(island, name, f"{type(error).__name__}: {first} (details in {island.run.log('join')})")
    else:
        island.done.add(name)
        if committed:
            island.finished.append(name)
            say(f"job {name} is done (attempt {held.fence})")
        else:
            say(f"job {name}: another attempt was committed first, and stays")
        shutil.rmtree(island.run.expert(name), ignore_errors=True)


def _carry_out(
    island: Island, held: Claim, state: State, objects: Objects, beats: Objects, holder: Holder, flag: StopFlag
) -> bool:
    """Shard, checkpoint, training, result. True where our result is the job's, False where another was first."""
    bucket, run, name = Bucket.read(objects, island.bucket.id), island.run, held.name
    home.own_folder(run, held)
    home.fetch_shard(bucket, run, name, flag)
    if name != ROUTER:
        home.fetch_base(bucket, run, flag)
    facts = functools.partial(_facts, island, held, objects, beats)
    with Outbox(objects, run.root / "outbox", lambda step: keys.checkpoint(name, held.fence, step)) as outbox:
        try:
            _train_from(island, held, state, bucket, outbox, facts, flag)
        except Stopped:
            if holder.lost is None and not outbox.finish():
                say(f"job {name}: the last checkpoint did not reach the store in time; it is kept in {run.root}")
            raise
        outbox.drop()
    _own_card(run, held, facts)
    holder.check()
    sha256 = _send_result(objects, run, held)
    value: dict[str, Any] = {"key": keys.result(name, held.fence), "sha256": sha256}
    if island.options.sign is not None:
        value |= island.options.sign(signed_bytes(run.id, name, held.fence, sha256))
    return holder.commit(value)


def _train_from(
    island: Island,
    held: Claim,
    state: State,
    bucket: Bucket,
    outbox: Outbox,
    facts: Callable[[], dict[str, Any]],
    flag: StopFlag,
) -> None:
    """Train from the furthest good checkpoint. One that training fails on is passed over for an older one, and in the
    end for none: its checksums are right, and yet it may be a stranger's who wants the job never to end."""
    run, name = island.run, held.name
    refused: set[tuple[int, int]] = set()
    tries = 0
    while True:
        brought = home.fetch_checkpoint(bucket, run, state, refused)
        resumed = home.has_checkpoint(run, name)
        try:
            island.train(run, name, stop=flag, on_checkpoint=outbox.add, facts=facts, local=island.options.local)
            return
        except (ArchipelError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if not resumed or (isinstance(error, ArchipelError) and not any(w in str(error) for w in _POISONED)):
                raise
            which = f"checkpoint {brought[0]} of attempt {brought[1]}" if brought else "the checkpoint kept here"
            say(f"job {name}: {which} is passed over: {error}")
            logger.warning("job %s: %s is passed over: %r", name, which, error)
            if brought:
                refused.add(brought)
            tries += _POISONED[0] not in str(error)  # which shows at once, and costs nothing to try again
            if tries == _TRIES:
                state = replace(state, keys=())
            outbox.drop()
            shutil.rmtree(run.expert(name), ignore_errors=True)
            home.own_folder(run, held)


def _own_card(run: Run, held: Claim, facts: Callable[[], dict[str, Any]]) -> None:
    """A result that an earlier attempt here finished and could not commit becomes this attempt's: its card says so."""
    folder = run.expert(held.name)
    card = store.read_card(folder)
    if card is not None and (card.get("island") or {}).get("fence") != held.fence:
        store.write_sealed(folder / keys.CARD, {**card, "island": facts()})


def signed_bytes(run_id: str, name: str, fence: int, sha256: str) -> bytes:
    """What a signature covers: run, job, fence and the sha256 of the result's card."""
    return f"archipel commit 1\n{run_id}\n{name}\n{fence}\n{sha256}\n".encode()


def _train(run: Run, name: str, **settings: Any) -> None:
    """The very functions that `archipel train` calls."""
    if name == ROUTER:
        from archipel.routing.stage import train_router

        train_router(run, **settings)
    else:
        from archipel.training.stage import train

        train(run, name, **settings)


def _send_result(objects: Objects, run: Run, held: Claim) -> str:
    """Upload what the card lists, the card last. Returns the card's sha256."""
    folder = run.expert(held.name)
    problems = store.check_card(folder)
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: start the island again")
    card = store.read_card(folder) or {"files": {}}
    where = keys.result(held.name, held.fence)
    for file in (*card["files"], keys.CARD):
        objects.put(f"{where}/{file}", folder / file)
    return store.sha256_file(folder / keys.CARD)


# --- what others and the card see ------------------------------------------------------------------------------------


def _failed(island: Island, name: str, reason: str) -> None:
    island.failed[name] = reason
    logger.error("job %s failed here: %s", name, reason)
    say(f"job {name} failed here: {reason}")


def _of_disk(error: OSError, folder: Path) -> str:
    return (
        f"{error.filename or folder} cannot be used ({error.strerror or error}): make it writable or free space, then start "
        "again; what was finished is kept"
    )


def _seen(run: Run, name: str, *connections: Objects) -> dict[str, Any]:
    """For the heartbeat: where training is, and what moved so far."""
    told: dict[str, Any] = {}
    with contextlib.suppress(ArchipelError, OSError):
        value = store.read_json(run.expert(name) / "progress.json")
        told = value if isinstance(value, dict) else {}
    facts: dict[str, Any] = {key: told.get(key) for key in ("step", "steps", "loss", "steps_per_s")}
    return facts | {"traffic": _traffic(*connections)}


def _traffic(*connections: Objects) -> dict[str, Any]:
    requests: dict[str, int] = {}
    for objects in connections:
        for kind, count in dict(objects.traffic.requests).items():  # a copy: other threads are counting
            requests[kind] = requests.get(kind, 0) + count
    return {
        "requests": dict(sorted(requests.items())),
        "bytes_sent": sum(o.traffic.sent for o in connections),
        "bytes_received": sum(o.traffic.received for o in connections),
    }


def _facts(island: Island, held: Claim, *connections: Objects) -> dict[str, Any]:
    """The card's "island": who, which attempt, which keys of the store were touched, and what moved."""
    reads = set().union(*(o.reads for o in connections))
    writes = set().union(*(o.writes for o in connections))
    return {
        "name": island.name,
        "fence": held.fence,
        "store": {"read": _names(reads - writes), "wrote": _names(writes), "evidence": EVIDENCE},
        "traffic": _traffic(*connections),
    }


def _names(found: set[str]) -> list[str]:
    """Keys with the steps of checkpoints as one star, so that a list stays short however long a training is."""
    short = set()
    for key in found:
        parts = key.split("/")
        if "checkpoints" in parts and len(parts) > 4:
            parts[4] = "*"
        short.add("/".join(parts))
    return sorted(short)
