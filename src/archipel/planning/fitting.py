"""Whether a GPU holds a training step, and what makes it: the first of a list of steps, from the cheapest on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from archipel.planning.hardware import Gpu
from archipel.planning.memory import Steps
from archipel.planning.switches import Switches

_MOST = 64  # GPUs per expert


@dataclass(frozen=True)
class Fit:
    """``fits``: with the switches that were asked for. ``needed``: the bytes they take. ``advice``: the switches of the first
    step that fits (None: nothing that we have does), and ``advised``: the bytes it takes. ``sampling``: how clips can be made
    on it: "generate", "bfloat16", "offloaded", or "" where they cannot."""

    gpu: Gpu
    fits: bool
    needed: int
    advice: Switches | None
    advised: int
    sampling: str

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "needed_bytes": self.needed,
            "usable_bytes": self.gpu.usable,
            "with": None if self.advice is None else self.advice.told(),
            "with_bytes": None if self.advice is None else self.advised,
            "sampling": self.sampling,
        }


def fit(steps: Steps, switches: Switches, gpu: Gpu, generate: int, bfloat16: int, offloaded: int) -> Fit:
    """``generate``, ``bfloat16``, ``offloaded``: bytes of the three ways to sample."""
    needed = steps.of(switches).needed
    ways = (("generate", generate), ("bfloat16", bfloat16), ("offloaded", offloaded))
    sampled = next((way for way, size in ways if size <= gpu.usable), "")
    if needed <= gpu.usable:
        return Fit(gpu, True, needed, switches, needed, sampled)
    for tried in _ladder(steps, switches):
        if not _hopeless(steps, tried, gpu) and (size := steps.of(tried).needed) <= gpu.usable:
            return Fit(gpu, False, needed, tried, size, sampled)
    return Fit(gpu, False, needed, None, 0, sampled)


def _hopeless(steps: Steps, switches: Switches, gpu: Gpu) -> bool:
    """Whether weights, gradients, optimizer and average alone are too much: then no step need be played through."""
    trained = sum(steps.sizes)
    average = 0 if switches.ema == "host" else 4 * trained
    return (
        4 * steps.total + 4 * trained + average + switches.optimizer_bytes(steps.sizes)
    ) // switches.gpus > gpu.usable


def _ladder(steps: Steps, switches: Switches) -> list[Switches]:
    """What can be tried, each on top of the one before: what costs little first, more GPUs last."""
    rungs = [switches.but(checkpointing=True)]
    if steps.at_once(switches) > 1:
        rungs.append(rungs[-1].but(micro_batch=1))
    rungs.append(rungs[-1].but(ema="host"))
    rungs.append(rungs[-1].but(optimizer="adamw8bit"))
    # Several GPUs hold everything together: then neither 8 bits nor the host's memory may be needed.
    spread, count = [], 2 * switches.gpus
    while count <= _MOST:
        spread.append(rungs[-3].but(gpus=count))
        count *= 2
    return [*rungs, *spread]
