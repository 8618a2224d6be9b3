"""The rules of arms that are no plain strategies, against closed forms and by what they call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.strategies import Mixture, Trace
from archipel.flow import samplers
from archipel.study.arms import HIGH, Alternating, Switched, Tempered, asks_router, experts_called
from archipel.study.plan import MAIN, Arm

K, SHAPE = 3, (2, 1, 2, 2)


def conditions(rows: int) -> Conditioning:
    return Conditioning(torch.zeros(rows, 4, 5), torch.ones(rows, 4, dtype=torch.bool), torch.ones(rows, 5))


class Posterior:
    """A fixed posterior that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.p = torch.tensor([0.6, 0.3, 0.1])

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.asked += 1
        return self.p.expand(len(x), K).to(x.dtype)


class Expert:
    def __init__(self, number: int) -> None:
        self.number, self.times = number, list[float]()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.times.append(round(float(t[0]), 6))
        return torch.full_like(x, float(self.number))


def run(weighting: strategies.Weighting, *, steps: int = 8, solver: str = "euler") -> tuple[list[Expert], Trace]:
    experts, trace = [Expert(k) for k in range(K)], Trace()
    velocity = Mixture(experts, weighting, 1.0, "mixture-of-guided", trace)
    samplers.sample(velocity, torch.zeros(2, *SHAPE), conditions(2), steps=steps, solver=solver)
    return experts, trace


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_is_a_power_of_the_posterior(temperature: float) -> None:
    posterior = Posterior()
    found = Tempered(posterior, temperature)(torch.zeros(2, *SHAPE), torch.ones(2), conditions(2))
    power = posterior.p.double() ** (1 / temperature)
    torch.testing.assert_close(found[0].double(), power / power.sum(), rtol=1e-6, atol=1e-7)


def test_the_first_rule_speaks_at_high_noise_only() -> None:
    one, two = (strategies.one_each([k, k], K) for k in (0, 1))
    experts, _ = run(Switched(one, two, HIGH))
    assert min(experts[0].times) > HIGH >= max(experts[1].times)
    assert len(experts[0].times) + len(experts[1].times) == 8
    assert experts[2].times == []


def test_the_other_order_swaps_who_is_asked_when() -> None:
    one, two = (strategies.one_each([k, k], K) for k in (0, 1))
    forth, _ = run(Switched(one, two, HIGH))
    back, _ = run(Switched(two, one, HIGH))
    assert forth[0].times == back[1].times and forth[1].times == back[0].times


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_turns_follow_times_and_not_calls(solver: str) -> None:
    one, two = (strategies.one_each([k, k], K) for k in (0, 1))
    experts, _ = run(Alternating(one, two), steps=6, solver=solver)
    assert not set(experts[0].times) & set(experts[1].times)
    times = sorted({*experts[0].times, *experts[1].times}, reverse=True)
    assert [t in experts[0].times for t in times] == [place % 2 == 0 for place in range(len(times))]


def arm(how: str) -> Arm:
    return Arm(how, how, "control", MAIN, how, 1, settings={"temperature": 2.0})


@pytest.mark.parametrize("how", ["top1", "top2", "full", "uniform", "oracle", "random", "expert-1"])
def test_the_cost_that_is_told_is_the_cost_that_is_paid(how: str) -> None:
    weightings = {
        "top1": strategies.Routed(Posterior(), strategies.top_k(1)),
        "top2": strategies.Routed(Posterior(), strategies.top_k(2)),
        "full": strategies.Routed(Posterior(), strategies.everyone),
        "uniform": strategies.uniform(2, K),
        "oracle": strategies.one_each([0, 2], K),
        "random": strategies.random_expert([1, 2], K),
        "expert-1": strategies.one_each([1, 1], K),
    }
    steps = 5
    _, trace = run(weightings[how], steps=steps)
    assert sum(trace.rows.values()) == 2 * steps * experts_called(arm(how), K)


@pytest.mark.parametrize(
    ("how", "often"), [("top1", "steps"), ("full", "steps"), ("ancestral", "once"), ("oracle", "")]
)
def test_who_asks_the_router(how: str, often: str) -> None:
    assert asks_router(arm(how)) == often
