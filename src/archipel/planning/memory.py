"""Memory of training and sampling: our own training step, played through with tensors that have no memory.

What is counted is what the real ``Trainer`` makes: every switch changes it the way it changes the real one. It runs as on the
CPU, whose attention keeps what the fused attention of GPUs keeps (output and one number per row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archipel.backbones import flops
from archipel.backbones.base import Denoiser
from archipel.backbones.registry import build_expert
from archipel.config import RunConfig
from archipel.contracts import Conditioning
from archipel.planning.held import Held, fake
from archipel.planning.switches import Switches
from archipel.run import MONOLITH
from archipel.training.batches import Batch
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer
from archipel.training.objective import CLIPS, FlowObjective

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Training:
    """Bytes on each GPU. ``activations``: all that a forward and backward pass holds beside weights, gradients, optimizer and
    average, at its fullest; ``gathered``: what other GPUs' parts of the weights take while a block is computed. ``peak`` is at
    most the sum: where a step is one pass, gradients appear while activations go. ``validation``: the peak of validating.
    ``host``: bytes in the machine's own memory."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    gathered: int
    peak: int
    validation: int
    host: int
    clips: int

    @property
    def needed(self) -> int:
        """What a GPU must have: the larger one of a step's and validation's peak."""
        return max(self.peak, self.validation)


@dataclass(frozen=True)
class Sampling:
    """Bytes on the GPU for one clip: ``weights`` of every network that is kept there, ``activations`` of one evaluation."""

    weights: int
    activations: int
    largest: int  # weights of the largest single network

    @property
    def peak(self) -> int:
        return self.weights + self.activations


class Dry(FlowObjective):
    """The experts' own loss on clips that do not exist."""

    def __init__(self, model: Denoiser, config: RunConfig, size: int) -> None:
        self.model, self.size, self._config = model, size, config
        self.on_forward: Callable[[], None] = lambda: None

    def batch(self, step: int, part: slice | None = None) -> Batch:
        return clips(self._config, self.size if part is None else part.stop - part.start)

    def loss(self, batch: Batch) -> Tensor:
        value = super().loss(batch)
        self.on_forward()
        return value

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        self.loss(clips(self._config, CLIPS))
        return {}


def clips(config: RunConfig, count: int) -> Batch:
    """A batch of the run's shapes."""
    latent, (L, D, P) = flops.latent_shape(config), flops.text_shape(config)
    x = torch.empty(count, *latent)
    image = torch.empty(count, latent[0] + 1, *latent[1:]) if conditions(config) else None
    cond = Conditioning(
        torch.empty(count, L, D), torch.ones(count, L, dtype=torch.bool), torch.empty(count, P), image
    )
    cluster = torch.zeros(count, dtype=torch.int64)
    return Batch(x, torch.empty_like(x), torch.empty(count), cond, cluster, torch.empty_like(x))


def conditions(config: RunConfig) -> bool:
    """Whether experts are given frames."""
    return any(config.expert.tasks[1:])


def expert(config: RunConfig, name: str = "0") -> Denoiser:
    """An expert, or the monolith, as it is trained."""
    return build_expert(config, seed=0, clusters=flops.cluster_width(config) if name == MONOLITH else 0)


# --- training --------------------------------------------------------------------------------------------------------


def training(config: RunConfig, switches: Switches, name: str = "0") -> Training:
    """A step of an expert (or the monolith) on each of ``switches.gpus`` GPUs."""
    batch = config.monolith.batch if name == MONOLITH else config.expert.batch
    share = -(-batch // switches.gpus)
    at_once = min(share, switches.micro_batch or share)
    with fake(), Held() as held:
        model = expert(config, name)
        if switches.checkpointing:
            model.network.enable_gradient_checkpointing()  # type: ignore[operator]
        if switches.gpus > 1 and switches.precision == "bfloat16":
            for block in model.blocks():
                block.to(torch.bfloat16)  # they are gathered so, and nothing is left for autocast to copy
        found = _played(Dry(model, config, 2 * at_once), held, at_once, switches)
        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        block = max((sum(p.numel() for p in part.parameters()) for part in model.blocks()), default=0)
        rest = model.parameters_total - sum(p.numel() for part in model.blocks() for p in part.parameters())
        total = model.parameters_total
    return _on_each(found, switches, sizes, total, block, rest, at_once, passes=-(-share // at_once))


@dataclass(frozen=True)
class _Played:
    """Bytes beside weights, gradients, optimizer and average: at most in a pass (``activations``), in validation; and
    ``single``: at most in a pass that begins without gradients, these included."""

    activations: int
    single: int
    validation: int


def _played(dry: Dry, held: Held, at_once: int, switches: Switches) -> _Played:
    """Two passes of one step, the second with gradients already there, and one validation."""
    trainer = Trainer(dry, Settings(steps=10, lr=1e-3), Local(device="cpu", precision=switches.precision))
    for p in trainer.parameters:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()  # makes its state
    trainer.optimizer.zero_grad(set_to_none=True)
    before = held.now
    held.reset_peak()
    trainer.validate()
    validation = held.peak - before
    peaks = []
    for number in range(2):
        held.reset_peak()
        trainer._in_parts([(slice(number * at_once, (number + 1) * at_once), 1.0)])
        peaks.append(held.peak - before)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in trainer.parameters if p.grad is not None)
    return _Played(max(0, peaks[1] - gradients), peaks[0], validation)


def _on_each(
    found: _Played, switches: Switches, sizes: list[int], total: int, block: int, rest: int, at_once: int, *, passes: int
) -> Training:
    """What one of ``switches.gpus`` GPUs holds; ``sizes`` of the trained parameters, ``total`` of all, in numbers."""
    N, trained = switches.gpus, sum(sizes)

    def shared(size: int) -> int:
        return -(-size // N)

    weights, gradients = shared(_FLOAT32 * total), shared(_FLOAT32 * trained)
    optimizer, average = shared(switches.optimizer_bytes(sizes)), shared(_FLOAT32 * trained)
    host = average if switches.ema == "host" else 0
    average -= host
    gathered = 0
    if N > 1:
        width = _BFLOAT16 if switches.precision == "bfloat16" else _FLOAT32
        # The block being computed, the next one, the message that brings it, a block's gradients and their float32 sums;
        # and of what is in no block (kept in float32) weights, gradients and their sums.
        gathered = (4 * width + _FLOAT32) * block + 3 * _FLOAT32 * rest
    states = weights + optimizer + average
    if N == 1 and passes == 1:
        peak = states + max(found.single, gradients)
    else:
        peak = states + gradients + found.activations + gathered
    validation = states + found.validation + gathered
    return Training(
        weights, gradients, optimizer, average, found.activations, gathered, peak, validation, host, at_once
    )


# --- sampling --------------------------------------------------------------------------------------------------------


def evaluation(config: RunConfig, rows: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """(weights of an expert, what one evaluation of it on ``rows`` rows holds beside them), in bytes."""
    with fake(), Held() as held, torch.no_grad():
        model = expert(config).to(dtype).eval()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        one = clips(config, rows)
        before = held.now
        held.reset_peak()
        output = model(one.x_t.to(dtype), one.t.to(dtype), one.cond.to("cpu", dtype))
        assert output.shape == one.x_t.shape
        return weights, held.peak - before
