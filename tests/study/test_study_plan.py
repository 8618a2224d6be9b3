"""What a study trains: equal compute where it says so, the same clips everywhere, and nonsense refused before any work."""

from __future__ import annotations

import pytest

from archipel import config, presets
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.config import RunConfig
from archipel.errors import ArchipelError
from archipel.run import MONOLITH
from archipel.study.plan import EXPERTS, PARTS, matched_width, member_config, plan
from archipel.training import budget


@pytest.fixture(scope="module")
def small() -> RunConfig:
    values = config.merge(presets.values("tiny"), {"partition": {"k": 4}, "clips": {"source": "shapes"}})
    over = {
        "expert": {"width": 64, "heads": 4, "steps": 400, "batch": 6, "prediction": "x0"},
        "router": {"width": 12, "heads": 1, "steps": 200, "batch": 8},
    }
    return budget.resolve(config.build(presets.fit_rope(config.merge(values, over)), "test"))


def training_flops(made: RunConfig, jobs: list[str]) -> float:
    expert = flops.expert_forward_flops(made)
    total = 0.0
    for job in jobs:
        if job == MONOLITH:
            total += flops.training_flops(flops.monolith_forward_flops(made), made.monolith.steps, made.monolith.batch)
        elif job != "router":
            total += flops.training_flops(expert, made.expert.steps, made.expert.batch)
    return total


def test_parameters_in_closed_form_are_the_networks(small: RunConfig) -> None:
    network = build_expert(small, seed=0)
    assert flops.expert_parameters(small) == sum(p.numel() for p in network.parameters())


def test_the_matched_monolith_has_all_experts_parameters(small: RunConfig) -> None:
    wide = matched_width(small)
    member = plan(small, 1).member("wide-flops")
    made = member_config(small, member, 0)
    assert made.expert.width == wide.width > small.expert.width
    assert flops.expert_parameters(made) == pytest.approx(4 * flops.expert_parameters(small), rel=0.15)
    spent = training_flops(made, [MONOLITH])
    assert spent == pytest.approx(training_flops(small, [MONOLITH]), rel=0.01)
    little = member_config(small, plan(small, 1).member("wide-flops-small"), 0)
    assert training_flops(little, [MONOLITH]) == pytest.approx(spent, rel=0.01)
    assert little.monolith.batch == small.expert.batch and little.monolith.steps > made.monolith.steps
    samples = member_config(small, plan(small, 1).member("wide-samples"), 0)
    assert samples.monolith.steps * samples.monolith.batch == small.monolith.steps * small.monolith.batch


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("small-batch", 1),
        ("short", 1 / 4),
        ("short-small", 1 / 4),
        ("cluster", 1),
        ("cluster-small", 1),
        ("width-32", None),
        ("width-32-small", None),
        ("steps-double", 2),
        ("steps-double-small", 2),
        ("steps-half", 0.5),
    ],
)
def test_monoliths_spend_what_they_say(small: RunConfig, name: str, share: float | None) -> None:
    made = member_config(small, plan(small, 2).member(name), 1)
    own = training_flops(made, [MONOLITH])
    if share is None:  # another width: its two sides are matched with each other
        assert own == pytest.approx(made.compute.archipelago_flops, rel=0.02)
    else:
        assert own == pytest.approx(share * training_flops(small, [MONOLITH]), rel=0.02)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_other_numbers_of_experts_spend_the_same(small: RunConfig, k: int) -> None:
    made = member_config(small, plan(small, 2).member(f"k{k}"), 0)
    experts = [str(number) for number in range(k)]
    assert made.partition.k == k
    assert training_flops(made, experts) == pytest.approx(training_flops(small, list("0123")), rel=0.01)


def test_a_warm_start_of_small_batches_costs_the_same(small: RunConfig) -> None:
    made = member_config(small, plan(small, 1).member("warm-small"), 0)
    trunk = flops.training_flops(flops.expert_forward_flops(made), made.expert.trunk_steps, made.monolith.batch)
    assert training_flops(made, [MONOLITH]) + trunk == pytest.approx(training_flops(small, [MONOLITH]), rel=0.02)


def test_a_warm_start_is_counted_within_each_side(small: RunConfig) -> None:
    made = member_config(small, plan(small, 1).member("warm"), 0)
    trunk = flops.training_flops(flops.expert_forward_flops(made), made.expert.trunk_steps, made.monolith.batch)
    for jobs in (list("0123"), [MONOLITH]):
        assert training_flops(made, jobs) + trunk == pytest.approx(training_flops(small, jobs), rel=0.02)


def test_members_share_clips_and_captions_and_differ_in_seed(small: RunConfig) -> None:
    whole = plan(small, 3)
    made = [member_config(small, member, seed) for member in whole.members for seed in range(member.seeds)]
    assert {one.clips.seed for one in made} == {small.run.seed}
    assert {one.run.seed for one in made} == {small.run.seed + seed for seed in range(3)}
    assert len({(one.codec, one.text) for one in made}) == 1
    assert len({one.clips for one in made}) == 1


def test_every_arm_has_its_member_and_its_jobs(small: RunConfig) -> None:
    whole = plan(small, 5)
    names = [arm.name for arm in whole.arms]
    assert len(names) == len(set(names))
    for arm in whole.arms:
        member = whole.member(arm.member)
        needs = MONOLITH if arm.how in (MONOLITH, "cluster") else EXPERTS
        assert needs in member.jobs and arm.seeds <= member.seeds, arm
        if arm.router:
            assert "router" in whole.member(arm.router).jobs and arm.seeds <= whole.member(arm.router).seeds
    assert {"oracle", "uniform", "random", "expert-0", "router-text", "router-latent"} <= set(names)


def test_parts_can_be_left_out(small: RunConfig) -> None:
    few = plan(small, 1, ("table",))
    assert {member.name for member in few.members} < {member.name for member in plan(small, 1, PARTS).members}
    assert not any(arm.family == "ablation" for arm in few.arms)


@pytest.mark.parametrize(
    ("over", "seeds", "parts", "words"),
    [
        ({"partition": {"k": 1}, "evaluate": {"arms": ["top1", "monolith"]}}, 5, PARTS, "partition.k = 1"),
        ({"sample": {"strategy": "oracle"}}, 5, PARTS, "sample.strategy"),
        ({}, 0, PARTS, "--seeds 0"),
        ({}, 5, ("table", "pilots"), "'pilots'"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(
    small: RunConfig, over: dict, seeds: int, parts: tuple, words: str
) -> None:
    made = config.build(config.merge(small.model_dump(mode="json"), over), "test")
    with pytest.raises(ArchipelError, match=words):
        plan(made, seeds, parts)
