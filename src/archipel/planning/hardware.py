"""GPUs by name: memory and peak rate as their makers state them, for dense matrix products.

Sources: NVIDIA's data sheets and architecture papers (A100 80GB, H100 SXM, H200 SXM, HGX B200, L4, L40S, Ada and Blackwell
GeForce papers, where the rate with float32 sums counts), AMD's of the MI300X. Nothing here was measured by us.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from archipel.errors import ConfigError

GIB = 1 << 30
USABLE = 0.94
"""Share of a GPU's memory that tensors may fill: an assumption; the rest goes to the driver's context, the libraries'
workspaces and what the allocator cannot fit together."""


@dataclass(frozen=True)
class Gpu:
    """``memory`` in bytes; ``bfloat16`` and ``tf32`` in FLOPs per second (TF32 is what float32 products run in here)."""

    key: str
    title: str
    memory: int
    bfloat16: float
    tf32: float

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)

    def peak(self, precision: str) -> float:
        return self.bfloat16 if precision == "bfloat16" else self.tf32


def _gpu(key: str, title: str, gib: int, bfloat16: float, tf32: float) -> Gpu:
    return Gpu(key, title, gib * GIB, bfloat16 * 1e12, tf32 * 1e12)


GPUS: dict[str, Gpu] = {
    gpu.key: gpu
    for gpu in (
        _gpu("l4", "NVIDIA L4 24 GB", 24, 121.0, 60.0),
        _gpu("rtx3090", "NVIDIA RTX 3090 24 GB", 24, 71.0, 35.6),
        _gpu("rtx4090", "NVIDIA RTX 4090 24 GB", 24, 165.2, 82.6),
        _gpu("rtx5090", "NVIDIA RTX 5090 32 GB", 32, 209.5, 104.8),
        _gpu("a100-40", "NVIDIA A100 40 GB", 40, 312.0, 156.0),
        _gpu("l40s", "NVIDIA L40S 48 GB", 48, 362.0, 183.0),
        _gpu("a100", "NVIDIA A100 80 GB", 80, 312.0, 156.0),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 80, 989.4, 494.7),
        _gpu("h200", "NVIDIA H200 141 GB", 141, 989.4, 494.7),
        _gpu("b200", "NVIDIA B200 180 GB", 180, 2250.0, 1125.0),
        _gpu("mi300x", "AMD MI300X 192 GB", 192, 1307.4, 653.7),
    )
}
DEFAULT = ("rtx4090", "a100", "h100", "h200", "b200")


def find(names: Iterable[str]) -> list[Gpu]:
    """GPUs by their names, in any case. Raises ConfigError naming the nearest one there is."""
    found = []
    for name in names:
        key = name.strip().lower().replace(" ", "").replace("_", "-")
        if key not in GPUS:
            near = difflib.get_close_matches(key, GPUS, n=1)
            raise ConfigError(
                f"--gpu {name!r} is not one of {', '.join(GPUS)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        found.append(GPUS[key])
    return found


def hours(flops: float, gpu: Gpu, precision: str, mfu: float, gpus: int = 1) -> float:
    """Hours that ``flops`` take on ``gpus`` GPUs that reach the share ``mfu`` of their peak."""
    return flops / (gpu.peak(precision) * mfu * gpus) / 3600
