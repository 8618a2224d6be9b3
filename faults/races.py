"""Claim races: 32 long-lived light processes go for one fence at a barrier; exactly one may win, and all must know who."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from archipel.islands.claims import read_state
from faults import raw
from faults.common import Record, Store, environment, open_store, stores

RACERS = 32
CHAIN = 25  # fences that are raced for in one job before the next job begins
LEAD = 0.02  # seconds between telling the racers and the moment at which all claim


class Racers:
    """The processes, on one store. Use as a context."""

    def __init__(self, url: str, more: dict[str, str], count: int = RACERS) -> None:
        command = [sys.executable, "-m", "faults.racer", url]
        self.processes = [
            subprocess.Popen(
                [*command, f"racer-{number}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(more),
            )
            for number in range(count)
        ]
        self.heavy: set[str] = set()

    def __enter__(self) -> Racers:
        for process in self.processes:
            self.heavy |= set(self._line(process)["heavy"])
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a racer ended by itself with {process.wait()}")
        return dict(json.loads(line))

    def race(self, job: str, fence: int, order: list[int]) -> list[dict[str, Any]]:
        """All go for one fence at one moment; their answers."""
        moment = time.monotonic() + LEAD
        for number in order:
            file = self.processes[number].stdin
            assert file is not None
            file.write(f"{job} {fence} {moment!r}\n")
            file.flush()
        return [self._line(process) for process in self.processes]


def _job(number: int) -> tuple[str, int]:
    return f"j{number // CHAIN}", number % CHAIN + 1


def _on(record: Record, where: Store, count: int, seed: int) -> None:
    """``count`` races on one store, and what they came to."""
    kind, chance, began = where.kind, random.Random(seed), time.monotonic()
    one = several = none = disagree = errors = late = 0
    with Racers(where.url, where.environment) as racers:
        if racers.heavy:
            record.problem(f"{kind}: racers imported {', '.join(sorted(racers.heavy))}")
        for number in range(count):
            job, fence = _job(number)
            order = list(range(RACERS))
            chance.shuffle(order)
            answers = racers.race(job, fence, order)
            failed = [answer["error"] for answer in answers if "error" in answer]
            errors += len(failed)
            for error in failed[:3]:
                record.problem(f"{kind}, {job} fence {fence}: {error}")
            winners = {answer["nonce"] for answer in answers if answer.get("won")}
            one, several, none = one + (len(winners) == 1), several + (len(winners) > 1), none + (not winners)
            disagree += sum(answer.get("holder") not in winners for answer in answers if "error" not in answer)
            late += sum(answer.get("late", 0) > 0.05 for answer in answers)
    seconds = time.monotonic() - began
    store = open_store(where)
    fences = [read_state(store, f"j{n}").fence for n in range((count + CHAIN - 1) // CHAIN)]
    if sum(fences) != count:
        record.problem(f"{kind}: {count} races, but the chains of claims hold {sum(fences)}")
    row: dict[str, Any] = {
        "store": kind,
        "races": count,
        "racers": RACERS,
        "one winner": one,
        "several": several,
        "none": none,
        "losers who did not know the winner": disagree,
        "errors": errors,
        "answers of racers more than 50 ms late": late,
        "seconds": round(seconds, 1),
    }
    if where.endpoint and (several or none):  # before anybody is blamed: the same by plain HTTP
        row["raw HTTP"] = raw.races(where.endpoint, "raw", 100, RACERS)
    record.rows.append(row)
    record.made += count
    if several or none or disagree:
        record.problem(f"{kind}: {several} races with several winners, {none} with none, {disagree} wrong losers")


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` races on a local folder and as many on S3 (moto with atomic writes)."""
    what = f"{RACERS} processes claim one fence at a barrier, on a folder and on S3"
    with Record("races", what, count * 2, seed) as record:
        for number, kind in enumerate(("file", "s3")):
            with stores(kind, work / "races") as store:
                _on(record, store, count, seed + number)
                if kind == "s3":
                    server = raw.races(store.endpoint, store.bucket, max(20, count // 10), RACERS)
                    record.facts["the same server by raw HTTP"] = server
    return record.value
