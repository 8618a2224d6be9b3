"""Matched compute: the monolith gets as many training FLOPs as all experts and the router together.

As in Decentralized Diffusion Models (arXiv 2501.05450), section 4: expert batch B / K, monolith batch B, equal steps, the
router's FLOPs counted (method.md section 8, formula 7). No torch here: `init` resolves the budget.
"""

from __future__ import annotations

import math
from typing import Any

from archipel import FORMAT, store
from archipel.backbones import flops, spending
from archipel.config import RunConfig
from archipel.errors import ConfigError
from archipel.flow.draws import ROUTE_NOISES
from archipel.run import MONOLITH, ROUTER, TRUNK, Run
from archipel.training import traffic

ROUTER_SHARE = 0.05  # of the training budget, at most
ROUTER_FORWARD = 0.10  # of an expert's forward, at most
_ROUTED = ("top1", "top2", "full", "threshold")  # strategies that ask the router at every evaluation


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the monolith's batch, rate and steps where they are 0, and the planned FLOPs.

    The monolith's steps are the whole number that brings its FLOPs nearest to the archipelago's. Resolving twice
    changes nothing. Raises ConfigError where the router is too large or trains too long, naming what fits.
    """
    expert, router, k = config.expert, config.router, config.partition.k
    per_clip, per_route = flops.expert_forward_flops(config), flops.router_forward_flops(config)
    experts = k * spending.training_flops(config, "0", expert.steps, expert.batch)
    routing = flops.training_flops(per_route, router.steps, router.batch)
    _check_router(config, per_clip, per_route, experts, routing)
    batch = config.monolith.batch or k * expert.batch
    step = spending.training_flops(config, MONOLITH, 1, batch)
    # In either side:
    trunk = spending.training_flops(config, TRUNK, expert.trunk_steps, batch) if expert.warm_start else 0
    steps = config.monolith.steps or max(1, math.floor((experts + routing) / step + 0.5))
    monolith = config.monolith.model_copy(
        update={"steps": steps, "batch": batch, "lr": config.monolith.lr or expert.lr},
    )
    compute = config.compute.model_copy(
        update={
            "archipelago_flops": float(experts + routing + trunk),
            "monolith_flops": float(steps * step + trunk),
        },
    )
    return config.model_copy(update={"monolith": monolith, "compute": compute})


def _check_router(config: RunConfig, per_clip: int, per_route: int, experts: int, routing: int) -> None:
    if per_route > ROUTER_FORWARD * per_clip:
        raise ConfigError(
            f"the router's forward pass costs {per_route / per_clip:.1%} of an expert's, more than {ROUTER_FORWARD:.0%}: "
            f"make router.width = {config.router.width} or router.blocks = {config.router.blocks} smaller, "
            "or the expert larger"
        )
    if routing > ROUTER_SHARE * (experts + routing):
        one = flops.training_flops(per_route, 1, config.router.batch)
        fits = int(ROUTER_SHARE / (1 - ROUTER_SHARE) * experts / one)
        advice = f"at most {fits} fits" if fits else "not even 1 fits: lower router.batch or raise expert.steps"
        raise ConfigError(
            f"router.steps = {config.router.steps} takes {routing / (experts + routing):.1%} of the training budget, more than "
            f"{ROUTER_SHARE:.0%}: {advice} (with router.batch = {config.router.batch}, expert.steps = {config.expert.steps})"
        )


# --- the ledger ------------------------------------------------------------------------------------------------------


def write_ledger(run: Run) -> dict[str, Any]:
    """Read the cards of all jobs and write ledger.json: what was really spent, per arm.

    {"experts": {"0": flops}, "router": flops, "monolith": flops, "ratio": archipelago / monolith, "matched": bool,
    "tolerance", "missing": [jobs without a card], "arms": {name: {...}}, "training": {...}, "sampling": {...},
    "traffic": bytes that islands moved, and that other ways would have (see ``traffic.section``)}. What is
    missing is null, and then nothing is called matched. A warm run has "trunk": {"sha256", "flops", "steps"} of its shared
    start, whose FLOPs are in the ratio and in both sides of "training", once in each. Where experts begin with (or are
    adapters of) ``base/``, "base" says what that is: {"sha256", "bytes", "source"}; "parameters" of adapters are their own.
    "imported": experts from elsewhere, whose cost is not this run's: with one of them nothing is called matched, and
    "ratio" is null. Raises nothing for unfinished runs.
    """
    cards = {name: store.read_card(run.expert(name)) for name in run.job_names}
    done = {name: card for name, card in cards.items() if card is not None and card.get("run") == run.id}
    imported = [name for name, card in done.items() if card.get("imported")]
    own = {name: card for name, card in done.items() if name not in imported}
    spent = {name: int(card["flops"]) for name, card in own.items()}
    missing = [name for name in run.job_names if name not in done]
    trunk = next((card["warm_start"] for card in done.values() if card.get("warm_start")), None)
    shared = int(trunk["flops"]) if trunk else 0
    archipelago = sum(spent[name] for name in (*run.expert_names, ROUTER) if name in spent) + shared
    ratio = archipelago / (spent[MONOLITH] + shared) if not (missing or imported) and spent[MONOLITH] else None
    tolerance = run.config.compute.tolerance
    ledger = {
        "format": FORMAT,
        "run": run.id,
        "experts": {name: spent[name] for name in run.expert_names if name in spent},
        "router": spent.get(ROUTER),
        "monolith": spent.get(MONOLITH),
        "ratio": ratio,
        "matched": ratio is not None and abs(ratio - 1) <= tolerance,
        "tolerance": tolerance,
        "missing": missing,
        "arms": {name: _arm(card) for name, card in done.items()},
        "training": _training(run, own, shared),
        "sampling": sampling(run.config),
        "traffic": traffic.section(done, run.expert_names, [ROUTER]),
        **({"imported": imported} if imported else {}),
        **({"trunk": dict(trunk)} if trunk else {}),
        **_base(run),
    }
    store.write_json(run.ledger, ledger)
    return ledger


def _base(run: Run) -> dict[str, Any]:
    """The weights that every side begins with: what made them is not in this ledger, unless it is the trunk."""
    card = store.read_card(run.base, "base")
    if card is None:
        return {}
    source = "trunk" if "start" in card else run.config.expert.weights
    size = card["files"]["model.safetensors"]["bytes"]
    return {"base": {"sha256": card["sha256"], "bytes": size, "source": source}}


def _arm(card: dict[str, Any]) -> dict[str, Any]:
    """What one job spent."""
    names = ("flops", "forward_flops", "samples", "epochs", "seconds", "parameters", "batch", "threads", "resumed")
    return {"updates": card.get("steps"), **{name: card.get(name) for name in names}}


def _training(run: Run, done: dict[str, dict[str, Any]], shared: int) -> dict[str, Any]:
    """The two sides of the comparison. Experts train side by side or in turn: seconds are their sum and their longest."""
    jobs = [name for name in (*run.expert_names, ROUTER) if name in done]
    sides = {"archipelago": jobs, "monolith": [MONOLITH] if MONOLITH in done else []}
    return {
        side: {
            "flops": sum(int(done[name]["flops"]) for name in names) + (shared if names else 0),
            "samples": sum(int(done[name]["samples"]) for name in names if name != ROUTER),
            "router_samples": sum(int(done[name]["samples"]) for name in names if name == ROUTER),
            "updates": max((int(done[name]["steps"]) for name in names if name != ROUTER), default=0),
            "parameters": sum(int(done[name]["parameters"]) for name in names),
            "seconds_sum": round(sum(float(done[name]["seconds"]) for name in names), 3),
            "seconds_longest": max((float(done[name]["seconds"]) for name in names), default=0.0),
        }
        for side, names in sides.items()
    }


def sampling(config: RunConfig) -> dict[str, Any]:
    """Planned FLOPs per generated clip by strategy: experts and router apart, the codec not counted.

    Guidance (other than 0 and 1) evaluates each chosen expert twice. ``threshold`` takes between one expert and all: the
    bound is given. ``ancestral`` (and a monolith that is told the cluster) asks the router before the first step only, with
    each of its fixed noises.
    """
    part, k = config.sample, config.partition.k
    evaluations = part.steps if part.solver == "euler" else 2 * part.steps - 1
    branches = 1 if part.guidance in (0, 1) else 2
    per_clip, per_route = spending.forward_flops(config, "0"), flops.router_forward_flops(config)
    experts = {"top1": 1, "top2": min(2, k), "full": k, "threshold": k, "ancestral": 1, "oracle": 1, MONOLITH: 1}
    asked = 2 if part.composition == "guided-mixture" and part.guidance != 1 else 1
    table = {}
    for strategy, count in experts.items():
        drawn = strategy == "ancestral" or (strategy == MONOLITH and flops.cluster_width(config) > 0)
        routes = evaluations * asked if strategy in _ROUTED else ROUTE_NOISES * drawn
        one = spending.forward_flops(config, MONOLITH) if strategy == MONOLITH else per_clip
        own, routing = evaluations * branches * count * one, routes * per_route
        table[strategy] = {"experts": own, "router": routing, "total": own + routing, "evaluations": evaluations}
    return {"per_clip": table, "bounds": {"threshold": "at most"}, "active_experts": experts}
