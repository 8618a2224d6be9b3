"""What an expert and the monolith learn: the velocity of their own clips (method.md section 8, formula 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archipel.backbones.base import Denoiser
from archipel.backbones.flux import add_cluster
from archipel.flow.losses import prediction_loss
from archipel.flow.time import validation_times
from archipel.training.batches import Batch, Shard, training_batch, validation_batches

BINS = 5  # validation times: midpoints of equal shares of the training law
CLIPS = 64  # validation clips per bin at most, so that validating costs a few percent of training


class FlowObjective:
    """Flow matching on one shard. Expert and monolith differ in the shard and the batch only; a model with ``clusters`` is
    told each clip's own, in validation as well."""

    def __init__(
        self,
        model: Denoiser,
        shard: Shard,
        *,
        seed: int,
        batch: int,
        shift: float = 1.0,
        text_dropout: float = 0.0,
        device: str = "cpu",
    ) -> None:
        self.model, self.shard = model.to(device), shard
        self._seed, self.size, self._device = seed, batch, device
        self._shift, self._dropout = shift, text_dropout
        self._times = validation_times(BINS, shift).tolist()

    def batch(self, step: int, part: slice | None = None) -> Batch:
        return training_batch(
            self.shard.train,
            self._seed,
            step,
            self.size,
            shift=self._shift,
            text_dropout=self._dropout,
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
        """{"loss", "times", "bins"}: mean loss, and per validation time, with captions; {} without validation clips."""
        bins = []
        for number, t in enumerate(self._times):
            batches = validation_batches(
                self.shard.validation, self._seed, t, bin_number=number, limit=CLIPS, device=self._device
            )
            losses = [self.loss(batch) for batch in batches]
            if not losses:
                return {}
            bins.append(float(torch.cat(losses).mean()))
        return {"loss": sum(bins) / len(bins), "times": [round(t, 6) for t in self._times], "bins": bins}
