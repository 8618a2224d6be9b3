"""An island whose network goes away past its lease: another takes over, and the first commits nothing."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from faults.common import Record, stores
from faults.islands import Zygote, check, holds, kill_all, opened, zygote_for
from faults.kills import publish, undisturbed
from faults.proxied import finish, through
from faults.proxy import Proxy
from faults.runs import make_run

LEASE = 6.0
JOB = "0"


def _cut(record: Record, zygote: Zygote, work: Path, run: Any, wanted: dict[str, str], seed: int) -> None:
    case, folder, chance = f"network gone (seed {seed})", work / f"cut-{seed}", random.Random(seed)
    with stores("s3", work) as where:
        publish(run, zygote, where)
        words = ("join", where.url, "--threads", 1, "--work")
        processes = []
        with Proxy(where.endpoint) as proxy:
            try:
                first = zygote.start(*words, folder / "a", "--only", JOB, more=through(where, proxy))
                processes.append(first)
                if not holds(where, [JOB], 90):
                    raise RuntimeError(f"{case}: no job was taken: {first.said}")
                time.sleep(chance.uniform(0, 1.5))
                proxy.leave()
                second = zygote.start(*words, folder / "b", more=where.environment)
                processes.append(second)
                taken = holds(where, [JOB], 120, fence=2)
                if not taken:
                    record.problem(f"{case}: nobody took over: {second.said}")
                if chance.random() < 0.5:
                    second.wait(120)
                proxy.come_back()
                finish(record, case, processes)
            finally:
                kill_all(processes)
        fence = opened(where).state(JOB).committed.get("fence")
        good = check(record, zygote, where, wanted, case)
        if fence == 1:
            record.problem(f"{case}: an island without a network committed: {first.said[-600:]}")
        if not any(word in first.said for word in ("commits nothing", "left to others", "stays")):
            record.problem(f"{case}: the island does not say that it lost its job: {first.said[-600:]}")
    record.made += 1
    record.rows.append(
        {
            "seed": seed,
            "committed by": f"attempt {fence}",
            "results": 1,
            "weights": "identical" if good else "**differ**",
        }
    )
    shutil.rmtree(folder, ignore_errors=True)


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` islands cut off from the store past their lease."""
    what, work = "islands cut off from the store past their lease, in the middle of a job", work / "network"
    with Record("network", what, count, seed) as record, zygote_for(work) as zygote:
        made = make_run(
            work / "run", steps=300 if count > 1 else 120, every=20, others=60 if count > 1 else 20, lease=LEASE
        )
        wanted = undisturbed(made, zygote, work)
        for number in range(count):
            _cut(record, zygote, work, made, wanted, seed + number)
        record.facts = {"lease, s": LEASE}
    return record.value
