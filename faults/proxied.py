"""`join` through a proxy that makes a store's worst answers, and on a store that is gone for a while."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from faults.common import Record, Store, stores
from faults.islands import Process, Zygote, check, holds, kill_all, refusals, zygote_for
from faults.kills import publish, undisturbed
from faults.proxy import Proxy, Rule, rough
from faults.runs import make_run

LEASE = 10.0
WEATHER: dict[str, list[Rule]] = {
    "500 and 503": [Rule("status", 0.15, status=500), Rule("status", 0.15, status=503)],
    "409 to writes": [Rule("status", 0.3, ("PUT",), status=409)],
    "429": [Rule("status", 0.3, status=429)],
    "slow: 1 s": [Rule("slow", 0.2, seconds=1.0)],
    "answers to writes lost": [Rule("lose", 0.3, ("PUT",)), Rule("status-after", 0.1, ("PUT",), status=500)],
    "connections reset, answers cut": [Rule("drop", 0.1), Rule("cut", 0.15)],
    "everything at once": rough(0.05),
}
GONE = {"gone for 5 s, shorter than the lease": 5.0, "gone for 30 s, longer than the lease": 30.0}


def through(where: Store, proxy: Proxy) -> dict[str, str]:
    """A store's environment with a proxy in front of it."""
    return where.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}


def finish(record: Record, case: str, processes: list[Process], seconds: float = 240) -> bool:
    """Wait for islands to end with 0; else a problem."""
    until, good = time.monotonic() + seconds, True
    for process in processes:
        code = process.wait(max(0.1, until - time.monotonic()))
        refusals(record, process.said)
        if code != 0:
            good = False
            record.problem(f"{case}: an island ended with {code}: {process.said[-600:]}")
    return good


def _one(record: Record, zygote: Zygote, case: str, seed: int, work: Path, run: Any, wanted: dict[str, str]) -> None:
    """Two islands in one weather, to the end."""
    began = time.monotonic()
    with stores("s3", work) as where:
        publish(run, zygote, where)
        with Proxy(where.endpoint, WEATHER.get(case, []), seed=seed) as proxy:
            more = through(where, proxy)
            folders = [work / f"{seed}-{number}" for number in range(2)]
            words = ("join", where.url, "--threads", 1, "--work")
            processes = [zygote.start(*words, folder, more=more) for folder in folders]
            try:
                if case in GONE:
                    if holds(where, ["0", "1", "monolith"], 60):
                        time.sleep(random.Random(seed).uniform(0, 2))
                        proxy.gone(GONE[case]).join()
                    else:
                        record.problem(f"{case}: no island took a job within a minute")
                finish(record, case, processes)
            finally:
                kill_all(processes)
            counts = dict(proxy.counts)
        good = check(record, zygote, where, wanted, case)
    requests = counts.pop("requests", 0)
    record.made += 1
    record.rows.append(
        {
            "store's behaviour": case,
            "requests": requests,
            "faults made": sum(counts.values()),
            "weights": "identical" if good else "**differ**",
            "seconds": round(time.monotonic() - began, 1),
        }
    )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` joins of two islands each, the kinds of weather in turn; the last two are the store gone."""
    what, work = "joins of two islands through a proxy that fails, or on a store that is gone", work / "proxied"
    steps = 300 if count > 4 else 60
    with Record("proxied", what, count, seed) as record, zygote_for(work) as zygote:
        made = make_run(work / "run", steps=steps, every=10, lease=LEASE)
        wanted = undisturbed(made, zygote, work)
        cases = [*WEATHER, *GONE] if count >= len(WEATHER) + len(GONE) else ["everything at once", *reversed(GONE)]
        for number in range(count):
            _one(record, zygote, cases[number % len(cases)], seed + number, work, made, wanted)
        record.facts = {"lease, s": LEASE, "faults made": sum(row["faults made"] for row in record.rows)}
    return record.value
