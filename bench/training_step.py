"""A training step through our loop against a bare loop over the same diffusers model.

    python -m bench.training_step [--small] [--out FILE]

The bare loop is what one would write by hand: diffusers' own call, mean squared error, clipping, fused AdamW and a weight
average, on batches that are handed to it for nothing. Ours is ``training.loop.fit`` as it runs in a job, with reading the
shard, drawing noise and time per clip, journal, progress file and stop flag. Both start from the same weights, see the
same batches, and must agree on losses and weights before anything is reported. Steps of the two alternate, one by one;
steps that validate or save are left out.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archipel import config, store
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.errors import Stopped
from archipel.progress import StopFlag
from archipel.training.batches import Batch, open_shard
from archipel.training.ema import decay, weight
from archipel.training.loop import Settings, fit
from archipel.training.objective import FlowObjective
from bench import common

AIM = 1.02
WHAT = "a training step as a job takes it"
WARM = 5  # steps that are compared and not timed
TOLERANCE = 1e-4  # relative difference of losses over the compared steps
DRIFT = 1e-2  # relative difference of the final weights, tensor by tensor


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


class Alternating(FlowObjective):
    """Our objective, with one bare step before each of ours: the clock of ours stands still meanwhile."""

    bare: Bare

    def start(self, bare: Bare) -> None:
        self.bare = bare
        self.ours, self.theirs = common.Seconds(), common.Seconds()
        self.losses: list[tuple[float, float]] = []
        self._began: tuple[float, float] | None = None

    def batch(self, step: int) -> Batch:
        now = common.clocks()
        if self._began is not None:
            self.ours.add(self._began, now)
        same = super().batch(step)  # for the bare loop, for nothing
        began = common.clocks()
        self._bare_loss = self.bare.advance(same)
        self._began = common.clocks()
        self.theirs.add(began, self._began)
        return super().batch(step)

    def loss(self, batch: Batch) -> Tensor:
        losses = super().loss(batch)
        if torch.is_grad_enabled() and len(self.losses) < WARM:
            self.losses.append((float(losses.detach().mean()), self._bare_loss))
        return losses


def make_shard(folder: Path, settings: config.RunConfig, clips: int = 150) -> None:
    for name, count in (("train", clips), ("validation", 16)):
        store.write_tensors(folder / f"{name}.safetensors", common.clip_arrays(settings, count))
    store.write_card(folder, "shard", "bench", ["train.safetensors", "validation.safetensors"])


def run(small: bool = False) -> dict[str, Any]:
    steps, batch = (8, 80)[not small], (4, config.RunConfig().expert.batch)[not small]
    settings = config.build({"expert": {"batch": batch, "steps": 1000, "warmup": 20}})
    latent = flops.latent_shape(settings)
    model = build_expert(settings, seed=0)
    plan = Settings.of(settings.expert)
    ids = torch.tensor([[t, h, w] for t in range(latent[1]) for h in range(latent[2]) for w in range(latent[3])])
    with tempfile.TemporaryDirectory() as name, common.Benchmark("training_step", WHAT, ("torch", "diffusers")) as b:
        folder = Path(name)
        make_shard(folder / "shard", settings)
        objective = Alternating(model, open_shard(folder / "shard"), seed=0, batch=batch, text_dropout=0.1)
        bare = Bare(model.network, plan, ids.float())
        objective.start(bare)
        with contextlib.suppress(Stopped):
            fit(objective, plan, folder / "job", After(steps + WARM + 1), run_id="bench", label="bench")
        worst = max(abs(x - y) / abs(y) for x, y in objective.losses)
        finals = zip(model.network.parameters(), bare.parameters, strict=True)
        drift = max(float(((x - y).norm() / y.norm().clamp(min=1e-3)).detach()) for x, y in finals)
        if worst > TOLERANCE or drift > DRIFT:
            raise common.DifferentError(f"the two loops differ: losses by {worst:.2e}, final weights by {drift:.2e}")
        apart = (plan.validate_every, plan.checkpoint_every)
        plain = [s for s in range(WARM, len(objective.ours.wall)) if all((s + 1) % every for every in apart)]
        case = f"a step of {batch} clips"
        b.rows.append(common.versus(case, "a bare loop", objective.ours[plain], objective.theirs[plain], AIM))
        b.facts |= {
            "parameters": model.parameters_total,
            "GFLOP per step": flops.training_flops(flops.expert_forward_flops(settings), 1, batch) / 1e9,
            "losses differ by": worst,
            "final weights differ by": drift,
        }
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
