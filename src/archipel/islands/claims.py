"""Who holds a job: claims that count up, a heartbeat that moves, and one result that is never replaced.

The protocol stands on create-if-absent alone. A claim is the creation of ``jobs/<name>/claims/<fence>``; the holder moves
its heartbeat; whoever sees it stand still for a lease, on an own clock that counts suspension, may claim the next fence.
The result is one create of ``committed.json``: whatever else goes wrong, there is exactly one, and readers follow only
it. No two clocks are ever compared. Neither torch nor diffusers is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from archipel import FORMAT
from archipel.errors import ArchipelError, DamagedError, Stopped
from archipel.islands import keys
from archipel.islands.answers import say
from archipel.islands.objects import Objects, decode, encode

logger = logging.getLogger("archipel")
WORKING, RELEASED, DONE = "working", "released", "done"
_SAID = 64 << 10  # bytes of a claim, a heartbeat or a commit: more is no word of an island


class LostError(ArchipelError):
    """The job is another island's now: this attempt commits nothing."""


def clock() -> float:
    """Seconds on a clock of this machine that goes on while it sleeps, so that a woken holder knows it overslept."""
    with contextlib.suppress(AttributeError, OSError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@dataclass(frozen=True)
class Claim:
    """A held job: its fence, and the nonce that makes it this holder's. ``opening``: how often it was reopened."""

    name: str
    fence: int
    nonce: str
    island: str
    opening: int = 0


@dataclass(frozen=True)
class State:
    """A job as the store tells it: no liveness, which only watching can tell.

    fence: highest of the gapless chain of claims, 0 where there is none; above: results and checkpoints of fences up to
    here do not count (the owner reopened the job); committed: the result that counts, or {}.
    """

    name: str
    fence: int = 0
    above: int = 0
    opening: int = 0
    committed: Mapping[str, Any] = field(default_factory=dict)
    claim: Mapping[str, Any] = field(default_factory=dict)
    heartbeat: Mapping[str, Any] = field(default_factory=dict)
    seen: float | None = None  # the store's timestamp of the last heartbeat or claim
    keys: tuple[str, ...] = ()  # all that lies under the job

    @property
    def done(self) -> bool:
        return bool(self.committed)

    @property
    def released(self) -> bool:
        """Whether nobody holds the job: never claimed, given back, or reopened since."""
        return not self.done and (self.fence <= self.above or self.heartbeat.get("state") in (RELEASED, DONE))


def chain(fences: set[int]) -> int:
    """The highest fence of 1, 2, 3, ... without a gap: a stranger's claim of fence 10^7 counts for nothing."""
    fence = 0
    while fence + 1 in fences:
        fence += 1
    return fence


def read_state(objects: Objects, name: str) -> State:
    """A job's state: one listing of its keys, and the few small objects that say who and what. Raises StoreError."""
    entries = {entry.key: entry for entry in objects.list(keys.job(name))}
    opening = 0
    while keys.reopened(name, opening + 1) in entries:  # without a gap, as `admit` counts
        opening += 1
    above = _said(objects, keys.reopened(name, opening)).get("above") if opening else 0
    fence = chain({number for key in entries if (number := keys.fence_of(key)) is not None})
    ours = keys.committed(name, opening)
    # It is never replaced: an unreadable one is a result that `admit` refuses, and no reason to train the job again.
    committed = (_said(objects, ours) or {"damaged": ours}) if ours in entries else {}
    holder: dict[str, Any] = {}
    beat: dict[str, Any] = {}
    seen = None
    if fence:
        holder = _said(objects, keys.claim(name, fence))
        shown = [entries[key] for key in (keys.claim(name, fence), keys.heartbeat(name, fence)) if key in entries]
        seen = max(entry.modified for entry in shown)
        if keys.heartbeat(name, fence) in entries:
            beat = _said(objects, keys.heartbeat(name, fence))
        if beat.get("nonce") != holder.get("nonce"):  # written by somebody else: it keeps nothing alive
            beat = {}
    if not committed and beat.get("state") == DONE:  # committed since we listed: not to be trained once more
        committed = _said(objects, ours)
    return State(
        name,
        fence,
        above if isinstance(above, int) else fence,
        opening,
        committed,
        holder,
        beat,
        seen,
        tuple(entries),
    )


def _said(objects: Objects, key: str) -> dict[str, Any]:
    """A small JSON object that anybody may have written; {} for none, for anything else, and for more than a few words."""
    try:
        return decode(objects.get(key, _SAID))
    except DamagedError as error:
        logger.warning("%s is passed over: %s", key, error)
        return {}


def claim(objects: Objects, state: State, island: str) -> Claim | None:
    """Try to take the fence after the state's highest; None where another was faster. Raises StoreError."""
    fence = max(state.fence, 0) + 1
    if fence > keys.MAX_FENCE:
        raise ArchipelError(f"job {state.name} was claimed {state.fence} times: something is wrong with this run")
    nonce = os.urandom(16).hex()
    value = {"format": FORMAT, "name": state.name, "fence": fence, "nonce": nonce, "island": island}
    if not objects.create(keys.claim(state.name, fence), encode(value)):
        return None
    return Claim(state.name, fence, nonce, island, state.opening)


class Watcher:
    """Tells which jobs may be taken: their holder released them or stood still for a lease on this watcher's clock.

    An outage of the store, or a sleep of the watcher's own, changes nothing: the heartbeat that is read afterwards has
    moved or has not, and a holder that was cut off for a lease gives up by itself.
    """

    def __init__(self, lease: float, now: Callable[[], float] = clock) -> None:
        self.lease, self._now = lease, now
        self._seen: dict[str, tuple[tuple[int, Any], float]] = {}

    def free(self, state: State) -> bool:
        """Note what the state shows, and say whether the job may be claimed now."""
        if state.done:
            self._seen.pop(state.name, None)
            return False
        if state.released:
            return True
        mark, now = (state.fence, state.heartbeat.get("counter")), self._now()
        before = self._seen.get(state.name)
        if before is None or before[0] != mark:
            self._seen[state.name] = (mark, now)
            return False
        return now - before[1] >= self.lease

    def still(self, name: str) -> float:
        """Seconds for which the job's holder was seen standing still."""
        return self._now() - self._seen[name][1] if name in self._seen else 0.0


class Holder:
    """A held job's heartbeat, moved by a thread of its own through a connection of its own.

    ``facts()`` is asked for what others may see (step, loss). ``on_lost()`` is called once, from the thread, where the
    lease ran out before it could be renewed, or a higher fence was seen after such trouble. Use as a context.
    """

    def __init__(
        self,
        objects: Objects,
        claim: Claim,
        *,
        every: float,
        lease: float,
        facts: Callable[[], Mapping[str, Any]] = dict,
        on_lost: Callable[[str], None] = lambda reason: None,
        now: Callable[[], float] = clock,
    ) -> None:
        self.claim, self.every, self.lease = claim, every, lease
        self._objects, self._facts, self._on_lost, self._now = objects, facts, on_lost, now
        self._renewed = now()  # just before the last renewal was sent: no observer's lease counts from earlier
        self._counter = 0
        self._lost: str | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {claim.name}", daemon=True)

    def __enter__(self) -> Holder:
        try:
            self._beat(WORKING)
        except (Stopped, KeyboardInterrupt):  # not cut short by the stop: others would wait for a lease
            self._objects.give_up = lambda: False
            with contextlib.suppress(Exception):
                self._beat(RELEASED)
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop beating. The job is given back at once where it was not committed and is still ours."""
        self._stop.set()
        self._thread.join()
        if self.lost is None:
            self._objects.give_up = lambda: False  # not cut short by the stop that brings us here
            with contextlib.suppress(Exception):  # others will find out by the lease
                self._beat(DONE if kind is None else RELEASED)

    @property
    def lost(self) -> str | None:
        """Why this attempt may commit nothing, or None while the lease holds."""
        if self._lost is None and self._now() - self._renewed >= self.lease:
            self._lose(f"its lease of {self.lease:.0f} s ran out before it could be renewed")
        return self._lost

    def check(self) -> None:
        """Before anything final, and after any trouble: raise LostError unless the job is certainly still ours."""
        if self.lost is None:
            fences = {keys.fence_of(entry.key) for entry in self._objects.list(keys.claims(self.claim.name))}
            highest = chain({fence for fence in fences if fence is not None})
            if highest > self.claim.fence:
                self._lose(f"it was claimed again (fence {highest})")
        if (reason := self.lost) is not None:
            raise LostError(f"job {self.claim.name}, fence {self.claim.fence}: {reason}; this attempt commits nothing")

    def commit(self, value: Mapping[str, Any]) -> bool:
        """Make this attempt's result the job's, by one create. False: another result was there first, and stays.

        Raises LostError where the lease is over or the job has a higher fence.
        """
        self.check()
        c = self.claim
        body = {"format": FORMAT, "name": c.name, "fence": c.fence, "nonce": c.nonce, "island": c.island, **value}
        return self._objects.create(keys.committed(c.name, c.opening), encode(body))

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = reason
        self._on_lost(reason)

    def _beat(self, state: str) -> None:
        c, sent = self.claim, self._now()
        value = {
            "format": FORMAT,
            "counter": self._counter,
            "state": state,
            "island": c.island,
            "nonce": c.nonce,
            **self._facts(),
        }
        self._objects.put(keys.heartbeat(c.name, c.fence), encode(value))
        self._counter += 1
        # A holder that overslept, in the middle of this very request too, must not take its own late beat for a renewal.
        if self._now() - self._renewed < self.lease:
            self._renewed = sent

    def _run(self) -> None:
        try:
            self._beats()
        except BaseException as error:  # a holder that nobody sees alive any more must not go on for hours
            logger.exception("job %s: the heartbeat ended", self.claim.name)
            self._lose(f"its heartbeat ended ({error!r})")

    def _beats(self) -> None:
        trouble = False
        while not self._stop.wait(self.every):
            if self.lost is not None:
                return
            try:
                self._beat(WORKING)
                if trouble:
                    self.check()
                    trouble = False
            except LostError:
                return
            except Exception as error:  # the store is away, or says no: the lease decides
                trouble = True
                logger.warning("job %s: heartbeat: %s", self.claim.name, error)
                say(f"job {self.claim.name}: the heartbeat did not go through ({error})")
