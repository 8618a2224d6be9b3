"""kill -9 at random moments across three islands, until so many were made: every run ends whole, with the same bytes."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel.run import Run
from faults.common import Record, Store, open_store, stores
from faults.islands import Process, Zygote, check, kill_all, refusals, weights, zygote_for
from faults.runs import make_run

ISLANDS = 3
LIFE = 20.0  # seconds: moments of death are uniform in 0..LIFE after the start
ROUND = 600.0  # seconds after which a round is given up as stuck
FENCE = re.compile(r"job (\w+): fence (\d+) is ours")
GOES_ON = re.compile(r"(\w+) continues at step (\d+)")
MANIFEST = re.compile(r"jobs/(\w+)/(\d{8})/checkpoints/(\d{8})/manifest\.json")


def phase(said: str) -> str:
    """What an island was doing when it was killed, by its last words."""
    for line in reversed(said.splitlines()):
        if re.match(r"train \w+: (\d+)/\1 in", line):
            return "sending its result"
        if " works on job " in line or line.startswith(("fetch shard", "train ")):
            return "holding a job"
        if " is done " in line or "committed first" in line or "taking over" in line:
            return "between jobs"
    return "starting or waiting"


def undisturbed(run: Run, zygote: Zygote, work: Path) -> dict[str, str]:
    """Job -> sha256 of the weights that one island, left alone, makes of the run."""
    with stores("file", work) as where:
        publish(run, zygote, where)
        code, said = zygote.run("join", where.url, "--threads", 1, "--work", work / "alone", more=where.environment)
        if code != 0:
            raise RuntimeError(f"an undisturbed island ends with {code}: {said}")
        return weights(where)


def publish(run: Run, zygote: Zygote, where: Store) -> None:
    code, said = zygote.run("publish", run.root, where.url, more=where.environment)
    if code != 0:
        raise RuntimeError(f"publish ends with {code}: {said}")


@dataclass
class Island:
    """One of the three places, which always has an island until a round is over."""

    number: int
    folder: Path
    process: Process
    dies: float


class Round:
    """One run made under fire, on one store."""

    def __init__(self, record: Record, zygote: Zygote, where: Store, chance: random.Random, work: Path, wanted: int):
        self.record, self.zygote, self.where, self.chance, self.work = record, zygote, where, chance, work
        self.wanted, self.kills, self.islands_made = wanted, 0, 0
        self.phases: Counter[str] = Counter()
        self.folders: list[Path] = []

    def _start(self, number: int, folder: Path | None = None) -> Island:
        self.islands_made += 1
        if folder is None:  # a new machine; else the old one, started again
            folder = self.work / f"island-{self.islands_made:03d}"
            self.folders.append(folder)
        plain = self.chance.random() < 0.1
        words = ("join", self.where.url, "--threads", 1, "--work", folder)
        process = self.zygote.start(*words, more=self.where.environment, plain=plain)
        return Island(number, folder, process, time.monotonic() + self.chance.uniform(0, LIFE) + (5 if plain else 0))

    def run(self) -> bool:
        """True where it came to its end."""
        islands = [self._start(number) for number in range(ISLANDS)]
        until, left = time.monotonic() + ROUND, set(range(ISLANDS))
        try:
            while left:
                time.sleep(0.02)
                if time.monotonic() > until:
                    self.record.problem(f"a round on {self.where.kind} did not end in {ROUND:.0f} s")
                    return False
                for number in sorted(left):
                    island = islands[number]
                    code = island.process.wait(0)
                    if code is not None:
                        left.discard(number)
                        refusals(self.record, island.process.said)
                        if code != 0:
                            self.record.problem(f"an island ended with {code}: {island.process.said[-500:]}")
                    elif self.kills < self.wanted and time.monotonic() >= island.dies:
                        islands[number] = self._kill(island)
        finally:
            kill_all([island.process for island in islands])
        return True

    def _kill(self, island: Island) -> Island:
        code = island.process.kill()
        said = island.process.said
        refusals(self.record, said)
        if code == -9:
            self.kills += 1
            self.phases[phase(said)] += 1
        elif code != 0:
            self.record.problem(f"an island ended with {code}: {said[-500:]}")
        again = self.chance.random() < 0.5
        return self._start(island.number, island.folder if again else None)

    def lost(self) -> tuple[int, int]:
        """(takeovers that went on from a checkpoint, takeovers that lost accepted work): the latter are problems.

        Accepted is what has its manifest in the store; each later attempt must go on from there or from further on.
        """
        found = [MANIFEST.fullmatch(entry.key) for entry in open_store(self.where).list("jobs")]
        sent: dict[tuple[str, int], list[int]] = {}
        for match in found:
            if match:
                sent.setdefault((match[1], int(match[2])), []).append(int(match[3]))
        best = {key: max([0, *(max(s) for k, s in sent.items() if k[0] == key[0] and k[1] < key[1])]) for key in sent}
        went_on = bad = 0
        for (name, fence), steps in sent.items():
            if min(steps) <= best[name, fence]:
                bad += 1
                self.record.problem(f"job {name}, attempt {fence} began below step {best[name, fence]}: {min(steps)}")
        for folder in self.folders:
            log = folder / "logs" / "join.log"
            held = ("", 0)
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
                if match := FENCE.search(line):
                    held = (match[1], int(match[2]))
                elif (match := GOES_ON.search(line)) and match[1] == held[0]:
                    went_on += 1
                    before = max([0, *(max(s) for k, s in sent.items() if k[0] == held[0] and k[1] < held[1])])
                    if int(match[2]) < before:
                        bad += 1
                        self.record.problem(
                            f"job {held[0]}, attempt {held[1]} went on at {match[2]}, {before} was sent"
                        )
        return went_on, bad


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` kills; rounds alternate between a folder and S3."""
    chance = random.Random(seed)
    what = f"kill -9 at random moments across {ISLANDS} islands, on a folder and on S3"
    steps, every = (800, 25) if count >= 50 else (100, 10)
    work = work / "kills"
    with Record("kills", what, count, seed) as record, zygote_for(work) as zygote:
        run = make_run(work / "run", steps=steps, every=every, lease=6.0)
        wanted = undisturbed(run, zygote, work)
        number = 0
        while record.made < count and len(record.problems) < 10:
            with stores(("file", "s3")[number % 2], work) as where:
                publish(run, zygote, where)
                began = time.monotonic()
                folder = work / f"round-{number}"
                one = Round(record, zygote, where, chance, folder, count - record.made)
                whole = one.run()
                good = whole and check(record, zygote, where, wanted, f"round {number} on {where.kind}")
                went_on, lost = one.lost()
                record.made += one.kills
                record.rows.append(
                    {
                        "store": where.kind,
                        "kills": one.kills,
                        **{f"killed while {key}": one.phases[key] for key in PHASES},
                        "islands": one.islands_made,
                        "went on from a checkpoint": went_on,
                        "accepted work lost": lost,
                        "weights": "identical" if good else "**differ**",
                        "seconds": round(time.monotonic() - began, 1),
                    }
                )
                shutil.rmtree(folder, ignore_errors=True)
            number += 1
        record.rows = by_store(record.rows)
        record.facts = {"steps of a job": steps, "a checkpoint every": every, "lease, s": 6, "jobs": len(wanted)}
    return record.value


def by_store(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all rounds on one store."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        total = found.setdefault(row["store"], {"store": row["store"], "runs": 0})
        total["runs"] += 1
        for key, value in row.items():
            if isinstance(value, int | float):
                total[key] = round(total.get(key, 0) + value, 1)
        worst = {total.get("weights", "identical"), row["weights"]} - {"identical"}
        total["weights"] = "**differ**" if worst else "identical"
    return list(found.values())


PHASES = ("holding a job", "sending its result", "between jobs", "starting or waiting")
