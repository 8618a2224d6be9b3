"""Batches made ahead: the same ones in the same order, errors where they belong, and a training that ends alike."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from archipel.training.ahead import Ahead
from archipel.training.loop import Settings, Trainer


def test_batches_come_in_order_and_the_next_one_is_made_by_a_thread() -> None:
    made: list[tuple[int, str]] = []

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        return 10 * step

    ahead = Ahead(make, 4)
    assert [ahead(step) for step in range(4)] == [0, 10, 20, 30]
    ahead.close()
    assert [step for step, _ in made] == [0, 1, 2, 3]  # none beyond the last, none twice
    assert not made[0][1].startswith("archipel-batch") and all(
        name.startswith("archipel-batch") for _, name in made[1:]
    )


def test_what_goes_wrong_is_told_by_the_step_that_needed_it() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("row 7 cannot be read")
        return step

    ahead = Ahead(make, 3)
    assert ahead(0) == 0
    with pytest.raises(ValueError, match="row 7"):
        ahead(1)
    assert ahead(1 + 1) == 2
    ahead.close()


def test_another_step_than_the_next_is_made_at_once() -> None:
    ahead = Ahead(lambda step: torch.full((2,), step), 100)
    assert ahead(3).tolist() == [3, 3]
    assert ahead(50).tolist() == [50, 50]  # a resumed training
    ahead.close()


class Toy:
    """Least squares whose batch is a function of the step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.size = torch.nn.Linear(4, 1), 8

    def batch(self, step: int, part: slice | None = None) -> torch.Tensor:
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.model(batch)[:, 0] - batch.sum(1)).square()

    def validate(self) -> dict[str, Any]:
        return {}


def test_a_training_whose_batches_are_made_ahead_ends_with_the_same_bits() -> None:
    ends = []
    for early in (False, True):
        trainer = Trainer(Toy(), Settings(steps=12, lr=0.1))
        assert not isinstance(trainer._batch, Ahead)  # a CPU has nothing to gain from it
        if early:
            trainer._batch = Ahead(trainer.objective.batch, 12)
        losses = [float(trainer.advance()[0]) for _ in range(12)]
        trainer.finish()
        ends.append((losses, [p.tolist() for p in trainer.parameters]))
    assert ends[0] == ends[1]
