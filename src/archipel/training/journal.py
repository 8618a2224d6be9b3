"""What a training tells others while it runs: metrics.jsonl for good, progress.json for a parent's bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import store
from archipel.errors import ArchipelError
from archipel.training.ranks import ALONE, Ranks

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"
_LINES = 50  # at least so many metrics lines per training, where it has as many steps
_PROGRESS_EVERY = 1.0  # seconds


class Journal:
    """metrics.jsonl and progress.json of one training; checks that every loss was finite."""

    def __init__(
        self,
        folder: Path,
        label: str,
        *,
        steps: int,
        rate: Callable[[int], float],
        start: int = 0,
        seconds: float = 0.0,
        resumed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """``rate(step)`` is the learning rate of a step; ``start`` and ``seconds`` what earlier processes made. Of
        several ``ranks`` all keep a journal and the first writes it."""
        self.folder, self.label, self.steps, self.rate = folder, label, steps, rate
        self.start, self.resumed, self.ranks = start, resumed, ranks
        self.every = max(1, min(10, steps // _LINES))
        self._before, self._began, self._told = seconds, time.monotonic(), -math.inf
        self._pending: list[Tensor] = []
        self.loss = math.nan
        if not ranks.first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = store.read_jsonl(folder / METRICS)
        kept = [row for row in rows if int(row.get("step", 0)) <= start]
        # A killed process may have written lines after its last checkpoint: those steps are made, and told, again.
        store.write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    @property
    def seconds(self) -> float:
        """Time spent training, over all processes, up to the last checkpoint of each."""
        return self._before + time.monotonic() - self._began

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """This process's share of a step's loss, and the norm of all processes' gradients."""
        self._pending.append(torch.stack([loss, norm]))

    def flush(self, step: int, validation: Mapping[str, Any] | None = None) -> None:
        """Write one line for the steps since the last. Raises ArchipelError naming the first that was not finite."""
        line: dict[str, Any] = {"step": step}
        if not (self._pending or validation):
            return  # all of it is told already
        if self._pending:
            table = torch.stack(self._pending)
            if self.ranks.size > 1:
                table[:, 0] = self.ranks.total(table[:, 0])
            values = table.tolist()
            first = step - len(values) + 1
            for offset, (loss, norm) in enumerate(values):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    what = "loss" if not math.isfinite(loss) else "gradient"
                    error = ArchipelError(
                        f"training {self.label}: the {what} is not finite at step {first + offset} (rate "
                        f"{self.rate(first + offset - 1):.3g}): make a new run with a lower lr, a longer warmup or a smaller "
                        "grad_clip; the last good checkpoint is kept"
                    )
                    raise self.ranks.agreed(error)
            self._pending.clear()
            self.loss = sum(loss for loss, _ in values) / len(values)
            line |= {"loss": self.loss, "grad_norm": sum(norm for _, norm in values) / len(values)}
        line |= {"lr": self.rate(step - 1), "seconds": round(self.seconds, 3)}
        if validation:
            line |= {
                "validation": validation["raw"]["loss"],
                "validation_ema": validation["ema"]["loss"],
                "validation_detail": dict(validation),
            }
        if self.ranks.first:
            store.append_jsonl(self.folder / METRICS, line)

    def tell(self, step: int, state: str = "training") -> None:
        """Rewrite progress.json, at most once a second while training."""
        now = time.monotonic()
        if not self.ranks.first:
            return
        if state == "training" and now - self._told < _PROGRESS_EVERY:
            return
        self._told = now
        speed = (step - self.start) / (now - self._began) if now > self._began else 0.0
        value = {
            "step": step,
            "steps": self.steps,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "steps_per_s": round(speed, 4),
            "state": state,
            "resumed": self.resumed,
        }
        # Renamed but not synced: nothing depends on this file, and a sync every second would cost speed.
        aside = self.folder / f".{PROGRESS}.{os.getpid()}.tmp"
        aside.write_text(json.dumps(value) + "\n", encoding="utf-8")
        aside.replace(self.folder / PROGRESS)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What a training process last said of itself, or None where none has started."""
    with contextlib.suppress(ArchipelError, OSError):
        value = store.read_json(folder / PROGRESS)
        return value if isinstance(value, dict) else None
    return None
