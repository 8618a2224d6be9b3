"""A job's own shard, and the batch of a step as a function of (seed, step, item): no state, no order of calls.

Rows come from the endless concatenation of epochs; time, text dropout and noise of a clip from one stream of its own
(``flow.draws``), so a clip at a step meets the same noise in whichever arm and batch it is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import store
from archipel.cache import batch_rows
from archipel.contracts import Conditioning
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.flow import draws, given
from archipel.flow.path import interpolate
from archipel.flow.time import logit_normal, shift_time

VALIDATION = 101  # purpose (see flow.draws) of the fixed noise of validation losses
VALIDATION_TASK = 104  # and of which frames are given there, where a mix is validated at once
_SECOND = 1 << 40  # added to an item's number each further time that one batch holds it
_SHAPES = {"latents": (np.float32, 5), "tokens": (np.float32, 3), "mask": (np.bool_, 2), "pooled": (np.float32, 2)}
_NUMBERS = ("cluster", "row")
_STILLS = ("first", "last")  # (N, C, H, W), and phases_first, phases_last (N, P - 1, C, H, W): see ``flow.given``


@dataclass(frozen=True)
class Batch:
    """x0, noise (B, C, T, H, W), t (B,) in [0, 1], cond (text already dropped), cluster (B,) int64, x_t like x0."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    cond: Conditioning
    cluster: Tensor
    x_t: Tensor

    def __len__(self) -> int:
        return len(self.t)


class Clips:
    """One split of a shard, memory-mapped: ``take(rows)`` reads nothing but those rows."""

    def __init__(self, path: Path) -> None:
        # Plain views of the maps: every slice of a numpy.memmap costs microseconds that a step feels.
        self.path, self._arrays = path, {name: np.asarray(array) for name, array in store.map_tensors(path).items()}
        for name in (*_SHAPES, *_NUMBERS):
            array = self._arrays.get(name)
            dtype, axes = _SHAPES.get(name, (np.int64, 1))
            if array is None or array.dtype != dtype or array.ndim != axes or len(array) != len(self):
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise DamagedError(f"{path}: {name} is {found}, expected {np.dtype(dtype)} with {axes} axes")
        C, _, H, W = self.latent_shape
        self._check("phases", self.phases - 1, *self.latent_shape)
        for name in _STILLS:
            self._check(name, C, H, W)
            if name in self._arrays:
                self._check(f"phases_{name}", self.phases - 1, C, H, W, needed=self.phases > 1)

    def _check(self, name: str, *shape: int, needed: bool = False) -> None:
        """Raise DamagedError where an array that may be missing (not ``needed``) is not float32 (N, *shape)."""
        array = self._arrays.get(name)
        if array is None and not needed:
            return
        if array is None or array.dtype != np.float32 or array.shape != (len(self), *shape):
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise DamagedError(f"{self.path}: {name} are {found}, expected float32 {(len(self), *shape)}")

    def __len__(self) -> int:
        return len(self._arrays["latents"]) if "latents" in self._arrays else 0

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        C, T, H, W = self._arrays["latents"].shape[1:]
        return int(C), int(T), int(H), int(W)

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """(L, D, P)."""
        return (*self._arrays["tokens"].shape[1:], self._arrays["pooled"].shape[1])

    def items(self, rows: np.ndarray) -> list[int]:
        """Manifest rows of shard rows: what noise belongs to, in whichever shard the clip is seen."""
        return [int(item) for item in self._arrays["row"][rows]]

    @property
    def clusters(self) -> np.ndarray:
        """The cluster of every row, int64 (N,)."""
        return self._arrays["cluster"]

    @property
    def phases(self) -> int:
        """Windows per clip, P: 1 and the further ones of ``phases`` (N, P - 1, C, T, H, W)."""
        found = self._arrays.get("phases")
        return 1 if found is None or found.ndim < 2 else 1 + found.shape[1]

    def windows(self, rows: np.ndarray, phase: np.ndarray) -> Tensor:
        """Latents (B, C, T, H, W) of the rows at windows ``phase`` (B,) in [0, P); nothing else is read."""
        latents = np.empty((len(rows), *self.latent_shape), np.float32)
        for place, (row, number) in enumerate(zip(rows, phase, strict=True)):
            latents[place] = self._arrays["phases"][row, number - 1] if number else self._arrays["latents"][row]
        return torch.from_numpy(latents)

    @property
    def stills(self) -> bool:
        """Whether the shard has the latents of first and last frames, which image-to-video training gives."""
        return all(name in self._arrays for name in _STILLS)

    def given(self, rows: np.ndarray, phase: np.ndarray, tasks: Tensor) -> Tensor:
        """The condition (B, C + 1, T, H, W) of the rows at windows ``phase`` (B,) with ``tasks`` (B,): see ``flow.given``.

        Raises MissingStageError where the shard has no stills.
        """
        if not self.stills:
            raise MissingStageError(
                f"{self.path} has no latents of first and last frames, which expert.tasks gives: run `archipel prepare` and "
                "`archipel partition` again"
            )
        stills = {}
        for name in _STILLS:
            frames = np.array(self._arrays[name][rows])
            for place in np.flatnonzero(phase):
                frames[place] = self._arrays[f"phases_{name}"][rows[place], phase[place] - 1]
            stills[name] = torch.from_numpy(frames)
        return given.condition(stills["first"], stills["last"], tasks, self.latent_shape[1])

    def take(self, rows: np.ndarray, device: str = "cpu") -> tuple[Tensor, Conditioning, Tensor]:
        """Latents (B, C, T, H, W), conditioning and cluster (B,) of the rows, as fresh tensors."""
        return put(torch.from_numpy(self._arrays["latents"][rows]), device), *self.captions(rows, device)

    def captions(self, rows: np.ndarray, device: str = "cpu") -> tuple[Conditioning, Tensor]:
        """Conditioning and cluster (B,) of the rows, as fresh tensors."""
        names = ("tokens", "mask", "pooled", "cluster")
        tokens, mask, pooled, cluster = (put(torch.from_numpy(self._arrays[name][rows]), device) for name in names)
        return Conditioning(tokens, mask, pooled), cluster


