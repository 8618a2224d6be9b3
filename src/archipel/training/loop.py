"""The one training loop: expert, monolith and router differ only in their ``Objective``.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping, an average of the weights, validation of both, a rate that
depends on the step alone, and checkpoints from which the rest follows bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from archipel import config
from archipel.backbones import lora
from archipel.backbones.base import Backbone
from archipel.errors import ArchipelError, Stopped
from archipel.progress import Progress, StopFlag
from archipel.training import checkpoint, eight_bit, schedule, switches
from archipel.training.ahead import Ahead
from archipel.training.batches import shares
from archipel.training.checkpoint import Checkpoint
from archipel.training.ema import decay
from archipel.training.journal import Journal, read_progress
from archipel.training.local import Local
from archipel.training.precision import FLOAT32, autocast, keep_float32, norms_in_input_dtype
from archipel.training.ranks import ALONE, Ranks

CHECKPOINTS = "checkpoints"
PLAIN = Local()


class Objective(Protocol):
    """What is trained. Nothing in it may depend on the past: ``batch(step)`` is a function of the step.

    Where a batch is computed in parts (several processes, micro-batches) there must be ``size``, its items in all, and
    ``batch(step, part)``, which makes those of a slice only, as they are in the whole batch.

    ``loss`` gives one loss per item (B,), on the model's device. ``validate`` runs without gradients on the weights
    that the model holds just then and returns JSON-able numbers with at least "loss" (a mean over all items), or {}
    where there is nothing to validate on.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def size(self) -> int: ...

    def batch(self, step: int, part: slice | None = None, /) -> Any: ...

    def loss(self, batch: Any) -> Tensor: ...

    def validate(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Settings:
    """How an arm is trained. ``keep``: the final weights are the last average, or the one that validated best."""

    steps: int
    lr: float
    warmup: int = 0
    cooldown: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.05
    validate_every: int = 100
    checkpoint_every: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    keep: str = "last"

    @classmethod
    def of(cls, part: config.Backbone, *, steps: int = 0, lr: float = 0.0, keep: str = "last") -> Settings:
        """From a section of ``run.toml``; the monolith gives its own steps and rate."""
        return cls(
            steps=steps or part.steps,
            lr=lr or part.lr,
            warmup=part.warmup,
            cooldown=part.cooldown,
            weight_decay=part.weight_decay,
            grad_clip=part.grad_clip,
            ema=part.ema,
            validate_every=part.validate_every,
            checkpoint_every=part.checkpoint_every,
            keep=keep,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step: nothing but the step decides it."""
        return schedule.rate(step, peak=self.lr, steps=self.steps, warmup=self.warmup, cooldown=self.cooldown)


def _parts(objective: Objective, local: Local, ranks: Ranks) -> list[tuple[slice, float]] | None:
    """What this process computes of every batch, or None where it computes all of it at once."""
    if ranks.size == 1 and not local.micro_batch:
        return None
    if ranks.size == 1 and local.micro_batch >= objective.size:
        return None
    return shares(objective.size, ranks.size, ranks.rank, local.micro_batch)


@dataclass(frozen=True)
class Outcome:
    """A finished training. ``validation`` is the last {"raw", "ema"}; ``best`` {"step", "loss"} where one was kept."""

    steps: int
    seconds: float
    resumed: int
    validation: dict[str, Any]
    best: dict[str, Any] | None


class Trainer:
    """Model, optimizer and average after ``step`` finished steps."""

    def __init__(self, objective: Objective, settings: Settings, local: Local = PLAIN, ranks: Ranks = ALONE) -> None:
        """The model lies on its device already and is sharded here, where there are several ``ranks``."""
        self.objective, self.settings, self.step = objective, settings, 0
        self.ranks, self._parts = ranks, _parts(objective, local, ranks)
        ranks.shard(objective.model, local.precision)
        if local.precision != FLOAT32 and isinstance(objective.model, Backbone):
            keep_float32(objective.model.ends())
            norms_in_input_dtype(objective.model)
            if ranks.size == 1:  # FSDP2 has half of it in each process, and gathers in bfloat16
                lora.halve(objective.model)
        switches.apply(objective.model, local)
        place = next(objective.model.parameters()).device
        device = place.type
        self._cast = autocast(local.precision, device)
        self._batch: Callable[[int], Any] = objective.batch
        if device == "cuda" and self._parts is None:
            self._batch = Ahead(objective.batch, settings.steps, str(place))
        self.named = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        # Biases and norms are not decayed: pulling them to zero only moves the function.
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = switches.make_optimizer(
            groups, local.optimizer, lr=settings.lr, betas=settings.betas, device=device
        )
        mine = ranks.mine if ranks.size > 1 else None
        self.ema = switches.make_average(objective.model, local.ema, decay(settings.ema, settings.steps), mine)
        self.best: dict[str, Any] | None = None
        self.best_tensors: dict[str, Tensor] = {}

    def advance(self) -> tuple[Tensor, Tensor]:
        """One step: mean loss and gradient norm, detached and still on the device."""
        switches.set_rate(self.optimizer, self.settings.rate(self.step))
        loss = self._whole() if self._parts is None else self._in_parts(self._parts)
        norm = self.ranks.clip(self.parameters, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.step)
        return loss.detach(), norm.detach()

    def _whole(self) -> Tensor:
        batch = self._batch(self.step)
        with self._cast():
            loss = self.objective.loss(batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _in_parts(self, parts: Sequence[tuple[slice, float]]) -> Tensor:
        """This process's share of the mean loss over the whole batch; gradients are of the mean over all processes' clips.

        Each micro-batch's gradients are added to the others' shards at once: holding them back until the last would
        save messages and cost a whole model's memory in each process.
        """
        size, share = self.objective.size, torch.zeros((), device=self.parameters[0].device)
        for part, weight in parts:
            batch = self.objective.batch(self.step, part)
            with self._cast():
                loss = self.objective.loss(batch).sum() * (weight / size)
            # FSDP2 gives the mean of the processes' gradients, and their sum is wanted.
            (loss * self.ranks.size).backward()  # type: ignore[no-untyped-call]
            share += loss.detach()
        return share

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """{"raw": ..., "ema": ...}, or {}; remembers the best average where settings ask for it."""
        self.objective.model.eval()
        with self._cast():
            raw = self.objective.validate()
        with self.ema.applied(), self._cast():
            averaged = self.objective.validate()
        self.objective.model.train()
        if not raw:
            return {}
        # Each process validates on everything; what follows from a last bit must be the same for all.
        loss = self.ranks.same(averaged["loss"])
        if self.settings.keep == "best" and (self.best is None or loss < self.best["loss"]):
            self.best = {"step": self.step, "loss": loss}
            self.best_tensors = {name: value.clone() for name, value in self.ema.tensors.items()}
        return {"raw": raw, "ema": averaged}

    def arrays(self) -> dict[str, Any]:
        """The state as whole numpy arrays by name: views of it where one process has it on the CPU; None on all but the
        first of several processes, who give their parts."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "weight": dict(self.named),
            "average": self.ema.tensors,
            "moment1": {name: self._moment(p, "exp_avg") for name, p in self.named},
            "moment2": {name: self._moment(p, "exp_avg_sq") for name, p in self.named},
            "best": self.best_tensors,
        }
        named = dict(self.named)
        return {f"{g}/{n}": self.ranks.whole(v, named[n]) for g, values in groups.items() for n, v in values.items()}

    def _moment(self, p: Tensor, name: str) -> Tensor:
        """AdamW's moment of a parameter; zeros where no gradient reaches it (the last double block's text stream, where
        no single block follows), which AdamW keeps no state for."""
        state = self.optimizer.state.get(p, {})
        return eight_bit.plain(state[name]) if name in state else torch.zeros_like(p)

    @torch.no_grad()
    def restore(self, found: Checkpoint) -> None:
        """Continue after ``found.step`` steps. Raises ArchipelError where its tensors are of another model."""
        wanted = {
            f"{g}/{n}": tuple(p.shape) for g in ("weight", "average", "moment1", "moment2") for n, p in self.named
        }
        have = {name: array.shape for name, array in found.arrays.items() if not name.startswith("best/")}
        if wanted != have:
            odd = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
            raise ArchipelError(
                f"checkpoint {found.step} is of another model: {odd[0]} is {have.get(odd[0])}, expected "
                f"{wanted.get(odd[0])}; remove the checkpoints to train anew"
            )
        tensors = {name: torch.tensor(array) for name, array in found.arrays.items()}

        def part(group: str, name: str, p: Tensor) -> Tensor:
            return self.ranks.mine(self.ranks.like(tensors[f"{group}/{name}"], p))

        for name, p in self.named:
            p.copy_(self.ranks.like(tensors[f"weight/{name}"], p))
            first, second = (self.ranks.like(tensors[f"{group}/{name}"], p) for group in ("moment1", "moment2"))
            self.optimizer.state[p] = {
                "step": torch.tensor(float(found.step), device=p.device),
                "exp_avg": eight_bit.kept(self.optimizer, p, first, signed=True),
                "exp_avg_sq": eight_bit.kept(self.optimizer, p, second, signed=False),
            }
        self.ema.restore({name: part("average", name, p) for name, p in self.named})
        self.best = found.manifest.get("best")
        self.best_tensors = {name: part("best", name, p) for name, p in self.named if f"best/{name}" in tensors}
        self.step = found.step

    @torch.no_grad()
    def finish(self) -> None:
        """Put the final weights (the average, or the best one) into the model."""
        final = self.best_tensors or self.ema.tensors
        for name, p in self.named:
            self.ranks.mine(p).copy_(final[name])
        self.objective.model.eval()
        if isinstance(self._batch, Ahead):
            self._batch.close()


def fit(
    objective: Objective,
    settings: Settings,
    folder: Path,
    stop: StopFlag | None = None,
    *,
    run_id: str,
    label: str,
    start: Checkpoint | None = None,
    facts: Callable[[], Mapping[str, Any]] = dict,
    on_checkpoint: Callable[[Path], None] | None = None,
    local: Local = PLAIN,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train to ``settings.steps`` and leave the final weights (average or best) in ``objective.model``.

    ``folder`` gets metrics.jsonl, progress.json and checkpoints/; ``start`` is the checkpoint to continue from
    (``checkpoint.latest(folder / CHECKPOINTS, run_id)``); ``facts()`` goes into every manifest; ``on_checkpoint`` is
    given the folder of each checkpoint right after it is committed, and what it raises ends the training.
    ``local`` says how the batch is computed; of several ``ranks``, who all call this, the first writes.
    Raises Stopped with everything saved where ``stop`` is set, ArchipelError for a loss that is not finite or a
    folder that cannot be written; the newest good checkpoint stays either way.
    """
    trainer = Trainer(objective, settings, local, ranks)
    before = read_progress(folder)
    resumed = max((int(d.get("resumed", 0)) for d in (before, start and start.manifest) if d), default=-1) + 1
    if start is not None:
        trainer.restore(start)
    with _writing(folder, label, trainer):
        journal = Journal(
            folder,
            label,
            steps=settings.steps,
            rate=settings.rate,
            start=trainer.step,
            seconds=float(start.manifest.get("seconds", 0.0)) if start else 0.0,
            resumed=resumed,
            ranks=ranks,
        )
        journal.tell(trainer.step, "starting")
        try:
            return _run(trainer, journal, stop, run_id, start, facts, on_checkpoint)
        except BaseException as error:
            state = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
            with contextlib.suppress(OSError):
                journal.tell(trainer.step, state)
            raise


def _run(
    trainer: Trainer,
    journal: Journal,
    stop: StopFlag | None,
    run_id: str,
    start: Checkpoint | None,
    facts: Callable[[], Mapping[str, Any]],
    on_checkpoint: Callable[[Path], None] | None,
) -> Outcome:
    s, folder, ranks = trainer.settings, journal.folder / CHECKPOINTS, trainer.ranks
    validation: dict[str, Any] = dict(start.manifest.get("validation", {})) if start else {}
    saved = trainer.step if start else -1

    def save() -> None:
        nonlocal saved
        if saved == trainer.step:
            return
        own = {"resumed": journal.resumed, "seconds": journal.seconds, "best": trainer.best, "validation": validation}
        arrays = trainer.arrays()

        def write() -> None:
            made = checkpoint.save(
                folder, trainer.step, arrays, {**facts(), "run": run_id, "name": journal.label, **own}
            )
            if on_checkpoint is not None:
                on_checkpoint(made)

        ranks.lead(write)
        saved = trainer.step

    trainer.objective.model.train()
    with Progress(f"train {journal.label}", s.steps, start=trainer.step, quiet=not ranks.first) as bar:
        while trainer.step < s.steps:
            asked = ranks.asked(stop)
            if asked:
                if saved != trainer.step and trainer.step > 0:
                    journal.flush(trainer.step)
                    save()
                what = f"training {journal.label} (step {trainer.step} of {s.steps})"
                raise ranks.stopped(stop, asked, what)
            journal.add(*trainer.advance())
            done, last = trainer.step, trainer.step == s.steps
            if last or done % s.validate_every == 0:
                validation = trainer.validate()
                journal.flush(done, validation)
            elif done % journal.every == 0 or done % s.checkpoint_every == 0:
                journal.flush(done)
            if last or done % s.checkpoint_every == 0:
                save()
            journal.tell(done)
            bar.update(done, note=f"loss {journal.loss:.4f}")
    save()
    trainer.finish()
    journal.tell(trainer.step, "done")
    return Outcome(trainer.step, journal.seconds, journal.resumed, validation, trainer.best)


@contextlib.contextmanager
def _writing(folder: Path, label: str, trainer: Trainer) -> Iterator[None]:
    """Turn what the file system refuses into a sentence; checkpoints already committed are untouched."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise ArchipelError(
            f"training {label} stopped at step {trainer.step}: {where} cannot be written ({error.strerror or error}): "
            "free space or make it writable, then start again; finished checkpoints are kept"
        ) from error
