"""Who holds what: the state of every job of a published run, as the store tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel import FORMAT
from archipel.islands import keys
from archipel.islands.bucket import Bucket
from archipel.islands.claims import State
from archipel.islands.launch.local import steps_of


def status(bucket: Bucket) -> dict[str, Any]:
    """A JSON-able summary: per job name, state (free, claimed, done, refused), holder, fence, step, steps, loss, speed,
    seconds left, age of the last sign of life. Ages are for display: the store's time minus the store's timestamp, null
    where its time cannot be had. Raises StoreError.
    """
    now = bucket.objects.now()
    admitted = {e.key for e in bucket.objects.list(keys.ADMITTED)}
    refused = {e.key for e in bucket.objects.list("refused")}
    rows = []
    for name in bucket.jobs:
        state = bucket.state(name)
        rows.append(_row(state, steps_of(bucket, name), now, refused) | {"admitted": keys.admitted(name) in admitted})
    return {"format": FORMAT, "run": bucket.id, "url": bucket.url, "jobs": rows}


def _row(state: State, steps: int, now: float | None, refused: set[str]) -> dict[str, Any]:
    beat = state.heartbeat
    fence = _number(state.committed.get("fence")) if state.done else state.fence
    step, speed, loss = _number(beat.get("step")) or 0, _number(beat.get("steps_per_s")), _number(beat.get("loss"))
    kind = "done" if state.done else "free" if state.released else "claimed"
    if kind == "done" and keys.refused(state.name, int(fence or 0)) in refused:
        kind = "refused"
    step = steps if kind == "done" else min(max(int(step), 0), steps)
    return {
        "name": state.name,
        "state": kind,
        "holder": _holder(state) if kind != "free" else None,
        "fence": int(fence or 0),
        "step": step,
        "steps": steps,
        "loss": loss,
        "steps_per_s": speed,
        "left_s": _left(steps - step, speed) if kind == "claimed" else None,
        "last_seen_s": None if now is None or state.seen is None else round(max(0.0, now - state.seen), 3),
    }


def _holder(state: State) -> str | None:
    """The name that the island gave itself: a stranger's text, so only what is safe to print."""
    source: Mapping[str, Any] = state.committed if state.done else state.claim
    name = source.get("island")
    if not isinstance(name, str):
        return None
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-_"))[:64] or None


def _left(steps: int, speed: float | None) -> float | None:
    """Seconds; None where the speed is none that a training has: what follows would be no number, or no time."""
    return round(steps / speed, 1) if speed is not None and speed >= 1e-6 else None


def _number(value: Any) -> float | int | None:
    """A finite number of a stranger's JSON, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if good else None
