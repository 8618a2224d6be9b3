"""What every page of the studio works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archipel.config import RunConfig
    from archipel.ensemble.parts import Parts
    from archipel.ensemble.pipeline import Archipelago
    from archipel.run import Run
    from archipel.serving.service import Service


@dataclass(frozen=True)
class StudioContext:
    """``where``: the run as the command line named it (a folder, a bucket's URL, an export); not for display to clients.

    ``run``: the run's own folder, where partition, islands' jobs and training records lie; None for a bucket or an export, of
    which only what the parts hold is known. ``store``: where its islands work (``--store``), where it is not ``where``.
    ``show_clips``: whether the partition's page may show sheets of the training clips (``--no-clips``: not).
    """

    archipelago: Archipelago
    service: Service
    where: str
    run: Run | None = None
    store: str | None = None
    show_clips: bool = True

    @property
    def parts(self) -> Parts:
        return self.archipelago.parts

    @property
    def config(self) -> RunConfig:
        return self.archipelago.config

    @property
    def experts(self) -> int:
        return self.config.partition.k
