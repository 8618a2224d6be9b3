"""Memory of training and sampling: our own training step, played through with tensors that have no memory.

What is counted is what the real ``Trainer`` makes: every switch changes it the way it changes the real one. It runs as on the
CPU, whose attention keeps what the fused attention of GPUs keeps (output and one number per row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones import flops
from archipel.backbones.adapters import adapter_of
from archipel.backbones.base import Denoiser
from archipel.backbones.registry import build_expert
from archipel.config import RunConfig
from archipel.contracts import Conditioning
from archipel.planning.held import Held, fake, weightless
from archipel.planning.switches import Switches
from archipel.run import MONOLITH
from archipel.training.batches import Batch
from archipel.training.loop import Settings, Trainer
from archipel.training.objective import CLIPS, FlowObjective
from archipel.training.precision import BFLOAT16

_FLOAT32, _BFLOAT16 = 4, 2
_DEPTHS = ("num_layers", "num_single_layers")


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
        self.loss(clips(self._config, self.size))
        return {}


def clips(config: RunConfig, count: int) -> Batch:
    """A batch of the run's shapes."""
    latent, (L, D, P) = flops.latent_shape(config), flops.text_shape(config)
    x = torch.empty(count, *latent)
    image = torch.empty(count, latent[0] + 1, *latent[1:]) if config.expert.given_frames else None
    cond = Conditioning(torch.empty(count, L, D), torch.ones(count, L, dtype=torch.bool), torch.empty(count, P), image)
    cluster = torch.zeros(count, dtype=torch.int64)
    return Batch(x, torch.empty_like(x), torch.empty(count), cond, cluster, torch.empty_like(x))


def expert(config: RunConfig, name: str = "0") -> Denoiser:
    """An expert, or the monolith, as it is trained, without memory: whole, or an adapter over a frozen base."""
    with weightless():
        model = build_expert(config, seed=0, clusters=flops.cluster_width(config) if name == MONOLITH else 0)
        adapter = adapter_of(config)
        if adapter is not None:
            from archipel.backbones import lora

            lora.attach(model, adapter, "", 0)
    return model


