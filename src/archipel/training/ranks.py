"""One training by one process or by several: who writes, what is agreed on, and which part of a tensor is whose.

Several processes hold the model together by FSDP2 (``torch.distributed.fsdp.fully_shard``; Zhao et al., PyTorch FSDP,
arXiv 2304.11277): each keeps 1/size of every weight, average and moment. ``Ranks`` itself is the plain case, a process
alone, in which nothing here touches ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from archipel.backbones.base import Backbone
from archipel.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError, Stopped
from archipel.progress import StopFlag
from archipel.training.precision import BFLOAT16

logger = logging.getLogger("archipel")
T = TypeVar("T")
E = TypeVar("E", ArchipelError, Stopped)
_LIMIT, _SIGNAL = 1, 2  # why a stop is asked for; the larger one wins
_DATA_WAIT = datetime.timedelta(minutes=10)  # for a process that is there and does not answer
_WORD_WAIT = datetime.timedelta(hours=2)  # the first process may be writing a checkpoint to a slow disk meanwhile
# Set for processes whose stop is told by their launcher, who knows its reason: the folder where they leave their errors.
LAUNCHED = "ARCHIPEL_LAUNCHED"
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


class Ranks:
    """This process alone: it writes, it decides, and every tensor is whole."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def shard(self, model: nn.Module, precision: str) -> None:
        """Spread the model over the processes."""

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor of the model, sharing its memory."""
        return tensor

    def like(self, whole: Tensor, p: Tensor) -> Tensor:
        """A tensor that all have in full, on the device and spread as the parameter ``p`` is."""
        return whole.to(p.device)

    def whole(self, tensor: Tensor, p: Tensor) -> np.ndarray | None:
        """In full, from all parts of something that is spread as ``p`` is; None but on the first process."""
        found: np.ndarray = tensor.detach().cpu().numpy()
        return found

    def clip(self, parameters: Sequence[Tensor], bound: float) -> Tensor:
        """Scale gradients down to a common norm of at most ``bound``; gives the norm they had."""
        return nn.utils.clip_grad_norm_(parameters, bound)

    def total(self, values: Tensor) -> Tensor:
        """Sums over the processes, the same on each."""
        return values

    def same(self, value: float) -> float:
        """What the first process has."""
        return value

    def texts(self, text: str) -> list[str]:
        """What each process has, on the first; empty on the others."""
        return [text]

    def lead(self, work: Callable[[], T]) -> T | None:
        """Done by the first process; the others wait and get None. Where it fails there, it fails everywhere."""
        return work()

    def asked(self, stop: StopFlag | None) -> int:
        """0 while nobody asks to stop. All processes get the same answer at the same call."""
        return 1 if stop else 0

    def stopped(self, stop: StopFlag | None, asked: int, what: str) -> Stopped:
        """The exception for ``asked``."""
        assert stop is not None
        return stop.error(what)

    def agreed(self, error: E) -> E:
        """An error that every process raises, marked as told on all but the first."""
        return error


ALONE = Ranks()


class Team(Ranks):
    """One of several processes. Every method is called by all of them, in the same order."""

    def __init__(self, rank: int, size: int, device: str) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._words = dist.new_group(backend="gloo", timeout=_WORD_WAIT)
        self._pending: tuple[dist.Work, Tensor] | None = None

    def shard(self, model: nn.Module, precision: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not isinstance(model, Backbone):
            raise TypeError(f"only a Backbone can be sharded, not {type(model).__name__}")
        # The blocks give out views of what they compute; nothing is added to them in place, in diffusers or here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        policy = MixedPrecisionPolicy()
        if precision == BFLOAT16:  # autocast does the casting of activations; gradients are added up in float32
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # Resharded after every forward, the root too: validation changes the weights between forwards.
        for block in model.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model.network, mesh=mesh, reshard_after_forward=True)

    def mine(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]

    def like(self, whole: Tensor, p: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(p, DTensor)
        # Every process read the same file: each takes its own slice, and nothing is sent.
        return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    def whole(self, tensor: Tensor, p: Tensor) -> np.ndarray | None:
        from torch.distributed.tensor import DTensor

        assert isinstance(p, DTensor)
        mesh, places = p.device_mesh, p.placements
        spread = DTensor.from_local(
            self.mine(tensor), mesh, places, run_check=False, shape=p.shape, stride=p.stride()
        ).full_tensor()
        return spread.detach().cpu().numpy() if self.first else None

    @torch.no_grad()
    def clip(self, parameters: Sequence[Tensor], bound: float) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` does, with the norm over all processes' parts."""
        parts = [self.mine(p.grad) for p in parameters if p.grad is not None]
        own = torch.stack(torch._foreach_norm(parts)).square().sum()
        norm = self.total(own).sqrt()
        torch._foreach_mul_(parts, torch.clamp(bound / (norm + 1e-6), max=1.0))
        return norm

    def total(self, values: Tensor) -> Tensor:
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    def same(self, value: float) -> float:
        told = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(told, 0, group=self._words)
        return float(told)

    def texts(self, text: str) -> list[str]:
        data = np.frombuffer(text.encode(), np.uint8).copy()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._words)
        rows = torch.zeros(self.size, max(1, int(sizes.max())), dtype=torch.uint8)
        rows[self.rank, : len(data)] = torch.from_numpy(data)
        dist.all_reduce(rows, group=self._words)
        if not self.first:
            return []
        return [bytes(row[:size].numpy()).decode() for row, size in zip(rows, sizes.tolist(), strict=True)]

    def lead(self, work: Callable[[], T]) -> T | None:
        if self.first:
            try:
                result = work()
            except BaseException as error:
                self.same(1.0 + _code(error))
                raise
            self.same(0.0)
            return result
        code = int(self.same(0.0)) - 1
        if code < 0:
            return None
        if code in (0, EXIT_INTERRUPTED):
            raise self.agreed(Stopped("the first process stopped", interrupted=code != 0))
        failed = self.agreed(ArchipelError("the first process failed and says why"))
        failed.exit_code = code
        raise failed

    def asked(self, stop: StopFlag | None) -> int:
        """The answer is to the question of the call before: nobody waits for it while a step could be computed."""
        own = 0 if not stop else _SIGNAL if stop.signal is not None else _LIMIT
        answer = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = int(flag)
        flag = torch.tensor(own)
        asking = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._words, async_op=True)
        assert asking is not None
        self._pending = asking, flag
        return answer

    def stopped(self, stop: StopFlag | None, asked: int, what: str) -> Stopped:
        why = "interrupted" if asked == _SIGNAL else "stopped"
        error = (
            stop.error(what) if stop else Stopped(f"{what} was {why}; everything is kept, start it again to continue")
        )
        error.interrupted = asked == _SIGNAL
        error.told = not self.first or LAUNCHED in os.environ
        return error

    def agreed(self, error: E) -> E:
        error.told = not self.first
        return error


