"""What decides whether two processes compute the same bits, and what to say where they do not."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel.training.local import Local

# Resuming elsewhere continues the same sequence of batches and noise; rounding differs and grows with the steps. Measured
# on a small expert: weights moved by 1e-7 at the start end 400 steps later 2e-3 apart, validation losses 3e-5.
TOLERANCE = "validation losses then agree to about 1 %, weights do not agree bit for bit"


def cpu_name() -> str:
    """The CPU's model name, which names no machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


SWITCHES = ("checkpointing", "optimizer", "compile", "ema")
# What checkpoints did not say before there was a choice.
OLDER: Mapping[str, Any] = {"precision": "float32", "world_size": 1, **{key: getattr(Local(), key) for key in SWITCHES}}


def build(
    device: str, threads: int, local: Local = Local(), *, micro_batch: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Torch build, numpy (its normal generator), CPU type, device and thread count of this process, and how the batch was
    computed: ``micro_batch`` clips at once in each of ``world_size`` processes, with the precision and switches of ``local``."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "matmul": torch.get_float32_matmul_precision(),
        "threads": threads,
        "precision": local.precision,
        "micro_batch": micro_batch,
        "world_size": world_size,
        **{key: getattr(local, key) for key in SWITCHES},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For people: "threads 1, now 2"."""
    return [f"{key} {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]


def pick_device(device: str | None) -> str:
    """``device``, or a GPU where there is one, else the CPU.

    On a GPU matrices are multiplied in TF32 from then on: several times faster, 10 bits of mantissa, float32 sums.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    return chosen


def accelerators() -> int:
    """How many GPUs torch sees, without waking any of them."""
    return torch.cuda.device_count()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Compute with ``count`` CPU threads (None: as many as torch has now), then as many as before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
