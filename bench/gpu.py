"""What a training step and a clip cost on one GPU: rate, MFU, memory, against diffusers' networks in the loops of its users.

    python -m bench.gpu [--size NAME ...] [--small] [--out FILE]

All contenders begin with the same weights, see the same clips in bfloat16 autocast, and must agree on their losses first.

- **diffusers' example loop**: diffusers' own network, ``Accelerator(mixed_precision="bf16")``, AdamW as torch makes it,
  ``accumulate``, ``backward``, ``clip_grad_norm_``, the loss read back at every step for the log, as its training examples
  have it; its batches lie on the GPU already.
- **a tuned loop**: what somebody who knows the GPU would write by hand over the same network: fused AdamW, nothing read back,
  ``compile_repeated_blocks``.
- **ours**: ``training.loop.Trainer`` over a shard, with reading, noise and transfer; plain, and with ``--compile``.

All keep an average of the weights. Steps are timed in stretches, each ended by waiting for the GPU, contenders in turn. MFU is
the ledger's FLOPs (``backbones.flops``) per second over the card's dense bfloat16 peak (``planning.hardware``). Memory is what
torch's allocator had given out at most, less what lay there before the contender was made.

Sampling is in float32 with TF32 products, as ``archipel generate`` does it: one network in our loop against diffusers' own
pipelines, and an ensemble's strategies against the monolith. Latents must agree first.

--small runs everything in small on the CPU, in float32: only to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import config
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.contracts import Conditioning, Velocity
from archipel.ensemble.strategies import Mixture, one_each
from archipel.flow import samplers
from archipel.planning.hardware import GPUS
from archipel.training import switches
from archipel.training.batches import Batch, open_shard
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer
from archipel.training.objective import FlowObjective
from bench import backbone_loop, common
from bench.sampling import arms
from bench.top1 import inputs, networks
from bench.training_step import Accelerate, Bare, make_shard

WHAT = "training steps and clips on one GPU"
EXAMPLE, TUNED = "diffusers' example loop", "a tuned loop, blocks compiled"
PLAIN, COMPILED = "ours", "ours, blocks compiled"
TRAINING_AIM, SAMPLING_AIM = 1.02, 1.0
MFU_AIM, HALF_FROM = 0.5, 500_000_000  # of networks of more parameters
COMPARED = 4  # steps whose losses are held against each other
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative difference of those losses
CLIPS_APART = 2e-2  # TF32 keeps 10 bits: relative to the largest latent
PIPELINES = {
    "flux": "FluxPipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "hunyuan": "HunyuanVideoPipeline",
}
CLIPS: dict[str, Any] = {"clips": {"frames": 16, "size": 64}}
# Clips, network, and the batches that are tried; "1b" is what point 6 of the plan wants half of the peak for.
SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "7m": ({"expert": {"width": 256, "heads": 8, "rope_axes": [8, 12, 12]}}, (48, 384)),
    "29m": (
        {
            "codec": {"channels": 96},
            "expert": {"width": 384, "heads": 6, "double_blocks": 2, "single_blocks": 8},
        },
        (32, 256),
    ),
    "1b": (
        {
            "clips": {"size": 128},
            "codec": {"channels": 96},
            "expert": {
                "width": 2048,
                "heads": 16,
                "rope_axes": [16, 56, 56],
                "double_blocks": 2,
                "single_blocks": 11,
            },
        },
        (16, 32),
    ),
}
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "small": (
        {
            "clips": {"size": 16},
            "expert": {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1},
        },
        (4,),
    )
}


def place() -> str:
    """The GPU. Raises AbsentError where torch sees none."""
    if not torch.cuda.is_available():
        raise common.AbsentError("torch sees no GPU here")
    torch.set_float32_matmul_precision("high")
    return "cuda"


def stated() -> float | None:
    """The dense bfloat16 peak that the maker states of this GPU, FLOPs a second; None where planning does not list it."""
    return peak_of(torch.cuda.get_device_name())


def peak_of(name: str) -> float | None:
    """By the name that the driver gives: "NVIDIA H100 80GB HBM3" is listed, its slower sister "NVIDIA H100 PCIe" is not."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    known = {*words, *map("".join, itertools.pairwise(words))}
    if "h100" in known and known & {"pcie", "nvl"}:
        return None
    return next((gpu.bfloat16 for key, gpu in GPUS.items() if key in known), None)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- training --------------------------------------------------------------------------------------------------------


