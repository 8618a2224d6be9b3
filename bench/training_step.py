"""A training step through our loop against a bare loop over the same diffusers model, and against accelerate's.

    python -m bench.training_step [--small] [--out FILE]

The bare loop is what one would write by hand: diffusers' own call, mean squared error, clipping, fused AdamW and a weight
average, on batches that are handed to it for nothing. accelerate's is the same with ``Accelerator.prepare``, ``accumulate``,
``backward`` and ``clip_grad_norm_``, as diffusers' training examples have them. Ours is ``training.loop.fit`` as it runs in a
job, with reading the shard, drawing noise and time per clip, journal, progress file and stop flag. All start from the same
weights, see the same batches, and must agree on losses and weights before anything is reported. Their steps alternate, one
by one; steps that validate or save are left out.
"""

from __future__ import annotations

import contextlib
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


def theirs(network: Any) -> nn.Module:
    """diffusers' own class with the same weights: ours computes its blocks in another way."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    made: nn.Module = FluxTransformer2DModel.from_config(network.config)
    made.load_state_dict(network.state_dict())
    return made


class Bare:
    """The loop that one would write by hand, on the device of ``ids``."""

    def __init__(self, network: nn.Module, settings: Settings, ids: Tensor) -> None:
        self.network = theirs(network).to(ids.device).train()
        self.settings, self.ids, self.step = settings, ids, 0
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

    def advance(self, batch: Batch) -> float | Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        x, L = batch.x_t, batch.cond.tokens.shape[1]
        mask = torch.cat([batch.cond.mask, torch.ones(len(x), len(self.ids), dtype=torch.bool, device=x.device)], 1)
        loss = self.loss(batch, x, mask, L)
        self.apply(loss)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, weight(self.beta, self.step))
        return self.read(loss)

    def read(self, loss: Tensor) -> float | Tensor:
        return loss.item()

    def loss(self, batch: Batch, x: Tensor, mask: Tensor, L: int) -> Tensor:
        output = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=batch.cond.tokens,
            pooled_projections=batch.cond.pooled,
            timestep=batch.t,
            img_ids=self.ids,
            txt_ids=torch.zeros(L, 3, device=x.device),
            joint_attention_kwargs={"attention_mask": mask[:, None, None]},
            return_dict=False,
        )[0]
        return nn.functional.mse_loss(output.transpose(1, 2).reshape(x.shape), batch.noise - batch.x0)

    def apply(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Accelerate(Bare):
    """Steps as accelerate's users write them; ``accelerator``, and network and optimizer that it has prepared, come from who
    inherits."""

    accelerator: Any

    def advance(self, batch: Batch) -> float | Tensor:
        with self.accelerator.accumulate(self.network):
            return super().advance(batch)

    def apply(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Accelerated(Accelerate):
    """The bare loop's network and optimizer through accelerate."""

    def __init__(self, network: nn.Module, settings: Settings, ids: Tensor) -> None:
        from accelerate import Accelerator

        super().__init__(network, settings, ids)
        self.accelerator = Accelerator(cpu=True)
        self.network, self.optimizer = self.accelerator.prepare(self.network, self.optimizer)


class After(StopFlag):
    """Stops a training after so many steps, as --for does after a time."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


class Alternating(FlowObjective):
    """Our objective, with one step of each peer before each of ours: the clock of ours stands still meanwhile."""

    def start(self, peers: dict[str, Bare]) -> None:
        self.peers = peers
        self.ours, self.theirs = common.Seconds(), {name: common.Seconds() for name in peers}
        self.losses: list[list[float]] = []  # ours first
        self._began: tuple[float, float] | None = None

    def batch(self, step: int, part: slice | None = None) -> Batch:
        now = common.clocks()
        if self._began is not None:
            self.ours.add(self._began, now)
        same = super().batch(step)  # for the peers, for nothing
        found = {}
        for name in list(self.peers)[:: 1 if step % 2 else -1]:
            began = common.clocks()
            found[name] = self.peers[name].advance(same)
            self.theirs[name].add(began, common.clocks())
        self._others = [float(found[name]) for name in self.peers]
        self._began = common.clocks()
        return super().batch(step)

    def loss(self, batch: Batch) -> Tensor:
        losses = super().loss(batch)
        if torch.is_grad_enabled() and len(self.losses) < WARM:
            self.losses.append([float(losses.detach().mean()), *self._others])
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
    packages = ("torch", "diffusers", "accelerate")
    with tempfile.TemporaryDirectory() as name, common.Benchmark("training_step", WHAT, packages) as b:
        folder = Path(name)
        make_shard(folder / "shard", settings)
        objective = Alternating(model, open_shard(folder / "shard"), seed=0, batch=batch, text_dropout=0.1)
        peers: dict[str, Bare] = {"a bare loop": Bare(model.network, plan, ids.float())}
        if b.has("accelerate"):
            peers["accelerate's loop"] = Accelerated(model.network, plan, ids.float())
        objective.start(peers)
        with contextlib.suppress(Stopped):
            fit(objective, plan, folder / "job", After(steps + WARM + 1), run_id="bench", label="bench")
        apart = (plan.validate_every, plan.checkpoint_every)
        plain = [s for s in range(WARM, len(objective.ours.wall)) if all((s + 1) % every for every in apart)]
        for number, (peer, loop) in enumerate(peers.items(), 1):
            worst = max(abs(row[0] - row[number]) / abs(row[number]) for row in objective.losses)
            finals = zip(model.network.parameters(), loop.parameters, strict=True)
            drift = max(float(((x - y).norm() / y.norm().clamp(min=1e-3)).detach()) for x, y in finals)
            if worst > TOLERANCE or drift > DRIFT:
                raise common.DifferentError(f"{peer} differs: losses by {worst:.2e}, final weights by {drift:.2e}")
            b.facts |= {f"losses differ from {peer} by": worst, f"final weights differ from {peer} by": drift}
            taken = objective.theirs[peer][plain]
            b.rows.append(common.versus(f"a step of {batch} clips", peer, objective.ours[plain], taken, AIM))
        b.facts |= {
            "parameters": model.parameters_total,
            "GFLOP per step": flops.training_flops(flops.expert_forward_flops(settings), 1, batch) / 1e9,
        }
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
