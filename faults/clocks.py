"""Islands whose clocks are a day apart: a library in front of the C library's shifts the wall clock of a process.

Clocks that do not tell the time of day go on as they are, as on a machine whose date is wrong. Needs a C compiler.
"""

from __future__ import annotations

import ctypes.util
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from archipel.run import Run
from faults.common import Record, Store, environment, stores
from faults.islands import Zygote, check, holds, kill_all, opened, zygote_for
from faults.kills import publish, undisturbed
from faults.proxied import finish
from faults.runs import make_run

DAY = 86400
LEASE = 6.0
JOB = "0"
SHIFT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long apart(void) { const char *text = getenv("CLOCK_APART"); return text ? atol(text) : 0; }

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += apart();
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def build(work: Path) -> Path:
    """The library. Raises RuntimeError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or ctypes.util.find_library("c") is None:
        raise RuntimeError("clocks: a C compiler is needed (Debian: gcc and libc6-dev)")
    work.mkdir(parents=True, exist_ok=True)
    source, library = work / "shift.c", work / "shift.so"
    source.write_text(SHIFT, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def apart(library: Path, days: float) -> dict[str, str]:
    """The environment of a process whose wall clock is so many days ahead."""
    return {"LD_PRELOAD": str(library), "CLOCK_APART": str(round(days * DAY))}


def shown(library: Path, days: float) -> dict[str, float]:
    """How far a process's clocks are from ours, in seconds: proof that the shift works, and of what it leaves alone."""
    script = (
        "import json,time;print(json.dumps([time.time(),time.monotonic(),time.clock_gettime(time.CLOCK_BOOTTIME)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(apart(library, days)),
        capture_output=True,
        text=True,
        check=True,
    )
    ours = [time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)]
    names = ("time of day", "monotonic", "boot time")
    return {name: round(theirs - own) for name, theirs, own in zip(names, json.loads(done.stdout), ours, strict=True)}


def _pair(
    zygote: Zygote, where: Store, library: Path, days: tuple[int, int], work: Path, record: Record
) -> dict[str, Any]:
    """A holder is killed and another, whose clock is elsewhere, takes over: after a lease of watching, not sooner."""
    case = f"clocks {days[0]:+d} and {days[1]:+d} days"
    words = ("join", where.url, "--only", JOB, "--threads", 1, "--work")
    processes = []
    try:
        holder = zygote.start(*words, work / "a", more=where.environment | apart(library, days[0]), plain=True)
        processes.append(holder)
        if not holds(where, [JOB], 120, step=1):
            raise RuntimeError(f"{case}: no job was taken: {holder.said}")
        bucket, began = opened(where), time.monotonic()
        watcher = zygote.start(*words, work / "b", more=where.environment | apart(library, days[1]), plain=True)
        processes.append(watcher)
        while (
            "waiting" not in (log := _log(work / "b")) and watcher.wait(0.05) is None and time.monotonic() < began + 120
        ):
            pass
        looked, fence = time.monotonic(), bucket.state(JOB).fence
        if "waiting" not in log or fence != 1:
            record.problem(f"{case}: a living holder was not waited for (fence {fence}): {watcher.said}")
        time.sleep(1)
        holder.kill()
        killed = time.monotonic()
        if not holds(where, [JOB], 120, fence=2):
            record.problem(f"{case}: a dead holder was not taken over: {watcher.said}")
        waited, seen = time.monotonic() - killed, time.monotonic() - looked
        third = zygote.start(*words, work / "c", more=where.environment | apart(library, -days[1] or 1), plain=True)
        processes.append(third)
        code, said = zygote.run("status", where.url, "--json", more=where.environment | apart(library, 0))
        ages = [row["last_seen_s"] for row in json.loads(said[said.index("{") :])["jobs"] if row["name"] == JOB]
        if code != 0 or not ages or ages[0] is None or not 0 <= ages[0] < 600:
            record.problem(f"{case}: status shows an age of {ages}")
        finish(record, case, [watcher, third])
    finally:
        kill_all(processes)
    if waited < LEASE - 2.5 or seen < LEASE - 0.5:  # the last beat is at most one heartbeat, 2 s, before the kill
        record.problem(f"{case}: taken over {waited:.1f} s after the death, a lease is {LEASE:.0f} s")
    state = opened(where).state(JOB)
    if state.fence != 2:
        record.problem(f"{case}: {state.fence} claims, 2 were due")
    return {
        "clocks, days": f"{days[0]:+d}, {days[1]:+d}",
        "taken over after, s": round(waited, 1),
        "claims": state.fence,
    }


def _log(folder: Path) -> str:
    path = folder / "logs" / "join.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _one(
    record: Record, zygote: Zygote, run: Run, wanted: dict[str, str], library: Path, number: int, work: Path
) -> None:
    days = PAIRS[number % len(PAIRS)]
    folder = work / f"pair-{number}"
    with stores(("file", "s3")[number % 2], work) as where:
        publish(run, zygote, where)
        row = _pair(zygote, where, library, days, folder, record)
        rest = zygote.start("join", where.url, "--threads", 1, "--work", folder / "d", more=where.environment)
        finish(record, row["clocks, days"], [rest])
        good = check(record, zygote, where, wanted, f"clocks {row['clocks, days']}")
        record.made += 1
        record.rows.append({**row, "store": where.kind, "weights": "identical" if good else "**differ**"})
    shutil.rmtree(folder, ignore_errors=True)


PAIRS = [(1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (0, 0)]


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` takeovers between islands whose clocks are up to two days apart, two at a time."""
    what, work = "takeovers between islands whose clocks are a day or two apart", work / "clocks"
    with Record("clocks", what, count, seed) as record, zygote_for(work) as zygote:
        library = build(work)
        record.facts = {"a process a day ahead, s from ours": shown(library, 1), "lease, s": LEASE}
        made = make_run(work / "run", steps=1200, every=50, others=60, lease=LEASE)
        wanted = undisturbed(made, zygote, work)

        def one(number: int) -> None:
            try:
                _one(record, zygote, made, wanted, library, number, work)
            except Exception as error:
                record.problem(f"{PAIRS[number % len(PAIRS)]}: {type(error).__name__}: {error}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, range(count)))
    return record.value
