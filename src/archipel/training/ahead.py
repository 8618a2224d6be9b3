"""The next step's batch, made while a GPU computes this one: a thread reads, draws the noise and starts the transfer.

A batch is a function of its step alone (see ``loop.Objective``), so that this changes no bit, and nothing has to be kept for
a resumed training. On a CPU the thread would take its time from the step itself: there batches are made when they are due.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Ahead:
    """``ahead(step)`` gives ``make(step)`` and begins with that of the step after, below ``steps``.

    What ``make`` raises is raised by the step that needed it. device: where batches go ("cuda:1"), which the thread makes
    its own. At most one batch waits; one that is not the one asked for is let go.
    """

    def __init__(self, make: Callable[[int], Any], steps: int, device: str = "cpu") -> None:
        self._make, self._steps = make, steps
        ready = (torch.cuda.set_device, (device,)) if device.startswith("cuda:") else (None, ())
        self._thread = ThreadPoolExecutor(1, "archipel-batch", *ready)
        self._pending: tuple[int, Future[Any]] | None = None

    def __call__(self, step: int) -> Any:
        pending, self._pending = self._pending, None
        batch = pending[1].result() if pending is not None and pending[0] == step else self._make(step)
        if step + 1 < self._steps:
            self._pending = (step + 1, self._thread.submit(self._make, step + 1))
        return batch

    def close(self) -> None:
        """Lets the thread end; a batch that waits is dropped."""
        self._pending = None
        self._thread.shutdown(wait=False, cancel_futures=True)