class Looped(Bare):
    """A loop over diffusers' network that draws its batches before any time is taken."""

    def __init__(self, network: Any, settings: Settings, ids: Tensor, batches: list[Batch], precision: str) -> None:
        self.batches, self.precision, self.device = batches, precision, ids.device.type
        super().__init__(network, settings, ids)

    def go(self) -> float | Tensor:
        return self.advance(self.batches[self.step % len(self.batches)])

    def close(self) -> None:
        pass


class Example(Looped, Accelerate):
    """As diffusers' training examples have it."""

    def __init__(self, *given: Any) -> None:
        from accelerate import Accelerator

        super().__init__(*given)
        plain = [{key: group[key] for key in ("params", "weight_decay")} for group in self.optimizer.param_groups]
        mixed = "bf16" if self.precision == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=self.device == "cpu", mixed_precision=mixed)
        self.network, self.optimizer = self.accelerator.prepare(
            self.network, torch.optim.AdamW(plain, lr=self.settings.lr, betas=self.settings.betas)
        )


class Tuned(Looped):
    """As somebody who knows the GPU would write it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        network: Any = self.network
        network.compile_repeated_blocks(backend=switches.BACKEND)

    def read(self, loss: Tensor) -> Tensor:
        return loss.detach()

    def loss(self, batch: Batch, x: Tensor, mask: Tensor, L: int) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return super().loss(batch, x, mask, L)


class Ours:
    """The project's trainer over a shard."""

    def __init__(self, of: config.RunConfig, shard: Path, local: Local) -> None:
        self.trainer = Trainer(objective(of, shard, local.device or "cpu"), Settings.of(of.expert), local)

    def go(self) -> Tensor:
        return self.trainer.advance()[0]

    def close(self) -> None:
        self.trainer.finish()


def objective(of: config.RunConfig, shard: Path, device: str) -> FlowObjective:
    batch = of.expert.batch
    return FlowObjective(
        build_expert(of, seed=0), open_shard(shard), seed=0, batch=batch, text_dropout=0.1, device=device
    )


class Contender:
    """A loop after its first steps: their losses, and the bytes that it took at most (None on a CPU)."""

    def __init__(self, make: Callable[[], Looped | Ours], device: str) -> None:
        free()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        self.loop, self.device, self.memory = make(), device, None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.losses = [float(self.loop.go()) for _ in range(COMPARED)]
        if device == "cuda":
            self.memory = torch.cuda.max_memory_allocated() - before

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.loop.go()
        wait(self.device)

    def apart(self, other: Contender) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(self.losses, other.losses, strict=True))


