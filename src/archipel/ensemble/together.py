"""Several experts that are adapters on one base, asked in one pass of it where there are few rows.

peft's mixed batches: every row goes through the base together and through its own adapter (``adapter_names``). The same numbers
within rounding. Measured (bench/lora_experts.py, one thread): a seventh faster than taking turns for one clip, a sixth slower for
eight, where the sub-batches cost more than what is saved; hence the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archipel.backbones.lora import Adapted
from archipel.contracts import Conditioning, Velocity
from archipel.flow.path import over_rows

MOST_ROWS = 8  # of all experts and branches of a call


def in_one_pass(
    experts: Sequence[Velocity],
    asked: Sequence[tuple[int, Tensor]],
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    a: Tensor,
    b: Tensor,
) -> list[Tensor] | None:
    """What ``guidance.combine`` gives for each (k, rows) of ``asked``, or None where experts are to be asked one by one.

    a, b (B, K): coefficients of the conditional and the null velocities. None unless at least two adapters of one base are
    asked for few rows.
    """
    rows = torch.cat([one for _, one in asked]) if len(asked) > 1 else torch.empty(0)
    branches = 2 if bool(b.any()) else 1
    if not 0 < len(rows) * branches <= MOST_ROWS or not bool(a.any()):
        return None
    found = [getattr(experts[k], "adapted", None) for k, _ in asked]
    adapted = [one for one in found if isinstance(one, Adapted)]
    if len(adapted) < len(found) or any(one.bank is not adapted[0].bank for one in adapted):
        return None
    names = [one.name for one, (_, own) in zip(adapted, asked, strict=True) for _ in own]
    own, sizes = cond[rows], [len(one) for _, one in asked]
    parts = [own, own.null()][:branches]
    v = (
        adapted[0]
        .bank.mixed(
            names * branches, torch.cat([x[rows]] * branches), torch.cat([t[rows]] * branches), Conditioning.cat(parts)
        )
        .chunk(branches)
    )
    total = over_rows(torch.cat([a[one, k] for k, one in asked]), v[0]) * v[0]
    if branches == 2:
        total = total + over_rows(torch.cat([b[one, k] for k, one in asked]), v[1]) * v[1]
    return list(torch.split(total, sizes))
