"""Schedule, average, budget and ledger against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from archipel import config, store
from archipel.backbones import flops
from archipel.errors import ConfigError
from archipel.training import budget, schedule
from archipel.training.ema import Ema, decay, weight


def test_rate_warms_up_holds_and_cools_down() -> None:
    rates = [schedule.rate(step, peak=2.0, steps=100, warmup=4, cooldown=0.2) for step in range(100)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:81] == [2.0] * 77
    assert rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert all(schedule.rate(step, peak=3.0, steps=7, warmup=0, cooldown=0) == 3.0 for step in range(7))


def test_rate_is_never_zero_however_short_the_training() -> None:
    assert schedule.rate(0, peak=1.0, steps=1, warmup=20, cooldown=1.0) == pytest.approx(1 / 20)


def test_average_is_the_normalised_sum_over_all_weights_after_a_step() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1e6)  # initial weights must not be seen
    beta = decay(0.25, 40)
    assert beta == pytest.approx(math.exp(-1 / 10))
    ema, seen = Ema(model, beta), []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 31):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=generator))
        seen.append(model.weight.detach().double().clone())
        ema.update(step)
    shares = torch.tensor([beta ** (30 - i) for i in range(1, 31)], dtype=torch.float64)
    expected = (torch.stack(seen) * shares[:, None, None]).sum(0) / shares.sum()
    torch.testing.assert_close(ema.tensors["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert weight(beta, 1) == pytest.approx(1.0)


def test_average_is_lent_to_the_model_and_taken_back_even_after_an_error() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    raw = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        torch.testing.assert_close(model.weight.detach(), raw - 1)
        raise KeyError
    assert torch.equal(model.weight, raw)


def test_a_short_training_still_averages_over_at_least_one_step() -> None:
    assert decay(0.05, 3) == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("router_steps", [1, 100, 300])
def test_the_monolith_gets_what_experts_and_router_spend(k: int, router_steps: int) -> None:
    values = {"partition": {"k": k}, "router": {"steps": router_steps}, "evaluate": {"arms": ["top1", "monolith"]}}
    resolved = budget.resolve(config.build(values))
    expert, monolith = resolved.expert, resolved.monolith
    assert (monolith.batch, monolith.lr) == (k * expert.batch, expert.lr)
    step = 3 * flops.expert_forward_flops(resolved) * monolith.batch
    spent = 3 * flops.expert_forward_flops(resolved) * k * expert.batch * expert.steps
    spent += 3 * flops.router_forward_flops(resolved) * router_steps * resolved.router.batch
    assert resolved.compute.archipelago_flops == spent
    assert resolved.compute.monolith_flops == step * monolith.steps
    assert abs(spent - step * monolith.steps) <= step / 2
    assert budget.resolve(resolved) == resolved


def test_what_is_given_for_the_monolith_is_kept() -> None:
    given = config.build({"monolith": {"batch": 16, "lr": 1e-4}})
    resolved = budget.resolve(given)
    assert (resolved.monolith.batch, resolved.monolith.lr) == (16, 1e-4)
    assert resolved.compute.monolith_flops == pytest.approx(resolved.compute.archipelago_flops, rel=1e-3)
    assert budget.resolve(config.build({"monolith": {"steps": 5}})).monolith.steps == 5


def test_a_router_that_trains_too_long_is_refused_with_the_steps_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"router\.steps = 9000 takes .* at most (\d+) fits") as caught:
        budget.resolve(config.build({"router": {"steps": 9000}}))
    fits = int(str(caught.value).split("at most ")[1].split()[0])
    assert budget.resolve(config.build({"router": {"steps": fits}}))
    with pytest.raises(ConfigError):
        budget.resolve(config.build({"router": {"steps": fits + 1}}))


def test_a_router_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.width = 160"):
        budget.resolve(config.build({"router": {"width": 160, "heads": 5, "blocks": 4}}))


def _card(run, name: str, spent: int) -> None:
    folder = run.expert(name)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"samples": 40, "steps": 10, "batch": 4, "epochs": 2.5, "seconds": 3.0, "parameters": 7, "threads": 1}
    store.write_card(folder, "expert", run.id, [], flops=spent, resumed=0, forward_flops=1, **common)


def test_ledger_adds_up_and_says_matched_only_within_the_tolerance(small_run) -> None:
    for name, spent in {"0": 4000, "1": 4000, "router": 100, "monolith": 8060}.items():
        _card(small_run, name, spent)
    ledger = budget.write_ledger(small_run)
    assert ledger == json.loads(small_run.ledger.read_text())
    assert (ledger["experts"], ledger["router"], ledger["monolith"]) == ({"0": 4000, "1": 4000}, 100, 8060)
    assert ledger["ratio"] == pytest.approx(8100 / 8060) and ledger["matched"] is True
    assert ledger["arms"]["0"]["updates"] == 10 and ledger["arms"]["0"]["epochs"] == 2.5
    assert ledger["training"]["archipelago"] == {
        "flops": 8100, "samples": 80, "router_samples": 40, "updates": 10, "parameters": 21,
        "seconds_sum": 9.0, "seconds_longest": 3.0,
    }  # fmt: skip
    _card(small_run, "monolith", 8300)
    assert budget.write_ledger(small_run)["matched"] is False


@pytest.mark.parametrize("absent", ["router", "1", "monolith"])
def test_ledger_of_an_unfinished_run_is_not_matched(small_run, absent: str) -> None:
    for name in {"0", "1", "router", "monolith"} - {absent}:
        _card(small_run, name, 4000 if name in "01" else 8000 if name == "monolith" else 0)
    ledger = budget.write_ledger(small_run)
    assert (ledger["ratio"], ledger["matched"], ledger["missing"]) == (None, False, [absent])


def test_a_card_of_another_run_counts_for_nothing(small_run) -> None:
    _card(small_run, "0", 4000)
    card = store.read_card(small_run.expert("0"))
    store.write_sealed(small_run.expert("0") / "card.json", {**card, "run": "another"})
    assert "0" in budget.write_ledger(small_run)["missing"]


def test_sampling_costs_follow_solver_guidance_and_strategy() -> None:
    plain = config.build({"sample": {"steps": 10, "guidance": 1.0}})
    heun = config.build({"sample": {"steps": 10, "guidance": 3.0, "solver": "heun"}})
    one, route = flops.expert_forward_flops(plain), flops.router_forward_flops(plain)
    table = budget.sampling(plain)["per_clip"]
    assert table["monolith"]["total"] == table["oracle"]["total"] == 10 * one
    assert table["top1"]["total"] == 10 * (one + route)
    assert table["full"]["experts"] == 30 * one and table["ancestral"]["router"] == 8 * route
    assert budget.sampling(heun)["per_clip"]["top2"]["experts"] == 19 * 2 * 2 * one
    assert np.isclose(budget.sampling(heun)["per_clip"]["top2"]["router"], 19 * route)
