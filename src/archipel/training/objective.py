"""What an expert and the monolith learn: the velocity of their own clips (method.md section 8, formula 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archipel.backbones.base import Denoiser
from archipel.backbones.cluster import add_cluster
from archipel.flow import given
from archipel.flow.losses import prediction_loss
from archipel.flow.time import validation_times
from archipel.training.batches import Batch, Shard, training_batch, validation_batches

BINS = 5  # validation times: midpoints of equal shares of the training law
CLIPS = 64  # validation clips per bin at most, so that validating costs a few percent of training


class FlowObjective:
    """Flow matching on one shard. Expert and monolith differ in the shard and the batch only; a model with ``clusters`` is
    told each clip's own, in validation as well. ``tasks``: the mix of what is given of a clip (see ``flow.given``); None
    for networks that are given nothing. ``at_once``: clips validated in one pass at most (0: all ``CLIPS``)."""

    def __init__(
        self,
        model: Denoiser,
        shard: Shard,
        *,
        seed: int,
        batch: int,
        shift: float = 1.0,
        text_dropout: float = 0.0,
        pooled_dropout: float = -1.0,
        tasks: Sequence[float] | None = None,
        device: str = "cpu",
        at_once: int = 0,
    ) -> None:
        self.model, self.shard = model.to(device), shard
        self._seed, self.size, self._device = seed, batch, device
        self._shift, self._dropout, self._pooled, self._tasks = shift, text_dropout, pooled_dropout, tasks
        self._times = validation_times(BINS, shift).tolist()
        self._at_once = min(CLIPS, at_once or CLIPS)

    def batch(self, step: int, part: slice | None = None) -> Batch:
        return training_batch(
            self.shard.train,
            self._seed,
            step,
            self.size,
            shift=self._shift,
            text_dropout=self._dropout,
            pooled_dropout=self._pooled,
            tasks=self._tasks,
            device=self._device,
            part=part,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Squared velocity error per clip (B,), whatever the network predicts."""
        cond = batch.cond
        if self.model.clusters:
            cond = add_cluster(cond, batch.cluster, self.model.clusters)
        output = self.model.predict(batch.x_t, batch.t, cond)
        return prediction_loss(self.model.prediction, output, batch.x0, batch.noise, batch.t)

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """{"loss", "times", "bins"}: mean loss, and per validation time, with captions; {} without validation clips.

        With a mix of tasks every clip is asked about each of them: "tasks" has each one's mean loss, and "loss" and "bins"
        are their mean with the mix's shares, which is what training minimises.
        """
        if not len(self.shard.validation):
            return {}
        more: dict[str, Any] = {}
        if self._tasks is None:
            bins = self._bins(None)
        else:
            shares = given.shares(self._tasks)
            parts = {name: self._bins(given.only(name)) for name in shares}
            bins = [sum(shares[name] * parts[name][i] for name in shares) for i in range(len(self._times))]
            more = {"tasks": {name: sum(part) / len(part) for name, part in parts.items()}}
        return {"loss": sum(bins) / len(bins), "times": [round(t, 6) for t in self._times], "bins": bins, **more}

    def _bins(self, tasks: Sequence[float] | None) -> list[float]:
        """Mean loss at each validation time."""
        bins = []
        for number, t in enumerate(self._times):
            batches = validation_batches(
                self.shard.validation,
                self._seed,
                t,
                bin_number=number,
                limit=CLIPS,
                chunk=self._at_once,
                tasks=tasks,
                device=self._device,
            )
            bins.append(float(torch.cat([self.loss(batch) for batch in batches]).mean()))
        return bins
