"""How long a training waits for a checkpoint, as a share of a minute.

    python -m bench.checkpoint_stall [--small] [--out FILE]

``training.loop.fit`` runs as in a job and saves at every third step; what a step that saves takes beyond the two before it is
the stall: encoding, sha256, writing, syncing, renaming, and dropping the third newest. A row compares a minute of training
with one checkpoint in it with a minute without. Beside it, the checkpoint alone against what one writes by hand (torch.save
of weights, average and AdamW's moments to a file that is synced and renamed: no checksum); both read back as what went in.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import config
from archipel.backbones.registry import build_expert
from archipel.errors import Stopped
from archipel.training import checkpoint
from archipel.training.batches import Batch, open_shard
from archipel.training.loop import CHECKPOINTS, Settings, Trainer, fit
from archipel.training.objective import FlowObjective
from bench import common
from bench.training_step import After, make_shard

WHAT = "what a checkpoint a minute costs a training"
MINUTE, AIM = 60.0, 1.01
EVERY = 3
WIDE = {"width": 320, "heads": 5, "rope_axes": [16, 24, 24], "double_blocks": 1, "single_blocks": 4, "batch": 2}
SMALL = {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "batch": 2}


class Timed(FlowObjective):
    """Our objective, with the clocks at every step's begin."""

    began: list[tuple[float, float]]

    def batch(self, step: int, part: slice | None = None) -> Batch:
        self.began.append(common.clocks())
        return super().batch(step, part)


def stalls(settings: config.RunConfig, folder: Path, count: int) -> common.Seconds:
    """Seconds that steps which save took beyond those which did not."""
    make_shard(folder / "shard", settings, 64)
    part = settings.expert
    objective = Timed(build_expert(settings, seed=0), open_shard(folder / "shard"), seed=0, batch=part.batch)
    objective.began = []
    with contextlib.suppress(Stopped):
        fit(objective, Settings.of(part), folder / "job", After(EVERY * (count + 1) + 1), run_id="bench", label="bench")
    taken = common.Seconds()
    for begin, end in zip(objective.began, objective.began[1:], strict=False):
        taken.add(begin, end)
    found = common.Seconds()
    for saves in range(2 * EVERY - 1, len(taken.wall), EVERY):  # the first checkpoint is not counted
        for ours, all_of in ((found.wall, taken.wall), (found.cpu, taken.cpu)):
            ours.append(max(0.0, all_of[saves] - statistics.mean(all_of[saves - EVERY + 1 : saves])))
    return found


def by_hand(folder: Path, tensors: dict[str, Tensor]) -> None:
    aside = folder / "state.tmp"
    with open(aside, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / "state.pt")


def alone(settings: config.RunConfig, folder: Path, rounds: int) -> dict[str, common.Seconds]:
    """Writing the state alone, and by hand; both are read back and compared first."""
    shard = folder / "shard"
    objective = FlowObjective(build_expert(settings, seed=0), open_shard(shard), seed=0, batch=settings.expert.batch)
    trainer = Trainer(objective, Settings.of(settings.expert))
    trainer.advance()
    (folder / "hand").mkdir()
    step = iter(range(1, 1000))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: checkpoint.save(folder / CHECKPOINTS, next(step), trainer.arrays(), {"run": "bench"}),
        "by hand": lambda: by_hand(folder / "hand", {k: torch.from_numpy(v) for k, v in trainer.arrays().items()}),
    }
    for call in calls.values():
        call()
    found, wanted = checkpoint.latest(folder / CHECKPOINTS, "bench"), trainer.arrays()
    theirs = torch.load(folder / "hand" / "state.pt", weights_only=True)
    for name, array in wanted.items():
        if found is None or not np.array_equal(found.arrays[name], array):
            raise common.DifferentError(f"our checkpoint does not give back {name}")
        if not np.array_equal(theirs[name].numpy(), array):
            raise common.DifferentError(f"torch.save does not give back {name}")
    return common.interleave(calls, rounds)


def run(small: bool = False) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {"tiny": SMALL} if small else {"the demo's expert": {}, "a wider expert": WIDE}
    with common.Benchmark("checkpoint_stall", WHAT, ("torch", "diffusers", "safetensors")) as b:
        for name, part in cases.items():
            made = {**part, "steps": 1000, "checkpoint_every": EVERY, "validate_every": 1000}
            settings = config.build({"expert": made})
            with tempfile.TemporaryDirectory() as at:
                folder = Path(at)
                waited = stalls(settings, folder, 2 if small else 12)
                taken = alone(settings, folder, 1 if small else 7)
                size = sum(path.stat().st_size for path in (folder / "hand").iterdir())
            minute = common.Seconds([MINUTE] * len(waited.wall), [MINUTE] * len(waited.cpu))
            with_one = common.Seconds([MINUTE + s for s in waited.wall], [MINUTE + s for s in waited.cpu])
            case = f"{name}, {size / 1e6:.0f} MB"
            b.rows += [
                common.versus(f"a minute with a checkpoint: {case}", "a minute without", with_one, minute, AIM),
                common.versus(f"a checkpoint: {case}", "torch.save", taken["ours"], taken["by hand"]),
            ]
            b.facts |= {
                f"stall, s: {case}": statistics.median(waited.wall),
                f"longest stall, s: {case}": max(waited.wall),
            }
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
