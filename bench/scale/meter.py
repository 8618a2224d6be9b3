"""CPU time, wall time and peak memory of a piece of work in this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident(field: str) -> float:
    """MiB by a field of /proc/self/status: VmRSS now, VmHWM the most since the last ``forget``."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def forget() -> None:
    """Make VmHWM begin again from what is resident now (Linux, Documentation/filesystems/proc.rst, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def metered(found: dict[str, float]) -> Iterator[None]:
    """Put into ``found``: cpu and wall seconds (of this process), peak MiB above what was resident when it began.

    Pages of memory-mapped files count while they are resident, as they do for whoever watches the process; the kernel takes them
    back when memory is short, so the peak is an upper bound of what is needed.
    """
    forget()
    before = resident("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    found["cpu"] = round(time.process_time() - cpu, 4)
    found["wall"] = round(time.perf_counter() - wall, 4)
    found["peak"] = round(max(0.0, resident("VmHWM") - before), 2)
