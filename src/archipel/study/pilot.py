"""The pilot: trials of settings on validation captions, as many for every arm, before the recipe is fixed.

A trial changes keys of run.toml for the archipelago and for both monoliths alike; what belongs to one side only (clusters,
the router) leaves the other side as it is. Test captions are never sampled here. All trials are logged in
RUN/study/pilot.json, and the study's page shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archipel import FORMAT, config, store
from archipel.errors import ArchipelError
from archipel.progress import StopFlag, log_to
from archipel.run import MONOLITH, ROUTER, Run
from archipel.study import members, results, sampling
from archipel.study.members import folder
from archipel.study.plan import EXPERTS, VALIDATION, Arm, Member, Plan, plan
from archipel.study.prompts import Prompts
from archipel.study.sampling import JudgeSpec

BASE = "as-it-is"
SMALL = "small-batch"


def parse(trials: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``NAME:KEY=VALUE,KEY=VALUE`` -> overrides by name, and the trial of nothing changed first. Raises ArchipelError."""
    found: dict[str, dict[str, Any]] = {BASE: {}}
    for text in trials:
        name, colon, pairs = text.partition(":")
        if not colon or not name.replace("-", "").isalnum() or name in found:
            raise ArchipelError(f"--trial {text!r} is not NAME:KEY=VALUE,KEY=VALUE with a name of its own")
        found[name] = {}
        for pair in pairs.split(","):
            values = config.parse_sets([pair])
            for section, keys in values.items():
                found[name] |= {f"{section}.{key}": value for key, value in keys.items()}
    return found


def trial_plan(run: Run, trials: Mapping[str, Mapping[str, Any]], seeds: int) -> Plan:
    """Three arms per trial, on validation captions alone."""
    whole = plan(run.config, seeds, ("table",))
    small = whole.member(SMALL).overrides
    made, arms = [], []
    for name, over in trials.items():
        # The monoliths' steps follow the FLOPs of what the trial changes.
        again = {} if "monolith.steps" in over else {"monolith.steps": 0}
        rate = {"monolith.lr": over["expert.lr"]} if "expert.lr" in over and "monolith.lr" not in over else {}
        own_rate = {"monolith.lr": over["study.small_batch_lr"]} if over.get("study.small_batch_lr") else {}
        own = {**again, **over, **rate}
        one, two = f"trial-{name}", f"trial-{name}-{SMALL}"
        batch = own.get("expert.batch", run.config.expert.batch)
        made += [
            Member(one, name, own, (EXPERTS, ROUTER, MONOLITH), seeds),
            Member(
                two,
                f"{name}, small batch",
                {**own, **small, **over, **rate, **own_rate, "monolith.batch": batch},
                (MONOLITH,),
                seeds,
            ),
        ]
        sets = (VALIDATION,)
        arms += [
            Arm(f"{one}-{whole.primary}", name, "archipelago", one, whole.primary, seeds, sets=sets),
            Arm(f"{one}-{MONOLITH}", name, "monolith", one, MONOLITH, seeds, sets=sets),
            Arm(f"{one}-{SMALL}", name, "monolith", two, MONOLITH, seeds, sets=sets),
        ]
    return Plan(seeds, ("table",), tuple(made), tuple(arms), whole.primary)


def pilot(
    run: Run,
    trials: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int = 2,
    judges: JudgeSpec | None = None,
    stop: StopFlag | None = None,
    workers: int | None = None,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Train and score all trials; continues where it was. Returns the rows of pilot.json, best first for every arm.

    Raises ArchipelError where there are no validation clips or a trial cannot be configured, Stopped.
    """
    judges, stop = judges or JudgeSpec(), StopFlag() if stop is None else stop
    planned = trial_plan(run, trials, seeds)
    with store.lock(run.root / ".locks" / "study.lock", f"the study of {run.root}"), log_to(run.log("study")):
        opened = members.open_members(run, planned)
        members.make(opened, stop, workers=workers, threads=threads)
        sampling.sample_all(opened, judges, stop, workers=workers)
        scores = results.table_of(opened, judges, Prompts.of(run, VALIDATION), stop).scores
        metric = run.config.evaluate.primary
        rows = []
        for arm in planned.arms:
            found = scores[arm.name, metric]
            values = [] if found.estimate is None else found.estimate.values.tolist()
            side = arm.name.removeprefix(f"trial-{arm.title}-")
            over = dict(trials[arm.title])
            rows += [
                {"trial": arm.title, "arm": side, "overrides": over, "seed": seed, "metric": metric, "value": value}
                for seed, value in enumerate(values)
            ]
        _log(run, rows, (planned.primary, MONOLITH, SMALL))
    return rows


def _log(run: Run, rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> None:
    """Put trials into pilot.json beside those of earlier calls, which stay: every trial counts."""
    path = folder(run) / "pilot.json"
    before = store.read_json(path) if path.is_file() else {}
    place = {(row["trial"], row["arm"], row["seed"]): row for row in before.get("trials", [])}
    place |= {(row["trial"], row["arm"], row["seed"]): row for row in rows}
    names = dict.fromkeys(row["trial"] for row in place.values())
    about = f"{len(names)} trials for each of {', '.join(sides)}, scored on the validation captions only"
    kept = {"trials": list(place.values()), "chosen": before.get("chosen", {})}
    store.write_json(path, {"format": FORMAT, "run": run.id, "about": about, **kept})


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per arm: its trials by the mean over seeds, best first."""
    said = []
    for arm in dict.fromkeys(str(row["arm"]) for row in rows):
        means: dict[str, list[float]] = {}
        for row in rows:
            if row["arm"] == arm:
                means.setdefault(str(row["trial"]), []).append(float(row["value"]))
        order = sorted(means, key=lambda name: sum(means[name]) / len(means[name]))
        parts = [f"{name} {sum(means[name]) / len(means[name]):.3f}" for name in order]
        said.append(f"{arm}: {', '.join(parts)}")
    return said
