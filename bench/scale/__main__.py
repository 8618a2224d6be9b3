"""Measure every point that is not there yet; see ``bench.scale``."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from archipel import store
from bench.scale import clips, models

CASES: dict[str, Any] = {**clips.CASES, **models.EXPERTS, **models.FRAMES, **models.SIZES}
_CLIPS, _EXPERTS = (1_000, 10_000, 100_000, 1_000_000), (1, 2, 4, 8, 16, 32, 64)
_FRAMES, _SIZES = (4, 8, 16, 32, 64), (16, 32, 64, 128, 256)
POINTS = {
    **dict.fromkeys(clips.CASES, _CLIPS),
    **dict.fromkeys(models.EXPERTS, _EXPERTS),
    **dict.fromkeys(models.FRAMES, _FRAMES),
    **dict.fromkeys(models.SIZES, _SIZES),
    "partition-wide": (1_000, 10_000, 100_000),
}
MEMORY = 8 << 30  # bytes that a point may take: beyond that it fails, and not the machine
SECONDS = 1200.0  # of CPU that a point may take


def child(case: str, n: int, work: Path, seconds: float) -> None:
    import pyarrow.parquet  # noqa: F401 - what is imported while it is measured would count
    import sklearn.cluster
    import sklearn.metrics  # noqa: F401

    if case not in clips.CASES:
        import torch

        torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # mapped files do not count
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(CASES[case](work, n)))


def measure(case: str, n: int, work: Path, source: Path | None, seconds: float) -> dict[str, Any]:
    """A point in a process of its own; where it fails, the last line that it said."""
    here = Path(__file__).parents[2]
    path = [str(source / "src"), str(here)] if source else [str(here)]
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    words = [
        sys.executable,
        "-m",
        "bench.scale",
        "--child",
        case,
        str(n),
        "--work",
        str(work),
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(
        words, env={**os.environ, **one, "PYTHONPATH": os.pathsep.join(path)}, cwd=here,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"not done in {seconds:.0f} s of CPU"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failed": said[-1][-300:] if said else f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of the made-up runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/scale.json"))
    parser.add_argument("--page", action="store_true", help="only write the page of what OUT holds")
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="may be given several times")
    parser.add_argument("--most", type=int, default=10**9, help="leave out larger points")
    parser.add_argument("--label", default="after", help="what the measured state of the code is called")
    parser.add_argument("--source", type=Path, help="a checkout whose src is measured instead of this one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of CPU that a point may take")
    parser.add_argument("--keep", action="store_true", help="leave the made-up runs for another call")
    parser.add_argument("--again", action="store_true", help="measure also what OUT has")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]), options.work, options.seconds)
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        if not options.page:
            run(options, options.work or Path(name))
    from bench.scale import page

    print(page.write(store.read_json(options.out), options.out))
    return None


def run(options: argparse.Namespace, work: Path) -> None:
    from bench import common

    record: dict[str, Any] = store.read_json(options.out) if options.out.exists() else {"points": {}}
    record["machine"] = common.machine(("torch", "scikit-learn", "pyarrow"))
    work.mkdir(parents=True, exist_ok=True)
    names = options.only or list(CASES)
    points = sorted({(n, case) for case in names for n in POINTS[case] if n <= options.most})
    for place, (n, case) in enumerate(points):
        held = record["points"].setdefault(options.label, {}).setdefault(case, {})
        if str(n) not in held or options.again:
            print(f"{case} {n} ...", file=sys.stderr, end=" ", flush=True)
            load = common.load_beyond_ours()
            found = measure(case, n, work, options.source, options.seconds)
            held[str(n)] = {**found, "load": round(load, 2), "date": time.strftime("%Y-%m-%d")}
            print(found, file=sys.stderr, flush=True)
            store.write_json(options.out, record)
        if not options.keep and all(number != n for number, _ in points[place + 1 :]):
            clips.clean(work, n)


if __name__ == "__main__":
    main()
