"""How a run would be trained: what decides memory and hours, and no result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from archipel.errors import ConfigError
from archipel.training.local import AVERAGES, OPTIMIZERS, PRECISIONS, Local

_BLOCK = 256  # numbers that share one scale in torchao's 8-bit state
_SMALL = 4096  # parameters below keep float32 state there


@dataclass(frozen=True)
class Switches:
    """``gpus``: of one expert, which they hold together; ``micro_batch``: clips that a GPU computes at once (0: its whole
    share of the batch); the rest as `archipel train` has it. Raises ConfigError for values outside of these."""

    precision: str = "bfloat16"
    checkpointing: bool = False
    micro_batch: int = 0
    optimizer: str = "adamw"
    ema: str = "device"
    gpus: int = 1
    mfu: float = 0.4

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--precision", self.precision, PRECISIONS),
            ("--optimizer", self.optimizer, OPTIMIZERS),
            ("--ema", self.ema, AVERAGES),
        ):
            if value not in known:
                raise ConfigError(f"{option} {value!r} is not one of {', '.join(known)}")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu:g} must be above 0 and at most 1, such as 0.4")
        if self.micro_batch < 0 or self.gpus < 1:
            raise ConfigError("--micro-batch must be 0 or more, and --gpus 1 or more")

    def but(self, **changes: object) -> Switches:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def optimizer_bytes(self, sizes: Iterable[int]) -> int:
        """AdamW's two moments for parameters of so many numbers: float32, or torchao's 8 bits with a scale per block and
        two tables of 256 numbers per parameter."""
        if self.optimizer == "adamw":
            return 8 * sum(sizes)
        return sum(
            2 * (size + 4 * size // _BLOCK) + 2 * 4 * 256 if size >= _SMALL and size % _BLOCK == 0 else 8 * size
            for size in sizes
        )

    def local(self) -> Local:
        """For a step that is played through here: moments and average are counted apart, and lie on the device."""
        return Local(device="cpu", precision=self.precision, checkpointing=self.checkpointing)

    def told(self) -> str:
        """`archipel train`'s options."""
        words = [f"--precision {self.precision}", f"--micro-batch {self.micro_batch}" if self.micro_batch else ""]
        words += [
            "--checkpointing" if self.checkpointing else "",
            "" if self.optimizer == "adamw" else "--optimizer adamw8bit",
        ]
        words += ["--ema host" if self.ema == "host" else "", f"--gpus {self.gpus}" if self.gpus > 1 else ""]
        return " ".join(word for word in words if word)
