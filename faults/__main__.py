"""All faults, one after the other: what was made, what came of it.

    python -m faults [--share 0.05] [--only races,kills,...] [--seed N] [--out FILE.json] [--docs docs/reliability]

With --docs, writes DOCS/<date>.json, keeping what it holds of other faults, and renews the tables of DOCS.md.
Ends with 1 where anything went wrong. All that it starts ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from bench.common import commit, load_beyond_ours, machine

from archipel import store
from faults import page
from faults.islands import sharing

FULL = {
    "races": 1000,  # on each of two stores
    "kills": 200,
    "damage": 500,
    "proxied": 18,
    "stopped": 18,
    "network": 6,
    "disk": 10,
    "clocks": 8,
}
LEAST = {"proxied": 3, "stopped": 3, "disk": 2, "clocks": 2}  # fewer would leave out a kind


def count_of(name: str, share: float) -> int:
    return max(LEAST.get(name, 1), math.ceil(FULL[name] * share))


def one(name: str, share: float, seed: int, work: Path) -> dict[str, Any]:
    """One fault's record, with the machine it was made on."""
    count = count_of(name, share)
    print(f"{name}: {count} (seed {seed}) ...", file=sys.stderr, flush=True)
    load = load_beyond_ours()
    record: dict[str, Any] = importlib.import_module(f"faults.{name}").run(count, seed, work)
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine(("obstore", "torch"))}
    said = "ok" if record["ok"] else f"NOT OK: {record['problems'][:3]}"
    print(f"{name}: {record['made']} in {record['seconds']:.0f} s: {said}", file=sys.stderr, flush=True)
    return {**record, **facts, "share": share, "load beyond ours before": round(load, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts, in (0, 1]")
    parser.add_argument("--only", default=",".join(FULL), help="comma-separated names")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where all records go as JSON")
    parser.add_argument("--docs", type=Path, help="folder of the dated records; the page lies beside it")
    parser.add_argument("--work", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in FULL]:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(FULL)}")
    if not 0 < options.share <= 1:
        parser.error("--share lies above 0, and at most 1")
    records: dict[str, Any] = {}
    failed = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        if set(names) - {"races"}:
            stack.enter_context(sharing(work))
        for name in names:
            try:
                records[name] = one(name, options.share, options.seed, work)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            if not records[name]["ok"]:
                failed.append(name)
            if options.out:
                store.write_json(options.out, records)
            if options.docs:
                path = options.docs / f"{time.strftime('%Y-%m-%d')}.json"
                before = store.read_json(path) if path.exists() else {}
                store.write_json(path, {**before, name: records[name]})
                page.renew(options.docs.with_suffix(".md"), {**before, name: records[name]})
    print(page.summary(records))
    if failed:
        print(json.dumps({name: records[name]["problems"] for name in failed if name in records}, indent=2))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
