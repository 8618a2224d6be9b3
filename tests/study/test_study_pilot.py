"""Trials: how they are written, that every arm gets as many, and that none of them looks at test captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from archipel import config, presets, store
from archipel.errors import ArchipelError, ConfigError
from archipel.run import Run
from archipel.study.pilot import BASE, _log, parse, summary, trial_plan
from archipel.study.plan import VALIDATION, Plan, member_config
from archipel.training import budget


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", budget.resolve(config.build(presets.fit_rope(presets.values("tiny")), "test")))


def test_trials_are_read_and_the_run_as_it_is_comes_first() -> None:
    found = parse(["fast:expert.lr=0.01", "wide:expert.width=96,expert.heads=3"])
    assert found == {BASE: {}, "fast": {"expert.lr": 0.01}, "wide": {"expert.width": 96, "expert.heads": 3}}


@pytest.mark.parametrize("text", ["expert.lr=0.01", ":expert.lr=1", "a b:expert.lr=1", f"{BASE}:expert.lr=1"])
def test_a_trial_without_a_name_of_its_own_is_refused(text: str) -> None:
    with pytest.raises(ArchipelError, match="--trial"):
        parse([text])


def test_every_arm_gets_as_many_trials_on_validation_alone(run: Run) -> None:
    planned = trial_plan(run, parse(["fast:expert.lr=0.01", "x0:expert.prediction=x0"]), 2)
    assert len(planned.arms) == 9 and {arm.sets for arm in planned.arms} == {(VALIDATION,)}
    sides = [arm.name.removeprefix(f"trial-{arm.title}-") for arm in planned.arms]
    assert {side: sides.count(side) for side in sides} == {"top1": 3, "monolith": 3, "small-batch": 3}


def test_a_rate_is_tried_by_both_sides_and_flops_stay_matched(run: Run) -> None:
    planned = trial_plan(run, parse(["fast:expert.lr=0.01", "long:expert.steps=300"]), 1)
    for name, rate in (("trial-fast", 0.01), ("trial-fast-small-batch", 0.01)):
        assert member_config(run.config, planned.member(name), 0).monolith.lr == rate
    longer = member_config(run.config, planned.member("trial-long"), 0)
    small = member_config(run.config, planned.member("trial-long-small-batch"), 0)
    assert longer.compute.monolith_flops == pytest.approx(longer.compute.archipelago_flops, rel=0.02)
    assert small.compute.monolith_flops == pytest.approx(longer.compute.monolith_flops, rel=0.02)
    assert small.monolith.batch == longer.expert.batch


def test_the_small_batch_has_a_rate_of_its_own_to_try(run: Run) -> None:
    planned = trial_plan(run, parse(["small:study.small_batch_lr=0.005"]), 1)
    rates = {name: member_config(run.config, planned.member(name), 0).monolith.lr for name in planned_names(planned)}
    assert rates.pop("trial-small-small-batch") == 0.005
    assert set(rates.values()) == {run.config.monolith.lr}


def planned_names(planned: Plan) -> list[str]:
    return [member.name for member in planned.members]


def test_trials_of_earlier_calls_stay_in_the_log(run: Run) -> None:
    def rows(trial: str, value: float) -> list[dict[str, object]]:
        return [{"trial": trial, "arm": arm, "seed": 0, "value": value} for arm in ("top1", "monolith")]

    _log(run, rows(BASE, 1.0) + rows("fast", 2.0), ("top1", "monolith"))
    path = run.root / "study" / "pilot.json"
    store.write_json(path, {**store.read_json(path), "chosen": {"expert.lr": 0.01}})
    _log(run, rows(BASE, 1.5) + rows("slow", 3.0), ("top1", "monolith"))
    found = store.read_json(path)
    values = {(row["trial"], row["arm"]): row["value"] for row in found["trials"]}
    assert len(found["trials"]) == 6 and values[BASE, "top1"] == 1.5 and values["fast", "monolith"] == 2.0
    assert found["chosen"] == {"expert.lr": 0.01} and found["about"].startswith("3 trials")


def test_a_trial_of_a_key_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expert\.learning"):
        parse(["odd:expert.learning=1"])


def test_the_summary_names_the_best_trial_of_every_arm_first() -> None:
    rows = [
        {"trial": name, "arm": arm, "value": value, "seed": seed}
        for arm, table in (
            ("top1", {"a": (1.0, 3.0), "b": (1.5, 1.5)}),
            ("monolith", {"a": (1.0, 1.0), "b": (2.0, 0.5)}),
        )
        for name, values in table.items()
        for seed, value in enumerate(values)
    ]
    assert summary(rows) == ["top1: b 1.500, a 2.000", "monolith: a 1.000, b 1.250"]