def put(tensor: Tensor, device: str) -> Tensor:
    """A fresh tensor of the host on ``device``; a GPU fetches it from pinned memory by itself, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)


@dataclass(frozen=True)
class Shard:
    """``train`` (never empty) and ``validation`` (may be); ``start``: what its card says of the weights to begin with, where
    it carries some (see ``training.warm``)."""

    train: Clips
    validation: Clips
    start: Mapping[str, Any] | None = None


def open_shard(folder: Path, *, hashed: bool = True) -> Shard:
    """Open a committed shard after holding it to its checksums (not ``hashed``: somebody beside us just did).

    Raises MissingStageError where it is not finished, DamagedError where it is not what its card says, ArchipelError
    where there is nothing to train on.
    """
    card = store.read_card(folder, "shard")
    if card is None:
        raise MissingStageError(f"{folder} is not finished: run `archipel partition` first")
    problems = store.check_card(folder) if hashed else []
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: run `archipel partition` again to make it anew")
    shard = Shard(Clips(folder / "train.safetensors"), Clips(folder / "validation.safetensors"), card.get("init"))
    if not len(shard.train):
        raise ArchipelError(f"{folder} holds no training clips: make a run with a smaller partition.k or more clips")
    return shard


def numbered(items: Sequence[int]) -> list[int]:
    """Items with a number of their own for each repeat within one batch, so that repeats get noise of their own."""
    seen: dict[int, int] = {}
    numbers = []
    for item in items:
        numbers.append(item + _SECOND * seen.get(item, 0))
        seen[item] = seen.get(item, 0) + 1
    return numbers


def training_batch(
    clips: Clips,
    seed: int,
    step: int,
    size: int,
    *,
    shift: float | None,
    text_dropout: float,
    pooled_dropout: float = -1.0,
    tasks: Sequence[float] | None = None,
    device: str = "cpu",
    part: slice | None = None,
) -> Batch:
    """The batch of a step: a function of (seed, step) and the shard. Text and pooled are dropped together, or, where
    ``pooled_dropout`` is not negative, the pooled vector by a draw of its own; of a clip's windows each is drawn alike.
    Times are logit-normal with ``shift``, or uniform on [0, 1] where it is None. ``tasks``: the mix (see ``flow.given``)
    that each clip's task is drawn from, whose frames are ``cond.image``; None: there is none. ``part`` makes these of the
    batch's clips only, with the noise they have in the whole batch.
    """
    rows = batch_rows(seed, step, size, len(clips))
    items = numbered(clips.items(rows))
    if part is not None:
        rows, items = rows[part], items[part]
    phase = np.zeros(len(rows), np.int64)
    if clips.phases > 1:
        phase = (draws.uniforms(seed, items, step=step, purpose=draws.PHASE) * clips.phases).astype(np.int64)
    x0, (cond, cluster) = put(clips.windows(rows, phase), device), clips.captions(rows, device)
    if tasks is not None:
        drawn_tasks = given.pick(tasks, draws.uniforms(seed, items, step=step, purpose=draws.TASK))
        cond = cond.given(put(clips.given(rows, phase, drawn_tasks), device))
    # One stream per item, in a fixed order: time, dropout, noise. Making a stream costs about as much as filling it.
    normals, uniforms = np.empty(len(rows)), np.empty(len(rows))
    eps = np.empty((len(rows), *clips.latent_shape), np.float32)
    for place, item in enumerate(items):
        stream = draws.generator(seed, draws.NOISE, step, item)
        normals[place], uniforms[place] = stream.standard_normal(), stream.random()
        stream.standard_normal(out=eps[place], dtype=np.float32)
    drawn = torch.from_numpy(normals)
    t = torch.special.ndtr(drawn) if shift is None else shift_time(logit_normal(drawn), shift)
    t = put(t.float(), device)
    noise = put(torch.from_numpy(eps), device)
    dropped = put(torch.from_numpy(uniforms < text_dropout), device)
    if pooled_dropout >= 0:
        apart = draws.uniforms(seed, items, step=step, purpose=draws.POOLED) < pooled_dropout
        cond = cond.drop(dropped, put(torch.from_numpy(apart), device))
    elif text_dropout:
        cond = cond.drop(dropped)
    return Batch(x0, noise, t, cond, cluster, interpolate(x0, noise, t))


def shares(size: int, ranks: int, rank: int, micro: int) -> list[tuple[slice, float]]:
    """What process ``rank`` of ``ranks`` computes of a batch of ``size`` clips: slices, and the weight of each.

    At most ``micro`` clips a slice (0: no bound), each clip in exactly one slice of one process. All processes get equally
    many slices, since each takes part in every exchange; one that has no clip left gets the first clip with weight 0.
    """
    most = -(-size // ranks)
    count = -(-most // micro) if micro else 1
    begin, end = size * rank // ranks, size * (rank + 1) // ranks
    edges = [begin + (end - begin) * place // count for place in range(count + 1)]
    return [(slice(a, b), 1.0) if b > a else (slice(0, 1), 0.0) for a, b in itertools.pairwise(edges)]


def validation_batches(
    clips: Clips,
    seed: int,
    t: float,
    *,
    bin_number: int,
    limit: int,
    tasks: Sequence[float] | None = None,
    chunk: int = 64,
    device: str = "cpu",
) -> Iterator[Batch]:
    """At most ``limit`` clips spread over the split, all at time ``t``, with noise fixed by (seed, bin, clip), and so, by
    a draw from the mix ``tasks``, which frames are given."""
    count = min(limit, len(clips))
    rows = np.unique(np.linspace(0, len(clips) - 1, count).round().astype(np.int64)) if count else np.empty(0, np.int64)
    for begin in range(0, len(rows), chunk):
        part = rows[begin : begin + chunk]
        x0, cond, cluster = clips.take(part, device)
        if tasks is not None:
            u = draws.uniforms(seed, clips.items(part), step=bin_number, purpose=VALIDATION_TASK)
            found = clips.given(part, np.zeros(len(part), np.int64), given.pick(tasks, u))
            cond = cond.given(found.to(device))
        drawn = draws.normals(seed, clips.items(part), clips.latent_shape, step=bin_number, purpose=VALIDATION)
        noise, times = torch.from_numpy(drawn).to(device), torch.full((len(part),), t, device=device)
        yield Batch(x0, noise, times, cond, cluster, interpolate(x0, noise, times))
