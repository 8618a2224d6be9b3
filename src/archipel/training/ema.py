"""An exponential moving average of weights whose length is a share of the arm's own steps.

After step s the average is sum_i beta^(s-i) w_i / sum_i beta^(s-i) over the weights w_1..w_s after each step, with
beta = exp(-1 / (length steps)). Normalising the sum (as Adam does, arXiv 1412.6980, section 3) means that the
initial weights never enter, so no warm-up rule is needed. Length as a share of training: Karras et al., EDM2
(arXiv 2312.02696), section 3.1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


def decay(length: float, steps: int) -> float:
    """beta for an average over about ``length * steps`` steps (at least one)."""
    return math.exp(-1.0 / max(1.0, length * steps))


def weight(beta: float, step: int) -> float:
    """Share of the newest weights after ``step`` >= 1 steps: (1 - beta) / (1 - beta^step); 1 after the first."""
    return (1.0 - beta) / (1.0 - beta**step)


class Ema:
    """Averages ``model``'s parameters that are trained, in their own dtype and on their own device; ``tensors`` are by name.

    Of a sharded model each process averages its own parts: ``mine`` gives the part of a parameter.
    """

    def __init__(self, model: nn.Module, beta: float, mine: Callable[[Tensor], Tensor] | None = None) -> None:
        self.beta, self._mine = beta, mine
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # not a base under an adapter
        self._parameters: list[Tensor] = list(trained.values())
        self._tensors = {name: self._copied((mine(p) if mine else p).detach()) for name, p in trained.items()}
        self._average = list(self._tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The average after the last ``update``, by name."""
        return self._tensors

    def _copied(self, value: Tensor) -> Tensor:
        """A copy where averages lie."""
        return value.clone()

    @functools.cached_property
    def _live(self) -> list[Tensor]:
        # Looked at after the first step: FSDP2 may put a parameter's part into other memory on the first forward.
        return [self._mine(p) for p in self._parameters] if self._mine else self._parameters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` finished steps (1 for the first)."""
        torch._foreach_lerp_(self._average, self._live, weight(self.beta, step))

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averaged weights inside the block; the raw ones come back.

        Nothing is copied, but in a sharded model, which gathers its weights from where they lie.
        """
        if self._mine:
            kept = [p.clone() for p in self._live]
            try:
                torch._foreach_copy_(self._live, self._average)
                yield
            finally:
                torch._foreach_copy_(self._live, kept)
            return
        raw = [p.data for p in self._live]
        try:
            for p, average in zip(self._live, self._average, strict=True):
                p.data = average
            yield
        finally:
            for p, data in zip(self._live, raw, strict=True):
                p.data = data


class HostEma(Ema):
    """The average in the host's memory, for devices that have none to spare: the same numbers, on the CPU.

    The weights of each step are copied to the host, and a thread takes them into the average while the device computes
    the next step. Two copies of what is trained lie in the host's memory (pinned, for a GPU), none on the device.
    """

    def __init__(self, model: nn.Module, beta: float, mine: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(model, beta, mine)
        self._copies = [torch.empty_like(value, pin_memory=value.is_pinned()) for value in self._average]
        self._thread = ThreadPoolExecutor(1, "archipel-average")
        self._pending: Future[None] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        self._wait()
        return self._tensors

    def _copied(self, value: Tensor) -> Tensor:
        made = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        return made.copy_(value)

    def _wait(self) -> None:
        """Until the average is that after the last ``update``; raises what went wrong there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    @torch.no_grad()
    def update(self, step: int) -> None:
        self._wait()
        self._fetch()
        self._pending = self._thread.submit(self._take, weight(self.beta, step))

    def _fetch(self) -> None:
        """The weights into ``_copies``, done when it returns: the next step changes them."""
        for copy, p in zip(self._copies, self._live, strict=True):
            copy.copy_(p, non_blocking=True)
        if self._live and self._live[0].is_cuda:
            torch.cuda.current_stream(self._live[0].device).synchronize()

    @torch.no_grad()
    def _take(self, share: float) -> None:
        torch._foreach_lerp_(self._average, self._copies, share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The raw weights wait on the host meanwhile; the device holds one set of weights at a time."""
        self._wait()
        with torch.no_grad():
            self._fetch()
            for p, average in zip(self._live, self._average, strict=True):
                p.data.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, copy in zip(self._live, self._copies, strict=True):
                    p.data.copy_(copy)
