"""SIGSTOP past the lease, SIGCONT after a successor took over: at random moments, and in the middle of a commit."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from archipel.islands import keys
from archipel.run import Run
from faults.common import Record, Store, stores
from faults.islands import Zygote, check, holds, kill_all, opened, zygote_for
from faults.kills import publish, undisturbed
from faults.proxied import finish, through
from faults.proxy import Proxy, Rule
from faults.runs import make_run

LEASE = 6.0
JOB = "0"
RANDOM, BEFORE, AFTER = "at a random moment", "its commit on the way to the store", "its commit done, the answer lost"


class Gate(Proxy):
    """A proxy that holds the first request to write ``keys`` until it is let through: it makes a moment certain."""

    def __init__(self, upstream: str, rules: Iterable[Rule], key: str) -> None:
        super().__init__(upstream, rules)
        self.key, self.reached, self.opened = key, threading.Event(), threading.Event()

    def choose(self, method: str, path: str) -> Rule | None:
        if method == "PUT" and path.endswith(self.key) and not self.reached.is_set():
            self.reached.set()
            self.opened.wait(180)
        return super().choose(method, path)


def _sleep(record: Record, zygote: Zygote, where: Store, mode: str, seed: int, work: Path) -> dict[str, Any]:
    """One island stopped as ``mode`` says and woken again, another beside it. What happened to whom."""
    chance = random.Random(seed)
    rules = [Rule("lose", 1.0, ("PUT",), keys="committed", first=1)] if mode == AFTER else []
    words = ("join", where.url, "--only", JOB, "--threads", 1, "--work")
    case = f"stopped {mode} (seed {seed})"
    gate = Gate(where.endpoint, rules, keys.committed(JOB)) if where.endpoint else None
    if gate is not None:
        gate.__enter__()
        if mode == RANDOM:
            gate.reached.set()
    processes = []
    try:
        first = zygote.start(*words, work / f"{seed}-a", more=through(where, gate) if gate else where.environment)
        processes.append(first)
        if not holds(where, [JOB], 90):
            raise RuntimeError(f"{case}: the island took no job: {first.said}")
        second = zygote.start(*words, work / f"{seed}-b", more=where.environment)
        processes.append(second)
        if mode == RANDOM:
            time.sleep(chance.uniform(0, 3))
        elif gate is None or not gate.reached.wait(180):
            raise RuntimeError(f"{case}: no commit came: {first.said}")
        first.send(signal.SIGSTOP)
        if mode == AFTER:
            assert gate is not None
            gate.opened.set()  # the store has it; the island sleeps and will never get this answer
            time.sleep(LEASE + 4)
        else:
            taken = holds(where, [JOB], 90, fence=2)  # None where it had finished before it was stopped
            wait_for_end = mode == BEFORE or chance.random() < 0.5
            if taken and wait_for_end and second.wait(120) is None:
                record.problem(f"{case}: the successor does not end: {second.said[-500:]}")
        if gate is not None:
            gate.opened.set()
        first.send(signal.SIGCONT)
        finish(record, case, processes, 120)
        said = first.said
    finally:
        kill_all(processes)
        if gate is not None:
            gate.opened.set()
            gate.__exit__(None, None, None)
    state = opened(where).state(JOB)
    return {"fence": state.committed.get("fence"), "claims": state.fence, "said": said}


def _one(record: Record, zygote: Zygote, run: Run, wanted: dict[str, str], mode: str, seed: int, work: Path) -> None:
    kind = "s3" if mode != RANDOM or seed % 2 else "file"
    with stores(kind, work) as where:
        publish(run, zygote, where)
        got = _sleep(record, zygote, where, mode, seed, work)
        case = f"stopped {mode} (seed {seed})"
        finish_rest = zygote.start(
            "join", where.url, "--threads", 1, "--work", work / f"{seed}-c", more=where.environment
        )
        finish(record, case, [finish_rest])
        good = check(record, zygote, where, wanted, case)
    taken_over = got["claims"] > 1
    says = any(word in got["said"] for word in ("commits nothing", "left to others", "stays"))
    if taken_over and got["fence"] != 1 and not says:
        record.problem(f"{case}: the woken island does not say that it lost: {got['said'][-600:]}")
    if mode == BEFORE and (not taken_over or got["fence"] == 1):
        record.problem(f"{case}: the commit that was held was to lose: fence {got['fence']} of {got['claims']}")
    if mode == AFTER and got["fence"] != 1:
        record.problem(f"{case}: the commit that was done was to stay: fence {got['fence']}")
    record.made += 1
    record.rows.append(
        {
            "stopped": mode,
            "store": kind,
            "taken over": taken_over,
            "committed by": "the successor" if got["fence"] != 1 else "the woken island",
            "results": 1,
            "weights": "identical" if good else "**differ**",
        }
    )
    for letter in "abc":
        shutil.rmtree(work / f"{seed}-{letter}", ignore_errors=True)


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` sleeps, two at a time; a third at random moments, the rest around the commit."""
    what, work = "islands stopped (SIGSTOP) past their lease and woken after a successor took over", work / "stopped"
    with Record("stopped", what, count, seed) as record, zygote_for(work) as zygote:
        made = make_run(
            work / "run", steps=300 if count > 4 else 80, every=10, others=60 if count > 4 else 20, lease=LEASE
        )
        wanted = undisturbed(made, zygote, work)
        modes = [RANDOM, BEFORE, AFTER]

        def one(number: int) -> None:
            try:
                _one(record, zygote, made, wanted, modes[number % 3], seed + number, work)
            except Exception as error:
                record.problem(f"{modes[number % 3]}: {type(error).__name__}: {error}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, range(count)))
        record.rows = _summed(record.rows)
        record.facts = {"lease, s": LEASE}
    return record.value


def _summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal rows once, with how often."""
    found: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = tuple(row.items())
        found[key] = found.get(key, 0) + 1
    return [dict(key) | {"times": times} for key, times in sorted(found.items(), key=str)]