def _held(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give a model without memory tensors that are counted: on the CPU, inside of ``fake()``."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made = torch.empty(p.shape, dtype=dtype or p.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)
        for name, table in module._buffers.items():
            if table is not None:
                module._buffers[name] = torch.empty(table.shape, dtype=table.dtype)


# --- training --------------------------------------------------------------------------------------------------------


class Steps:
    """Training steps of one job under any switches. A step is played through once per way of computing it: how many clips
    at once, whether blocks are computed twice, whether other GPUs hold a part. A 12 B expert takes some ten seconds."""

    def __init__(self, config: RunConfig, name: str = "0") -> None:
        self.config, self.name = config, name
        self.batch = config.monolith.batch if name == MONOLITH else config.expert.batch
        self._known: dict[tuple[str, bool, int, bool], _Played] = {}
        self._validations: dict[tuple[str, int, bool], int] = {}
        model = expert(config, name)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
        self.sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        self.total, self.block = model.parameters_total, max(blocks, default=0)
        self.rest = self.total - sum(blocks)

    def at_once(self, switches: Switches) -> int:
        """Clips that one GPU computes at once."""
        share = -(-self.batch // switches.gpus)
        return min(share, switches.micro_batch or share)

    def of(self, switches: Switches) -> Training:
        """A step on each of ``switches.gpus`` GPUs."""
        at_once, spread = self.at_once(switches), switches.gpus > 1
        key = (switches.precision, switches.checkpointing, at_once, spread)
        if key not in self._known:
            self._known[key] = self._play(switches, at_once)
        validated = min(CLIPS, switches.micro_batch or CLIPS)
        asked = (switches.precision, validated, spread)
        if asked not in self._validations:
            self._validations[asked] = self._validate(switches, validated)
        return _on_each(self, self._known[key], self._validations[asked], switches, at_once)

    def _play(self, switches: Switches, at_once: int) -> _Played:
        """One pass of a step."""
        with fake(), Held() as held:
            trainer = self._trainer(self.config, switches, at_once)
            for p in trainer.parameters:
                p.register_post_accumulate_grad_hook(held.settle_gradient)  # type: ignore[no-untyped-call]
            before = held.now
            held.reset_peak()
            trainer._in_parts([(slice(0, at_once), 1.0)])
            return _Played(held.peak_beside - before, held.peak - before)

    def _validate(self, switches: Switches, count: int) -> int:
        """Bytes beside weights, optimizer and average at most while ``count`` clips are validated at once. Without a backward
        pass one block of each kind is enough to see it, but for autocast's copies of the weights of all."""
        with fake(), Held() as held:
            trainer = self._trainer(shortened(self.config), switches, count)
            before = held.now
            held.reset_peak()
            with trainer._cast():
                trainer.objective.validate()
            peak: int = held.peak - before
            missing = sum(self.sizes) - sum(p.numel() for p in trainer.parameters)
        copied = switches.precision == BFLOAT16 and switches.gpus == 1
        return peak + (_BFLOAT16 * missing if copied else 0)

    def _trainer(self, config: RunConfig, switches: Switches, size: int) -> Trainer:
        model = expert(config, self.name)
        _held(model)
        if switches.gpus > 1 and switches.precision == BFLOAT16:
            for block in model.blocks():
                _held(block, torch.bfloat16)  # they are gathered so, and nothing is left for autocast to copy
        return Trainer(Dry(model, config, size), Settings(steps=10, lr=1e-3), switches.local())


@dataclass(frozen=True)
class _Played:
    """Bytes beside weights, gradients, optimizer and average: at most in a pass (``activations``); and ``single``: at most in
    a pass that begins without gradients, these included."""

    activations: int
    single: int


def _on_each(job: Steps, found: _Played, validating: int, switches: Switches, at_once: int) -> Training:
    """What one of ``switches.gpus`` GPUs holds."""
    N, trained = switches.gpus, sum(job.sizes)

    def shared(size: int) -> int:
        return -(-size // N)

    weights, gradients = shared(_FLOAT32 * job.total), shared(_FLOAT32 * trained)
    optimizer, average = shared(switches.optimizer_bytes(job.sizes)), shared(_FLOAT32 * trained)
    host = 0
    if switches.ema == "host":
        host, average = 2 * average, 0  # the average, and the weights on their way into it
    gathered = 0
    if N > 1:
        width = _BFLOAT16 if switches.precision == BFLOAT16 else _FLOAT32
        # The block being computed, the next one, the message that brings it, a block's gradients and their float32 sums;
        # and of what is in no block (kept in float32) weights, gradients and their sums.
        gathered = (4 * width + _FLOAT32) * job.block + 3 * _FLOAT32 * job.rest
    states = weights + optimizer + average
    if N == 1 and -(-job.batch // at_once) == 1:
        peak = states + max(found.single, gradients)
    else:
        peak = states + gradients + found.activations + gathered
    # Where weights are spread, those that the average takes the place of are kept beside it meanwhile.
    validation = states + validating + gathered + (average if N > 1 else 0)
    return Training(
        weights, gradients, optimizer, average, found.activations, gathered, peak, validation, host, at_once
    )


# --- sampling --------------------------------------------------------------------------------------------------------


def evaluation(config: RunConfig, rows: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that one evaluation of an expert on ``rows`` rows holds beside its weights: without a backward pass as many in a
    network with one block of each kind."""
    with fake(), Held() as held, torch.no_grad():
        model = expert(shortened(config)).eval()
        _held(model, dtype)
        one = clips(config, rows)
        before = held.now
        held.reset_peak()
        output = model(one.x_t.to(dtype), one.t.to(dtype), one.cond.to("cpu", dtype))
        assert output.shape == one.x_t.shape
        taken: int = held.peak - before
        return taken


def shortened(config: RunConfig) -> RunConfig:
    """The same run with one block of each kind."""
    part = config.expert
    network = {key: min(value, 1) if key in _DEPTHS else value for key, value in part.network.items()}
    fewer = {"double_blocks": min(part.double_blocks, 1), "single_blocks": min(part.single_blocks, 1)}
    return config.model_copy(update={"expert": part.model_copy(update={**fewer, "network": network})})
