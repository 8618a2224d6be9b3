"""The plan of a run: what one expert, all of them, and the router cost, and where that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archipel import FORMAT
from archipel.backbones import flops, networks, spending
from archipel.backbones.adapters import adapter_of
from archipel.backbones.registry import meta_shapes
from archipel.config import RunConfig
from archipel.planning import fitting, parts, sizes
from archipel.planning.hardware import USABLE, Gpu, hours
from archipel.planning.memory import Steps, Training, evaluation, expert
from archipel.planning.switches import Switches
from archipel.run import MONOLITH, ROUTER
from archipel.training import budget

_FLOAT32, _BFLOAT16 = 4, 2
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Counts:
    """Parameters. ``expert``: of one expert's network; ``trained``: those of them that its training changes."""

    expert: int
    trained: int
    monolith: int
    router: int
    total: int  # of everything that the experts' side keeps: K experts (or one base and K adapters) and the router


def counts(config: RunConfig) -> Counts:
    """Built without memory: nothing is allocated whatever the size."""
    model = expert(config)
    whole, trained = model.parameters_total, sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = trained if adapter_of(config) is not None else 0
    monolith = _numbers(networks.monolith_network(config)) + more
    router, k = _numbers(networks.router_network(config)), config.partition.k
    return Counts(whole, trained, monolith, router, (whole - trained) + k * trained + router)


def _numbers(network: networks.Network) -> int:
    return sum(torch.Size(shape).numel() for shape in meta_shapes(network).values())


@dataclass(frozen=True)
class Work:
    """Training FLOPs (``step``, ``forward``: one expert's step of its batch, and its network on one clip)."""

    forward: int
    step: int
    expert: int
    router: int
    archipelago: int
    monolith: int
    clip: int  # sampling one clip by the primary strategy


def work(config: RunConfig) -> Work:
    """From the closed forms that the ledger uses."""
    part, router, k = config.expert, config.router, config.partition.k
    one = spending.training_flops(config, "0", part.steps, part.batch)
    return Work(
        forward=spending.forward_flops(config, "0"),
        step=spending.training_flops(config, "0", 1, part.batch),
        expert=one,
        router=spending.training_flops(config, ROUTER, router.steps, router.batch),
        archipelago=int(config.compute.archipelago_flops)
        or k * one + spending.training_flops(config, ROUTER, router.steps, router.batch),
        monolith=int(config.compute.monolith_flops)
        or spending.training_flops(config, MONOLITH, config.monolith.steps, config.monolith.batch),
        clip=budget.sampling(config)["per_clip"][config.sample.strategy]["total"],
    )


@dataclass(frozen=True)
class Sampling:
    """Bytes for one clip at a time. ``gpu``: what `archipel generate` puts on a GPU (float32: every network that the
    strategy may ask, and one evaluation); ``host``: codec and text encoders, which it computes on the CPU. ``bfloat16``: an
    exported pipeline that is wholly on the GPU in bfloat16; ``offloaded``: one that brings each part there in turn."""

    gpu: int
    host: int
    bfloat16: int
    offloaded: int
    experts: int
    weights: int
    evaluation: int
    decoding: int