def training_rows(b: common.Benchmark, name: str, values: dict[str, Any], batch: int, device: str) -> None:
    """Our trainer against both loops at one size and batch; contenders lie on the GPU in pairs."""
    small = device == "cpu"
    precision, steps, rounds = ("float32", 2, 2) if small else ("bfloat16", 20, 6)
    of = config.build(config.merge(values, {"expert": {"batch": batch, "steps": 100_000, "warmup": 20}}))
    work = flops.training_flops(flops.expert_forward_flops(of), 1, batch)
    case, peak = f"{name}, a step of {batch} clips", None if small else stated()

    def told(who: str, contender: Contender, taken: common.Seconds) -> None:
        second = statistics.median(taken.wall) / steps
        b.tables.setdefault(f"training in {precision}", []).append(
            {
                "size": name,
                "batch": batch,
                "loop": who,
                "ms a step": 1e3 * second,
                "clips a second": batch / second,
                "TFLOP/s": work / second / 1e12,
                "MFU": peak and work / second / peak,
                "GiB at most": contender.memory and contender.memory / 2**30,
            }
        )

    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard"
        make_shard(shard, of)
        start = objective(of, shard, "cpu")
        model: Any = start.model
        b.facts[f"{name}: parameters"], b.facts[f"{case}: TFLOP"] = model.parameters_total, work / 1e12
        batches = [to(start.batch(step), device) for step in range(2 * COMPARED)]
        given = (model.network, Settings.of(of.expert), positions(of).to(device), batches, precision)
        pairs: dict[str, tuple[Callable[[], Looped], tuple[str, ...]]] = {}
        if b.has("accelerate"):
            pairs[EXAMPLE] = (partial(Example, *given), (PLAIN, COMPILED))
        pairs[TUNED] = (partial(Tuned, *given), (COMPILED,))
        for peer, (make, whose) in pairs.items():
            theirs = Contender(make, device)
            for who in whose:
                local = Local(device, precision=precision, compile=who == COMPILED)
                ours = Contender(partial(Ours, of, shard, local), device)
                b.facts[f"{case}: losses of {who} apart from {peer}"] = apart = ours.apart(theirs)
                if not apart <= TOLERANCE[precision]:
                    raise common.DifferentError(f"{case}: {who} differs from {peer} by {apart:.1e} in its losses")
                turns = {"": partial(theirs.steps, steps), who: partial(ours.steps, steps)}
                taken = common.interleave(turns, rounds)
                # The loops that are alike are held to an aim: plain against plain, compiled against compiled.
                aim = TRAINING_AIM if (who == COMPILED) == (peer == TUNED) else None
                b.rows.append(common.versus(f"{case}, {who}", peer, taken[who], taken[""], aim))
                if aim is not None:
                    told(peer, theirs, taken[""])
                    told(who, ours, taken[who])
                if aim is not None and who == COMPILED and peak and model.parameters_total > HALF_FROM:
                    half = steps * work / (MFU_AIM * peak)
                    b.rows.append(
                        common.versus(f"{case}, {who}", f"{MFU_AIM:.0%} MFU", taken[who], goal(half, rounds), 1.0)
                    )
                ours.loop.close()
                del ours, turns
            del theirs
    free()


def goal(seconds: float, rounds: int) -> common.Seconds:
    return common.Seconds([seconds] * rounds, [seconds] * rounds)


def to(batch: Batch, device: str) -> Batch:
    """The batch on a device, and nothing of it still on the way."""
    moved = {key: getattr(batch, key).to(device) for key in ("x0", "noise", "t", "cond", "cluster", "x_t")}
    return Batch(**moved)


def positions(of: config.RunConfig) -> Tensor:
    """Of the video tokens (N, 3), as FLUX counts them."""
    _, T, H, W = flops.latent_shape(of)
    return torch.cartesian_prod(torch.arange(T), torch.arange(H), torch.arange(W)).float()


# --- sampling --------------------------------------------------------------------------------------------------------


def pipeline_rows(b: common.Benchmark, device: str) -> None:
    """One network in our loop against diffusers' pipelines."""
    small = device == "cpu"
    steps, rounds = (2, 2) if small else (20, 6)
    for name, pipeline in PIPELINES.items():
        made = backbone_loop.settings(name, small)
        model, plain = backbone_loop.pair(made)
        noise, cond = inputs(made, 1)
        noise, cond = noise.to(device), Conditioning(cond.tokens, cond.mask | True, cond.pooled).to(device)
        peer = backbone_loop.theirs(plain.to(device), made, noise, cond, steps)
        for guidance in (1.0, backbone_loop.GUIDANCE):
            velocity = Mixture([model.to(device)], one_each([0], 1), guidance)
            ours = partial(samplers.sample, velocity, noise, cond, steps=steps, shift=backbone_loop.SHIFT)
            case = f"{name}, one clip, {steps} steps, guidance {guidance:g}"
            agree(b, case, ours(), peer(guidance))
            turns: dict[str, Callable[[], Any]] = {"ours": ours, "theirs": partial(peer, guidance)}
            taken = common.interleave({key: partial(then, turn, device) for key, turn in turns.items()}, rounds)
            b.rows.append(common.versus(case, pipeline, taken["ours"], taken["theirs"], SAMPLING_AIM))


