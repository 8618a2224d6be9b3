"""A training step through our loop against a bare loop over the same diffusers model.

    python bench/training_step.py [--steps 40] [--batch 16] [--out training_step.json]

The bare loop is what one would write by hand: diffusers' own call, mean squared error, clipping, fused AdamW and a weight
average, on batches that are handed to it for nothing. Ours is ``training.loop.fit`` as it runs in a job, with reading the
shard, drawing noise and time per clip, journal, progress file and stop flag. Both start from the same weights, see the
same batches, and must agree on losses and weights before anything is reported. Steps of the two alternate, one by one;
steps that validate or save are left out. One thread.

``wall`` is what a person waits; ``cpu`` is what the process computed, which a busy machine disturbs less: where "busy" is
true, read ``cpu``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from archipel import config, store  # noqa: E402
from archipel.backbones import flops  # noqa: E402
from archipel.backbones.flux import build_expert  # noqa: E402
from archipel.errors import Stopped  # noqa: E402
from archipel.progress import StopFlag  # noqa: E402
from archipel.training.batches import Batch, open_shard  # noqa: E402
from archipel.training.ema import decay, weight  # noqa: E402
from archipel.training.loop import Settings, fit  # noqa: E402
from archipel.training.objective import FlowObjective  # noqa: E402

WARM = 5  # steps that are compared and not timed
TOLERANCE = 1e-4  # relative difference of losses over the compared steps
BUSY = 0.75  # other work per core above which a result is flagged


class Bare:
    """The loop that one would write by hand."""

    def __init__(self, network: nn.Module, settings: Settings, ids: Tensor) -> None:
        self.network, self.settings, self.ids, self.step = copy.deepcopy(network).train(), settings, ids, 0
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            fused=True,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.beta = decay(settings.ema, settings.steps)

    def advance(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        x, L = batch.x_t, batch.cond.tokens.shape[1]
        mask = torch.cat([batch.cond.mask, torch.ones(len(x), len(self.ids), dtype=torch.bool)], 1)
        output = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=batch.cond.tokens,
            pooled_projections=batch.cond.pooled,
            timestep=batch.t,
            img_ids=self.ids,
            txt_ids=torch.zeros(L, 3),
            joint_attention_kwargs={"attention_mask": mask[:, None, None]},
            return_dict=False,
        )[0]
        loss = nn.functional.mse_loss(output.transpose(1, 2).reshape(x.shape), batch.noise - batch.x0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, weight(self.beta, self.step))
        return loss.item()


class After(StopFlag):
    """Stops a training after so many steps, as --for does after a time."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    return now[0] - began[0], now[1] - began[1]


class Alternating(FlowObjective):
    """Our objective, with one bare step before each of ours: the clock of ours stands still meanwhile."""

    bare: Bare

    def start(self, bare: Bare) -> None:
        self.bare = bare
        self.ours: list[tuple[float, float]] = []  # wall and CPU seconds of each step
        self.theirs: list[tuple[float, float]] = []
        self.losses: list[tuple[float, float]] = []
        self._began: tuple[float, float] | None = None

    def batch(self, step: int) -> Batch:
        now = clocks()
        if self._began is not None:
            self.ours.append(since(self._began, now))
        same = super().batch(step)  # for the bare loop, for nothing
        began = clocks()
        self._bare_loss = self.bare.advance(same)
        self._began = clocks()
        self.theirs.append(since(began, self._began))
        return super().batch(step)

    def loss(self, batch: Batch) -> Tensor:
        losses = super().loss(batch)
        if torch.is_grad_enabled() and len(self.losses) < WARM:
            self.losses.append((float(losses.detach().mean()), self._bare_loss))
        return losses


def make_shard(folder: Path, settings: config.RunConfig, clips: int = 150) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    (L, D, P), latent = flops.text_shape(settings), flops.latent_shape(settings)
    for name, count in (("train", clips), ("validation", 16)):
        tensors = {
            "latents": rng.standard_normal((count, *latent), dtype=np.float32),
            "tokens": rng.standard_normal((count, L, D), dtype=np.float32),
            "mask": np.arange(L)[None] < rng.integers(2, L, count)[:, None],
            "pooled": rng.standard_normal((count, P), dtype=np.float32),
            "cluster": np.zeros(count, np.int64),
            "row": np.arange(count, dtype=np.int64),
        }
        store.write_tensors(folder / f"{name}.safetensors", tensors)
    store.write_card(folder, "shard", "bench", ["train.safetensors", "validation.safetensors"])


def compare(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median and spread of the ratios of neighbouring steps, and the seconds behind them."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = (pairs[int(q * (len(pairs) - 1))] for q in (0.1, 0.9))
    return {
        "ratio": round(statistics.median(pairs), 4),
        "ratio_p10": round(low, 4),
        "ratio_p90": round(high, 4),
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 4),
        "seconds_ours": round(statistics.median(ours), 5),
        "seconds_bare": round(statistics.median(theirs), 5),
    }


def measure(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    settings = config.build({"expert": {"batch": batch, "steps": 1000, "warmup": 20}})
    make_shard(folder / "shard", settings)
    latent = flops.latent_shape(settings)
    model = build_expert(settings, latent, *flops.text_shape(settings), seed=0)
    objective = Alternating(model, open_shard(folder / "shard"), seed=0, batch=batch, text_dropout=0.1)
    plan = Settings.of(settings.expert)
    ids = torch.tensor(
        [[t, h, w] for t in range(latent[1]) for h in range(latent[2]) for w in range(latent[3])]
    ).float()
    bare = Bare(model.network, plan, ids)
    objective.start(bare)
    with contextlib.suppress(Stopped):
        fit(objective, plan, folder / "job", After(steps + WARM + 1), run_id="bench", label="bench")
    worst = max(abs(a - b) / abs(b) for a, b in objective.losses)
    finals = zip(model.network.parameters(), bare.parameters, strict=True)
    drift = max(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in finals)
    if worst > TOLERANCE or drift > 1e-2:
        sys.exit(f"the two loops differ (losses by {worst:.2e}, final weights by {drift:.2e}): nothing is reported")
    apart = (plan.validate_every, plan.checkpoint_every)
    plain = [s for s in range(WARM, len(objective.ours)) if all((s + 1) % every for every in apart)]
    return {
        **{
            clock: compare([objective.ours[s][which] for s in plain], [objective.theirs[s][which] for s in plain])
            for which, clock in enumerate(("wall", "cpu"))
        },
        "steps": len(plain),
        "batch": batch,
        "parameters": model.parameters_total,
        "gflops_per_step": flops.training_flops(flops.expert_forward_flops(settings), 1, batch) / 1e9,
        "losses_differ_by": worst,
        "final_weights_differ_by": drift,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=config.RunConfig().expert.batch)
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: standard output)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before, cores = os.getloadavg()[0], os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.steps, options.batch)
    record = {
        "benchmark": "training step: our loop over a bare loop, aim at most 1.02",
        "threads": 1,
        "interleaved": True,
        "busy": bool(before / cores > BUSY),
        "load_before": before,
        "cores": cores,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {one.__name__: one.__version__ for one in (np, torch, diffusers)},
        "result": result,
    }
    text = json.dumps(record, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
