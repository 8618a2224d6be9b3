"""What each training switch costs in time and saves in memory, against the same step without it.

    python -m bench.training_switches [--small] [--only NAME ...] [--out FILE]

A flux expert of 31 M parameters takes real steps of the real ``Trainer`` on random clips, float32, one thread, a CPU. All
begin with the same weights and see the same clips, and their losses must agree over the first steps, each within its
tolerance, before anything is reported. Then one step of each in turn is timed. Memory is what torch's allocator has given
out at most while the trainer is made and takes two steps. On a CPU host and device are one: an average on the host is one
copy of the weights more here, and on a GPU one copy less there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch

from archipel import config
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.contracts import Conditioning
from archipel.training import switches
from archipel.training.batches import Batch
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer
from bench import common

WHAT = "training switches: seconds of a step and bytes at most, over those of the same step without"
PART = {"width": 512, "heads": 8, "rope_axes": [16, 24, 24], "double_blocks": 1, "single_blocks": 5, "batch": 2}
SMALL = {"width": 64, "heads": 2, "rope_axes": [8, 12, 12], "double_blocks": 1, "single_blocks": 2, "batch": 2}
# What each may move the loss of a step by, relative.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "checkpointing": ({"checkpointing": True}, 0.0),
    "ema host": ({"ema": "host"}, 0.0),
    "optimizer adamw8bit": ({"optimizer": "adamw8bit"}, 2e-2),
    "checkpointing, adamw8bit": ({"checkpointing": True, "optimizer": "adamw8bit"}, 2e-2),
    "compile": ({"compile": True}, 1e-4),
}
COMPARED = 3  # steps whose losses are held against each other


class Drawn:
    """Clips of random numbers, the same at a step whoever asks."""

    def __init__(self, of: config.RunConfig) -> None:
        latent, (L, D, P) = flops.latent_shape(of), flops.text_shape(of)
        self.model, self.size = build_expert(of, seed=0), of.expert.batch
        self._shape, self._text = (self.size, *latent), (L, D, P)

    def batch(self, step: int, part: slice | None = None) -> Batch:
        rng, (L, D, P) = torch.Generator().manual_seed(step), self._text
        x0, noise = (torch.randn(self._shape, generator=rng) for _ in range(2))
        tokens, mask = torch.randn(self.size, L, D, generator=rng), torch.ones(self.size, L, dtype=torch.bool)
        cond = Conditioning(tokens, mask, torch.randn(self.size, P, generator=rng))
        t = torch.rand(self.size, generator=rng)
        place = t[:, None, None, None, None]
        cluster = torch.zeros(self.size, dtype=torch.int64)
        return Batch(x0=x0, noise=noise, cluster=cluster, x_t=(1 - place) * x0 + place * noise, t=t, cond=cond)

    def loss(self, batch: Batch) -> torch.Tensor:
        wrong = self.model(batch.x_t, batch.t, batch.cond) - (batch.noise - batch.x0)
        return wrong.square().flatten(1).mean(1)

    def validate(self) -> dict[str, Any]:
        return {}


def trainer(of: config.RunConfig, given: dict[str, Any]) -> Trainer:
    return Trainer(Drawn(of), Settings(steps=100, lr=1e-3), Local("cpu", threads=1, **given))


def allocated(of: config.RunConfig, given: dict[str, Any]) -> int:
    """Bytes that torch's allocator had given out at most."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        made = trainer(of, given)
        for _ in range(2):
            made.advance()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def run(small: bool = False, only: Iterable[str] = ()) -> dict[str, Any]:
    rounds = 2 if small else 3
    part = SMALL if small else PART
    chosen = {name: case for name, case in CASES.items() if not only or name in only}
    of = config.build(
        {"clips": {"frames": 16, "size": 64}, "codec": {"channels": 16}, "expert": {**part, "steps": 100}}
    )
    if small:
        switches.BACKEND = "aot_eager"
    with common.Benchmark("training_switches", WHAT, ("torch", "diffusers", "torchao")) as b:
        plain = trainer(of, {})
        made = {name: trainer(of, given) for name, (given, _) in chosen.items()}
        losses = [float(plain.advance()[0]) for _ in range(COMPARED)]
        for name, (_, tolerance) in chosen.items():
            found = [float(made[name].advance()[0]) for _ in range(COMPARED)]
            apart = max(abs(x - y) / y for x, y in zip(found, losses, strict=True))
            b.facts[f"losses apart, {name}"] = apart
            if apart > tolerance:
                raise common.DifferentError(f"{name}: losses differ by {apart:.2e}")
        taken = common.interleave({"": plain.advance, **{name: one.advance for name, one in made.items()}}, rounds)
        b.rows += [common.versus(name, "without", taken[name], taken[""]) for name in chosen]
        b.facts["parameters"] = sum(p.numel() for p in plain.parameters)
        del plain, made
        base = allocated(of, {})
        table = [{"case": "without", "allocated, MiB": round(base / 2**20, 1), "ratio": 1.0}]
        for name, (given, _) in chosen.items():
            peak = allocated(of, given)
            table.append({"case": name, "allocated, MiB": round(peak / 2**20, 1), "ratio": round(peak / base, 3)})
        b.tables["memory at most"] = table
    return b.record


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--only", action="append", choices=tuple(CASES), help="may be given several times")
    options: argparse.Namespace = made.parse_args()
    common.finish(options, lambda: run(options.small, options.only or ()))


if __name__ == "__main__":
    main()