def strategy_rows(b: common.Benchmark, name: str, values: dict[str, Any], batch: int, device: str) -> None:
    """An ensemble against the monolith; its experts are copies, so that every strategy must give the monolith's latents."""
    small = device == "cpu"
    steps, rounds = (2, 2) if small else (20, 6)
    of = config.build(values)
    monolith, router = networks(of)
    monolith, router = monolith.to(device), router.to(device)
    experts: list[Velocity] = [copy.deepcopy(monolith) for _ in range(of.partition.k)]
    noise, cond = inputs(of, batch)
    noise, cond = noise.to(device), cond.to(device)
    made = arms(experts, router, batch, of.sample.guidance)

    def clip(arm: str) -> Tensor:
        return samplers.sample(made[arm](), noise, cond, steps=steps)

    case = f"{name}, {batch} clips, {steps} steps, guidance {of.sample.guidance:g}"
    wanted = clip("monolith")
    names = ("monolith", "top1", "top2", "full")
    for arm in names[1:]:
        agree(b, f"{case}, {arm}", clip(arm), wanted)
    taken = common.interleave({arm: partial(then, partial(clip, arm), device) for arm in names}, rounds)
    for arm in names:
        if arm != "monolith":
            b.rows.append(common.versus(f"{case}, {arm}", "monolith", taken[arm], taken["monolith"]))
        second = statistics.median(taken[arm].wall)
        b.tables.setdefault("sampling", []).append(
            {"size": name, "clips": batch, "strategy": arm, "seconds": second, "clips a second": batch / second}
        )


def agree(b: common.Benchmark, case: str, found: Tensor, wanted: Tensor) -> None:
    """Write down how far latents are apart. Raises DifferentError where it is more than rounding."""
    b.facts[f"{case}: apart, relative"] = apart = float((found - wanted).abs().max() / wanted.abs().max())
    if not apart <= CLIPS_APART:
        raise common.DifferentError(f"{case}: latents differ by {apart:.1e}")


def then(turn: Callable[[], Any], device: str) -> None:
    turn()
    wait(device)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Compiled blocks, ours and theirs, end in this one."""
    before, switches.BACKEND = switches.BACKEND, name
    try:
        yield
    finally:
        switches.BACKEND = before


def run(small: bool = False, only: Iterable[str] = ()) -> dict[str, Any]:
    device = "cpu" if small else place()
    sizes = SMALL if small else {name: size for name, size in SIZES.items() if not only or name in only}
    with (
        backend("aot_eager" if small else switches.BACKEND),
        common.Benchmark("gpu", WHAT, ("torch", "diffusers", "accelerate", "triton")) as b,
    ):
        if device == "cuda":
            b.facts["GPU"], b.facts["CUDA"] = torch.cuda.get_device_name(), torch.version.cuda
        for name, (values, batches) in sizes.items():
            for batch in batches:
                training_rows(b, name, config.merge(CLIPS, values), batch, device)
        for name, (values, _) in sizes.items():
            if name != "1b":
                for batch in (1, 4) if small else (1, 64):
                    strategy_rows(b, name, config.merge(CLIPS, values), batch, device)
        pipeline_rows(b, device)
    return b.record


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--size", action="append", choices=tuple(SIZES), help="may be given several times")
    options: argparse.Namespace = made.parse_args()
    common.finish(options, lambda: run(options.small, options.size or ()))


if __name__ == "__main__":
    main()
