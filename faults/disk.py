"""Full disks, really full: file systems in memory under an island's folder and under a bucket. Needs root, to mount them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archipel import store
from faults.common import Record, Store
from faults.islands import Zygote, check, refusals, zygote_for
from faults.kills import publish, undisturbed
from faults.runs import make_run

SIZE = 256  # MiB of each disk


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A small disk, mounted as long as the block runs."""
    if os.geteuid() != 0:
        raise RuntimeError("disk: root is needed, to mount a small file system")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, free: int) -> Path:
    """Leave so many bytes; the file that takes the rest."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    room = shutil.disk_usage(folder).free - free
    with open(ballast, "wb") as file:
        for _ in range(room >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(room & ((1 << 20) - 1)))
    return ballast


def kept(bucket: Path) -> dict[str, str]:
    """What must not be lost: key -> sha256 of published files, whole checkpoints and results."""
    whole = [path.parent for path in bucket.rglob("manifest.json")]
    files = [path for folder in whole for path in folder.iterdir()] + [
        *bucket.glob("*.*"),
        *bucket.rglob("committed.json"),
    ]
    return {str(path.relative_to(bucket)): store.sha256_file(path) for path in files if path.is_file()}


def _one(record: Record, zygote: Zygote, work: Path, run: Any, wanted: dict[str, str], number: int, seed: int) -> None:
    chance, full = random.Random(seed), ("the island's folder", "the bucket")[number % 2]
    with disk(work / f"disk-{seed}") as folder:
        bucket = (folder if full == "the bucket" else work / f"other-{seed}") / "bucket"
        home = (folder if full != "the bucket" else work / f"other-{seed}") / "island"
        bucket.mkdir(parents=True)
        where = Store("file", f"file://{bucket}", folder=bucket)
        publish(run, zygote, where)
        words = ("join", where.url, "--threads", 1, "--work", home)
        free = int(2 ** chance.uniform(12, 22.5 if full == "the bucket" else 21.5))  # 4 KiB to some MiB
        before: dict[str, str] = {}
        ballast, stops, case = fill(folder, free), 0, f"{full} full ({free >> 10} KiB left)"
        for room in (free, 2 * free, None):
            if room is None:
                ballast.unlink(missing_ok=True)
            elif stops:
                ballast = fill(folder, room)
            code, said = zygote.run(*words)
            refusals(record, said)
            after = kept(bucket)
            if lost := [key for key, sha256 in before.items() if after.get(key) != sha256]:
                record.problem(f"{case}: lost or changed: {lost}")
            before = after
            if code == 0:
                break
            stops += 1
            if code != 2 or not any(
                text in said for text in ("disk is full", "No space left", "free space", "are free")
            ):
                record.problem(f"{case}: ends with {code}: {said[-600:]}")
        if code != 0:
            record.problem(f"{case}: with room again it ends with {code}: {said[-600:]}")
        good = check(record, zygote, where, wanted, case)
    record.made += 1
    row = {"full": full, "KiB left": free >> 10, "ends with a sentence and code 2": stops, "with room again": code}
    record.rows.append({**row, "weights": "identical" if good else "**differ**"})
    shutil.rmtree(work / f"other-{seed}", ignore_errors=True)


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` full disks, under an island's folder and under the bucket in turn."""
    what, work = "disks full under an island's folder or under the bucket", work / "disk"
    with Record("disk", what, count, seed) as record, zygote_for(work) as zygote:
        made = make_run(work / "run", steps=60, every=10, lease=6.0)
        wanted = undisturbed(made, zygote, work)
        for number in range(count):
            _one(record, zygote, work, made, wanted, number, seed + number)
    return record.value
