"""What every arm cost: parameters, training FLOPs, samples and updates from the cards; sampling FLOPs from the settings."""

from __future__ import annotations

from typing import Any

from archipel import store
from archipel.backbones import flops, spending
from archipel.flow.draws import ROUTE_NOISES
from archipel.run import MONOLITH, ROUTER, Run
from archipel.study.arms import asks_router, experts_called
from archipel.study.members import Members
from archipel.study.plan import MAIN, Arm

_TRUNK = "warm_start"


def costs(members: Members, arm: Arm) -> dict[str, Any]:
    """Costs of one training of an arm (its first seed): {"parameters", "active", "training_flops", "samples", "updates",
    "epochs", "seconds", "sampling_flops", "evaluations"}.

    parameters: of all that was trained; active: of what one evaluation reads; samples: training clips seen by experts or the
    monolith, the router's not counted; updates: of one network; epochs: passes of a network over its own clips, mean;
    seconds: training wall time of experts or monolith, summed; sampling_flops: per clip, without the codec, an upper bound
    for a threshold. What is not trained yet is null.
    """
    run = members.of(arm.member, 0)
    alone = arm.how in (MONOLITH, "cluster")
    names = [MONOLITH] if alone else run.expert_names
    cards = [store.read_card(run.expert(name)) for name in names]
    router = members.of(arm.router or (MAIN if alone else arm.member), 0)
    asked = asks_router(arm)
    routing = store.read_card(router.expert(ROUTER)) if asked else None
    found: dict[str, Any] = {**sampling(run, router, arm)}
    if any(card is None for card in cards):
        keys = ("parameters", "active", "training_flops", "samples", "updates", "epochs", "seconds")
        return {**dict.fromkeys(keys), **found}
    done = [card for card in cards if card is not None]
    trunk = (done[0].get(_TRUNK) or {}).get("flops", 0)  # shared, hence counted once
    own = int(routing["parameters"]) if routing else 0
    return {
        "parameters": sum(int(card["parameters"]) for card in done) + own,
        "active": round(int(done[0]["parameters"]) * experts_called(arm, len(done))) + own,
        "training_flops": sum(int(card["flops"]) for card in done)
        + (int(routing["flops"]) if routing else 0)
        + int(trunk),
        "samples": sum(int(card["samples"]) for card in done),
        "updates": max(int(card["steps"]) for card in done),
        "epochs": round(sum(float(card["epochs"]) for card in done) / len(done), 1),
        "seconds": round(sum(float(card["seconds"]) for card in done), 1),
        **found,
    }


def sampling(run: Run, router: Run, arm: Arm) -> dict[str, Any]:
    """Sampling FLOPs per clip, and evaluations of the velocity."""
    part, config = run.config.sample, run.config
    steps = int(arm.settings.get("steps", part.steps))
    evaluations = steps if part.solver == "euler" else 2 * steps - 1
    guided = float(arm.settings.get("guidance", part.guidance)) not in (0.0, 1.0)
    calls = evaluations * (2 if guided else 1) * experts_called(arm, config.partition.k)
    alone = arm.how in (MONOLITH, "cluster")
    per_clip = spending.forward_flops(config, MONOLITH if alone else "0")
    asked = asks_router(arm)
    branches = 2 if part.composition == "guided-mixture" and guided else 1
    routes = {"steps": evaluations * branches, "half": evaluations / 2 + ROUTE_NOISES, "once": ROUTE_NOISES}.get(
        asked, 0
    )
    total = calls * per_clip + routes * flops.router_forward_flops(router.config)
    return {"sampling_flops": round(total), "evaluations": evaluations}
