"""How good an expert is on clips that it did not train on, measured by whoever is about to trust it.

The objective's own validation: the same clips, times and noise as in training, so that a card's claim can be compared; the
yardstick is a network that says nothing (output zero), which is what ours are before their first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones.base import Denoiser
from archipel.config import RunConfig
from archipel.contracts import Conditioning, Velocity
from archipel.training import bases, machine
from archipel.training.batches import Clips, Shard
from archipel.training.objective import FlowObjective


@dataclass(frozen=True)
class Measured:
    """``loss``: what a card's validation claims; ``ratio``: loss over the yardstick's, over the noisier half of the
    times (a router: over all); ``overall``: the same at all times; ``clips``: validation clips, with none of which all are NaN."""

    loss: float
    ratio: float
    overall: float
    clips: int


class Silent(Denoiser):
    """The network that says nothing: its output is zero, as an untrained expert's is."""

    def __init__(self, prediction: str) -> None:
        super().__init__(nn.Module(), {"prediction": prediction})

    def ends(self) -> list[nn.Module]:
        return []

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.zeros_like(x)


class _Spoken(Denoiser):
    """A velocity in the place of a network. Losses are taken on velocities in either case (see ``flow.losses``)."""

    def __init__(self, velocity: Velocity) -> None:
        super().__init__(nn.Module(), {"prediction": "velocity"})
        self._spoken = velocity

    def ends(self) -> list[nn.Module]:
        return []

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._spoken(x, t, cond)

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._spoken(x, t, cond)


def measure(
    config: RunConfig, folder: Path, validation: Path, device: str | None = None, *, base: Path | None = None
) -> Measured:
    """Held-out loss of the expert (or monolith) in ``folder`` on the clips of ``validation``, a shard's file; ``base``: the
    folder of the base where experts are adapters.

    Raises DamagedError, MissingStageError for files that are not what they should be. Nothing of them is executed.
    """
    clips, on = Clips(validation), machine.pick_device(device)
    if not len(clips):
        return Measured(float("nan"), float("nan"), float("nan"), 0)
    return _compare(config, bases.load_expert(config, folder, base), clips, on)


def measure_velocity(config: RunConfig, velocity: Velocity, validation: Path) -> Measured:
    """The same of an expert that is known by its velocity only: a remote one."""
    clips = Clips(validation)
    if not len(clips):
        return Measured(float("nan"), float("nan"), float("nan"), 0)
    return _compare(config, _Spoken(velocity), clips, "cpu")


def _compare(config: RunConfig, model: Denoiser, clips: Clips, on: str) -> Measured:
    own = _validate(config, model, clips, on)
    silent = _validate(config, Silent(config.expert.prediction), clips, on)
    half = len(own["bins"]) // 2  # times ascend; the middle one counts as noisy
    ratio = sum(own["bins"][half:]) / sum(silent["bins"][half:])
    return Measured(own["loss"], ratio, own["loss"] / silent["loss"], len(clips))


def _validate(config: RunConfig, model: Denoiser, clips: Clips, device: str) -> dict[str, Any]:
    # `validate` looks at the validation clips only: the training clips need not be here at all.
    objective = FlowObjective(
        model,
        Shard(clips, clips),
        seed=config.run.seed,
        batch=1,
        shift=config.expert.shift,
        tasks=config.expert.tasks if config.expert.given_frames else None,
        device=device,
    )
    return objective.validate()
