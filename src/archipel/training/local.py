"""What an island decides for itself: device, precision, micro-batch, threads, GPUs, and what it trades for memory or speed.

None of it is part of the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from archipel.errors import ArchipelError

PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw8bit")
AVERAGES = ("device", "host")


@dataclass(frozen=True)
class Local:
    """How a job is computed here; what is computed is ``run.toml``'s alone.

    ``device``: cpu, cuda or cuda:N (None: a GPU where there is one). ``precision``: of the matrix products; weights,
    their average, gradients' sums and the time embedding are float32 either way. ``micro_batch``: clips that one
    process computes at once (0: its whole share of the step's batch). ``threads``: CPU threads of one process (None:
    those the job was begun with, else torch's own). ``gpus``: processes, one per GPU, or so many on the CPU.
    ``checkpointing``: activations inside a block are computed again on the way back instead of kept. ``optimizer``:
    adamw, or adamw8bit, whose moments take a quarter of the memory. ``compile``: the repeated blocks go through
    torch.compile. ``ema``: where the average of the weights lies, on the device or in the host's memory.
    Raises ArchipelError for values outside of these.
    """

    device: str | None = None
    precision: str = "float32"
    micro_batch: int = 0
    threads: int | None = None
    gpus: int = 1
    checkpointing: bool = False
    optimizer: str = "adamw"
    compile: bool = False
    ema: str = "device"

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("ema", self.ema, AVERAGES),
        ):
            if chosen not in known:
                raise ArchipelError(f"{name} {chosen!r} is not one of {', '.join(known)}")
        for key, value, least in (
            ("micro_batch", self.micro_batch, 0),
            ("gpus", self.gpus, 1),
            ("threads", self.threads, 1),
        ):
            if value is not None and value < least:
                raise ArchipelError(f"{key} {value} is below {least}")

    def over(self, *, threads: int | None = None, device: str | None = None) -> Local:
        """These settings with what is given put over them."""
        return dataclasses.replace(self, threads=threads or self.threads, device=device or self.device)

    def words(self) -> list[str]:
        """These settings as options of ``archipel train`` and ``archipel join``, but for device, threads and gpus: those
        differ from one process to the next."""
        return [
            *("--precision", self.precision, "--micro-batch", str(self.micro_batch)),
            *("--optimizer", self.optimizer, "--ema", self.ema),
            "--checkpointing" if self.checkpointing else "--no-checkpointing",
            "--compile" if self.compile else "--no-compile",
        ]
