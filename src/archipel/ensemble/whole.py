"""Clips of one expert each, made whole where that expert is: one request to one island, and nothing of the path travels.

Strategies that settle a clip's expert before the first step (ancestral, one expert, oracle, random) need nobody else on the way.
Where that expert is remote (has ``ask_clips``), it makes the clip from its seed alone; the others are sampled here meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble.settings import Settings
from archipel.ensemble.strategies import Fixed, Mixture, Trace
from archipel.errors import LostExpertError
from archipel.flow import samplers

_LOOK = 0.5  # seconds between looks whether clips that are waited for are still wanted


def possible(mixture: Mixture, settings: Settings) -> bool:
    """Whether some clip's one and only expert can make it whole."""
    weighting = mixture.weighting
    return isinstance(weighting, Fixed) and bool(_away(mixture, weighting, settings))


def _away(mixture: Mixture, weighting: Fixed, settings: Settings) -> dict[int, Tensor]:
    """Remote experts -> rows (n,) of the clips that are theirs alone."""
    found = {}
    for k, expert in enumerate(mixture.experts):
        takes = getattr(expert, "takes", None)
        rows = (weighting.weights[:, k] == 1).nonzero()[:, 0]
        if takes is not None and len(rows) and takes(settings):
            found[k] = rows
    return found


def sample(
    mixture: Mixture,
    noise: Tensor,
    cond: Conditioning,
    seeds: Sequence[int],
    settings: Settings,
    trace: Trace,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Latents float32 like ``noise`` (B, C, T, H, W), which ``seeds`` make; ``trace`` is filled as a mixture fills it.

    A remote expert that is lost gives its clips back: they are drawn anew among the others, from the beginning. ``on_step`` is
    told the steps of clips that are sampled here; of others that they are done, and while they are waited for, with no rows, twice
    a second: what it raises ends the requests. Raises as ``Mixture`` does.
    """
    weighting = mixture.weighting
    assert isinstance(weighting, Fixed)
    out, left = torch.empty_like(noise), torch.arange(len(noise))
    calls = 2 * settings.steps - 1 if settings.solver == "heun" else settings.steps
    experts: Sequence[Any] = mixture.experts
    paths: list[Tensor] = []  # weights (B, K) at each call of a velocity here
    while len(left):
        away = {k: rows[torch.isin(rows, left)] for k, rows in _away(mixture, weighting, settings).items()}
        away = {k: rows for k, rows in away.items() if len(rows)}
        later = {}
        for k, rows in away.items():
            later[k] = experts[k].ask_clips([seeds[i] for i in rows.tolist()], cond[rows], settings)
        here = left[~torch.isin(left, torch.cat([*away.values()]))] if away else left
        try:
            if len(here):
                own = Trace()
                part = Mixture(mixture.experts, weighting.of(here), mixture.scale, mixture.composition, own)
                how: dict[str, Any] = {"steps": settings.steps, "shift": settings.shift, "solver": settings.solver}
                out[here] = samplers.sample(part, noise[here], cond[here], on_step=on_step, **how)
                _remember(trace, own, paths, here, len(noise))
            if on_step is not None:
                while not all(expert.there(_LOOK / len(later)) for expert in later.values()):
                    on_step(settings.steps if len(here) else 0, settings.steps, out[:0], 0.0 if len(here) else 1.0)
            left = _gather(mixture, later, away, out, trace, calls, settings, on_step)
        except BaseException:
            for k in later:
                experts[k].close()
            raise
    _settle(trace, weighting, paths, settings, calls)
    return out


def _gather(
    mixture: Mixture,
    later: dict[int, Any],
    away: dict[int, Tensor],
    out: Tensor,
    trace: Trace,
    calls: int,
    settings: Settings,
    on_step: samplers.OnStep | None,
) -> Tensor:
    """Put the clips that come back into ``out``; rows (n,) of those that did not."""
    lost = []
    for k, rows in away.items():
        try:
            clips = later[k]()
        except LostExpertError as error:
            lost.append((k, error.reason))
            continue
        out[rows] = clips.to(out)
        branches = 1 if settings.guidance in (0, 1) else 2
        trace.rows[k] = trace.rows.get(k, 0) + len(rows) * calls * branches
        if on_step is not None:
            on_step(settings.steps, settings.steps, out[rows], 0.0)
    for k, reason in lost:
        mixture.lose(k, 1.0, reason)
    return torch.cat([away[k] for k, _ in lost]) if lost else torch.empty(0, dtype=torch.int64)


def _remember(trace: Trace, own: Trace, paths: list[Tensor], here: Tensor, clips: int) -> None:
    """Take over what sampling the rows ``here`` left in a trace of its own."""
    for k, rows in own.rows.items():
        trace.rows[k] = trace.rows.get(k, 0) + rows
    trace.lost.update(own.lost)
    while len(paths) < len(own.weights):
        paths.append(torch.full((clips, own.weights[0].shape[1]), torch.nan))
    for path, weights in zip(paths, own.weights, strict=True):
        path[here] = weights


def _settle(trace: Trace, weighting: Fixed, paths: list[Tensor], settings: Settings, calls: int) -> None:
    """Weights at every call: those of the path where it was followed here, else the clip's one expert."""
    fixed = weighting.weights.float().cpu()
    grid = samplers.time_grid(settings.steps, settings.shift).tolist()
    for call in range(calls):
        step, second = divmod(call, 2) if settings.solver == "heun" else (call, 0)
        trace.times.append(grid[step + second])
        path = paths[call] if paths else torch.full_like(fixed, torch.nan)
        trace.weights.append(torch.where(path.isnan(), fixed, path))
