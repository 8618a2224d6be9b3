"""What an island decides for itself: device, precision, micro-batch, threads, GPUs. None of it is part of the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from archipel.errors import ArchipelError

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Local:
    """How a job is computed here; what is computed is ``run.toml``'s alone.

    ``device``: cpu, cuda or cuda:N (None: a GPU where there is one). ``precision``: of the matrix products; weights,
    their average, gradients' sums and the time embedding are float32 either way. ``micro_batch``: clips that one
    process computes at once (0: its whole share of the step's batch). ``threads``: CPU threads of one process (None:
    those the job was begun with, else torch's own). ``gpus``: processes, one per GPU, or so many on the CPU.
    Raises ArchipelError for values outside of these.
    """

    device: str | None = None
    precision: str = "float32"
    micro_batch: int = 0
    threads: int | None = None
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ArchipelError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
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
