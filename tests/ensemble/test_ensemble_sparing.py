"""A router that is asked less often: when, about which rows, and what stays in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.ensemble.test_ensemble_pipeline import PROMPTS, Words
from tests.ensemble.test_ensemble_strategies import Counting, K, conditions
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.pipeline import Archipelago
from archipel.ensemble.sparing import Spared
from archipel.ensemble.strategies import Mixture, Routed, Trace
from archipel.flow import samplers
from archipel.run import Run


class Sharpening:
    """A router that grows certain as t falls, row i of expert i mod K, sooner for higher rows; notes when it is asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[int]]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        rows = [int(value) - 1 for value in cond.pooled[:, 0]]
        known = [row for row in rows if row >= 0]
        if known:
            self.seen.append((round(float(t[0]), 3), known))
        certain = torch.tensor(
            [min(1.0, (1 - float(time)) * (max(row, 0) + 1) / 2) for time, row in zip(t, rows, strict=True)]
        )
        best = torch.nn.functional.one_hot(torch.tensor([max(row, 0) % K for row in rows]), K)
        return certain[:, None] * best + (1 - certain[:, None]) / K


def follow(router: Any, trace: Trace | None = None, solver: str = "euler", **settings: Any) -> Tensor:
    calls = 2 if solver == "heun" else 1
    weighting = Spared(Routed(router, strategies.everyone), calls=calls, **settings)
    mixture = Mixture([Counting(k) for k in range(K)], weighting, trace=trace)
    return samplers.sample(mixture, torch.zeros(4, 1, 1, 1, 1), conditions(4), steps=5, solver=solver)


def test_every_nth_step_from_the_first() -> None:
    router, trace = Sharpening(), Trace()
    follow(router, trace, every=2)
    assert [time for time, _ in router.seen] == [1.0, 0.6, 0.2] and trace.router_rows == 12
    kept = trace.per_step("euler")
    assert np.array_equal(kept[:, 0], kept[:, 1]) and np.array_equal(kept[:, 2], kept[:, 3])
    assert not np.array_equal(kept[:, 1], kept[:, 2])


def test_the_second_half_of_a_heun_step_keeps_the_weights_of_the_first() -> None:
    router = Sharpening()
    follow(router, solver="heun", every=2)
    assert [time for time, _ in router.seen] == [1.0, 0.6, 0.2]
    often = Sharpening()
    follow(often, solver="heun", every=1)
    assert len(often.seen) == 9, "two a step but the last"


def test_a_clip_that_is_certain_is_not_asked_about_again() -> None:
    router, trace = Sharpening(), Trace()
    follow(router, trace, until=0.7)
    # p of the likeliest = c + (1 - c) / 3 with c = (1 - t) (row + 1) / 2 reaches 0.7 where c reaches 0.55
    assert router.seen == [(1.0, [0, 1, 2, 3]), (0.8, [0, 1, 2, 3]), (0.6, [0, 1, 2, 3]), (0.4, [0, 1]), (0.2, [0])]
    kept = trace.per_step("euler")
    assert np.array_equal(kept[3, 2], kept[3, 4]) and not np.array_equal(kept[0, 2], kept[0, 4])
    assert trace.router_rows == 4 + 4 + 4 + 2 + 1


def test_both_branches_are_kept() -> None:
    plain, spared = (Routed(Sharpening(), strategies.top_k(2)) for _ in range(2))
    weighting = Spared(spared, every=2)
    x, cond = torch.zeros(4, 1, 1, 1, 1), conditions(4)
    for step, (t, same) in enumerate(((0.8, 0.8), (0.5, 0.8), (0.2, 0.2))):
        w, n = weighting(x, torch.full((4,), t), cond, True)
        for found, wanted in zip((w, n), plain(x, torch.full((4,), same), cond, True), strict=True):
            torch.testing.assert_close(found, wanted, msg=f"step {step}")
        assert not torch.equal(w, n)


@pytest.mark.parametrize("strategy", ["top1", "full"])
def test_generate_spares_the_router_and_says_so(small_run: Run, strategy: str) -> None:
    model = Archipelago.load(small_run.root)
    model.parts.text = Words()  # type: ignore[misc]
    whole = model.generate(PROMPTS, strategy=strategy, steps=4, seed=1)
    assert whole.router_rows == 16 and whole.settings.router_every == 1
    less = model.generate(PROMPTS, strategy=strategy, steps=4, seed=1, router_every=4)
    assert less.router_rows == 4 and less.expert_rows == whole.expert_rows
    assert less.weights is not None and np.array_equal(less.weights[:, 0], less.weights[:, 3])
    never = model.generate(PROMPTS, strategy=strategy, steps=4, seed=1, router_until=1 - 1e-9)
    assert never.router_rows == 16 and np.array_equal(never.clips, whole.clips), "never certain: the same bytes"
    soon = model.generate(PROMPTS, strategy=strategy, steps=4, seed=1, router_until=0.01)
    assert soon.router_rows == 4 and np.array_equal(soon.clips, less.clips)
    heun = model.generate(PROMPTS, strategy=strategy, steps=3, seed=1, solver="heun", router_until=1 - 1e-9)
    assert heun.router_rows == 4 * 5