def _code(error: BaseException) -> int:
    """The exit code that an error will become."""
    if isinstance(error, Stopped):
        return EXIT_INTERRUPTED if error.interrupted else 0
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, ArchipelError):
        return error.exit_code
    return EXIT_WRONG_INPUT if isinstance(error, OSError) else EXIT_INTERNAL


# --- joining ---------------------------------------------------------------------------------------------------------


def launched() -> tuple[int, int]:
    """(rank, size) that torchrun gave this process; (0, 1) where none did."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    if not all(words):
        return 0, 1
    return int(words[0]), int(words[1])


def own_device(device: str, size: int) -> str:
    """``device`` for this process of ``size``: its own GPU, by torchrun's LOCAL_RANK.

    Raises ArchipelError where there are fewer GPUs than processes on this machine, or one GPU is named for all.
    """
    if size == 1 or not device.startswith("cuda"):
        return device
    here, place = int(os.environ.get("LOCAL_WORLD_SIZE", size)), int(os.environ["LOCAL_RANK"])
    count, wrong = torch.cuda.device_count(), None
    if device != "cuda":
        wrong = ArchipelError(f"--device {device} is one GPU and there are {size} processes: use --device cuda")
    elif count < here:
        wrong = ArchipelError(
            f"this machine has {count} GPUs for {here} processes: start as many processes as GPUs, or use --device cpu"
        )
    if wrong is not None:
        wrong.told = place > 0  # all find it, one says it
        raise wrong
    torch.cuda.set_device(place)
    return f"cuda:{place}"


@contextlib.contextmanager
def join(device: str, label: str) -> Iterator[Ranks]:
    """The processes that torchrun started beside this one, on ``device`` (see ``own_device``); ALONE where there are none.

    A process that goes away ends the others' block with an ArchipelError.
    """
    rank, size = launched()
    if size == 1:
        yield ALONE
        return
    with _leaving_errors(rank), _joined(device, label, rank, size) as team:
        yield team


@contextlib.contextmanager
def _joined(device: str, label: str, rank: int, size: int) -> Iterator[Ranks]:
    cuda, ours = device.startswith("cuda"), not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_DATA_WAIT)
    ended_together = False
    try:
        yield Team(rank, size, device)
        ended_together = True
    except Stopped:
        ended_together = True
        raise
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error).lower() for word in _LOST):
            raise
        logger.info("%s: %s", label, error)
        raise LostError(
            f"another of the {size} processes that train {label} has ended: see what it said, then start again; the "
            "last good checkpoint is kept"
        ) from error
    finally:
        # NCCL waits for all to leave: where they do not leave together, the end of the process has to do.
        if ours and (ended_together or not cuda):
            dist.destroy_process_group()


class LostError(ArchipelError):
    """Another process of the same training is gone; what ended it is told elsewhere."""


@contextlib.contextmanager
def _leaving_errors(rank: int) -> Iterator[None]:
    """What ends the block is left for the launcher, where it is this process's own."""
    try:
        yield
    except (Stopped, LostError):
        raise
    except Exception as error:
        folder = os.environ.get(LAUNCHED)
        if folder and not getattr(error, "told", False):
            text = str(error) if isinstance(error, ArchipelError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                (Path(folder) / str(rank)).write_text(text, encoding="utf-8")
        raise