def sampling(config: RunConfig, number: Counts, codec: parts.Part, texts: Sequence[parts.Part]) -> Sampling:
    rows = 1 if config.sample.guidance in (0, 1) else 2
    held = 1 if config.sample.strategy == MONOLITH else config.partition.k
    router = 0 if config.sample.strategy == MONOLITH else number.router
    one = number.monolith if config.sample.strategy == MONOLITH else number.expert
    frozen = one - number.trained
    networks_ = frozen + held * number.trained + router
    full, half = evaluation(config, rows), evaluation(config, rows, torch.bfloat16)
    decoding, words = codec.working or 0, sum(part.weights for part in texts)
    small = [part.weights // 2 for part in texts]
    return Sampling(
        gpu=_FLOAT32 * networks_ + full,
        host=codec.weights + decoding + words,
        bfloat16=_BFLOAT16 * networks_ + (codec.weights + words) // 2 + max(half, decoding // 2),
        offloaded=max([_BFLOAT16 * one + half, (codec.weights + decoding) // 2, *small]),
        experts=held,
        weights=_FLOAT32 * networks_,
        evaluation=full,
        decoding=decoding,
    )


@dataclass(frozen=True)
class Plan:
    """All of it. ``kept``, ``checkpointed``: a training step without and with gradient checkpointing, all else alike;
    ``fits``: per GPU what it takes (see ``fitting``)."""

    config: RunConfig
    switches: Switches
    params: Counts
    flops: Work
    kept: Training
    checkpointed: Training
    sampling: Sampling
    codec: parts.Part
    texts: list[parts.Part]
    disk: sizes.Disk | None
    clips: int | None
    gpus: list[Gpu]
    fits: list[fitting.Fit]

    @property
    def train(self) -> Training:
        return self.checkpointed if self.switches.checkpointing else self.kept

    def hours(self, gpu: Gpu) -> dict[str, float]:
        """Of one expert, the monolith and the router on ``switches.gpus`` GPUs each, and GPU hours of experts and router."""

        def of(total: float, count: int = self.switches.gpus) -> float:
            return hours(total, gpu, self.switches.precision, self.switches.mfu, count)

        return {
            "expert": of(self.flops.expert),
            "monolith": of(self.flops.monolith),
            "router": of(self.flops.router),
            "gpu_hours": of(self.flops.archipelago, 1),
        }


def make(
    config: RunConfig,
    switches: Switches,
    gpus: Sequence[Gpu],
    *,
    clips: int | None = None,
    root: Path | None = None,
    tell: Tell = lambda text: None,
) -> Plan:
    """The plan of a resolved configuration. ``clips``: how many there are, where known; ``root``: the run's folder, whose
    own codec and text encoders count; ``tell`` is told what is done, since big networks take a while.

    Raises ConfigError where a part cannot be what ``run.toml`` says.
    """
    tell("parameters and FLOPs")
    number, spent = counts(config), work(config)
    codec, texts = parts.codec(config, root), parts.text(config, root)
    tell("sampling: one evaluation and one decoding")
    drawn = sampling(config, number, codec, texts)
    steps = Steps(config)
    tell("training: one step")
    kept = steps.of(switches.but(checkpointing=False))
    tell("training: one step with checkpointing")
    checkpointed = steps.of(switches.but(checkpointing=True))
    tell("where it fits")
    fits = [fitting.fit(steps, switches, gpu, drawn.gpu, drawn.bfloat16, drawn.offloaded) for gpu in gpus]
    trained = [number.trained] * config.partition.k
    trained += [number.trained + number.monolith - number.expert, number.router]
    frozen = _FLOAT32 * (number.expert - number.trained)
    if not frozen and config.expert.weights:
        frozen = _FLOAT32 * number.expert  # what every job begins with
    disk = None if clips is None else sizes.disk(config, clips, trained, frozen, codec.weights)
    return Plan(config, switches, number, spent, kept, checkpointed, drawn, codec, texts, disk, clips, list(gpus), fits)


# --- as JSON -----------------------------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values; bytes, FLOPs and hours as numbers."""
    config, train, drawn = plan.config, plan.train, plan.sampling
    latent, text = flops.latent_shape(config), flops.text_shape(config)
    return {
        "format": FORMAT,
        "preset": config.run.preset,
        "experts": config.partition.k,
        "network": networks.expert_network(config),
        "latent_shape": list(latent),
        "text_shape": list(text),
        "params_per_expert": plan.params.expert,
        "params_trained_per_expert": plan.params.trained,
        "params_monolith": plan.params.monolith,
        "params_router": plan.params.router,
        "params_total": plan.params.total,
        "params_codec": plan.codec.parameters,
        "params_text": sum(part.parameters for part in plan.texts),
        "flops_per_clip_forward": plan.flops.forward,
        "flops_per_step": plan.flops.step,
        "flops_per_expert": plan.flops.expert,
        "flops_router": plan.flops.router,
        "flops_total": plan.flops.archipelago,
        "flops_monolith": plan.flops.monolith,
        "flops_per_sample": plan.flops.clip,
        "train_bytes_per_gpu": train.needed,
        "train_bytes_per_gpu_kept": plan.kept.needed,
        "train_bytes_per_gpu_checkpointed": plan.checkpointed.needed,
        "train_host_bytes_per_gpu": train.host,
        "train": {"kept": dataclasses.asdict(plan.kept), "checkpointed": dataclasses.asdict(plan.checkpointed)},
        "sample_bytes_per_gpu": drawn.gpu,
        "sample_bytes_host": drawn.host,
        "sample_bytes_per_gpu_bfloat16": drawn.bfloat16,
        "sample_bytes_per_gpu_offloaded": drawn.offloaded,
        "sample": dataclasses.asdict(drawn),
        "clips": plan.clips,
        "cache_bytes": None if plan.disk is None else plan.disk.cache,
        "bucket_bytes": None if plan.disk is None else plan.disk.bucket,
        "bucket": None if plan.disk is None else dataclasses.asdict(plan.disk),
        "switches": dataclasses.asdict(plan.switches),
        "hours": {gpu.key: plan.hours(gpu) for gpu in plan.gpus},
        "fits": {fit.gpu.key: fit.as_json() for fit in plan.fits},
        "assumptions": assumptions(plan),
    }


def assumptions(plan: Plan) -> list[str]:
    """What the numbers stand on, a sentence each."""
    switches = plan.switches
    said = [
        f"hours at {switches.mfu:.0%} of the peak that the maker states for {switches.precision} "
        f"({'TF32, ' if switches.precision == 'float32' else ''}dense); blocks that checkpointing computes again are not in "
        "the FLOPs and lower the share that is reached; preparing clips is not counted",
        f"{USABLE:.0%} of a GPU's memory can be filled with tensors; what kernels take for themselves, convolutions in "
        "decoding above all, is not counted",
        f"clips at once on a GPU: {plan.train.clips} in training, "
        f"{plan.switches.micro_batch or 64} at most in validation (both follow --micro-batch)",
        f"parts: {plan.codec.told}; {', '.join(part.told for part in plan.texts)}",
    ]
    if switches.gpus > 1:
        said.append(
            "several GPUs hold an expert together (FSDP): what they gather of each other's weights is estimated from the size of "
            "a block, not played through"
        )
    if plan.clips is None:
        said.append("disk: unknown, as the source does not say how many clips there are: give --clips N")
    return said
