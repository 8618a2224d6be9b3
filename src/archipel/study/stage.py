"""``archipel study RUN``: members -> clips -> table -> ablations -> page. Every step does what is missing."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import FORMAT, __version__, store
from archipel.evaluation.extractors.specs import parse
from archipel.progress import StopFlag, log_to
from archipel.run import Run
from archipel.study import ablations, members, results, sampling, trained
from archipel.study.costs import costs
from archipel.study.members import Members, folder
from archipel.study.page import write_page
from archipel.study.plan import MIXED, PARTS, SHOWN, TRAIN, VALIDATION, plan
from archipel.study.prompts import Prompts
from archipel.study.sampling import JudgeSpec

logger = logging.getLogger("archipel")
GOAL = {"ratio": 2.0, "low": 1.5}
TITLES = {
    "test": "test captions, against test clips",
    TRAIN: "training captions with new noise, against training clips",
    VALIDATION: "validation captions: what choices are made on",
    MIXED: "test captions that mix clusters",
}


@dataclass(frozen=True)
class Done:
    """The page, and what to say about it."""

    page: Path
    said: list[str]


def study(
    run: Run,
    *,
    seeds: int = 5,
    parts: Sequence[str] = PARTS,
    judges: JudgeSpec | None = None,
    stop: StopFlag | None = None,
    workers: int | None = None,
    threads: int | None = None,
) -> Done:
    """Do all of a study that is missing and write RUN/study/{plan,table,study}.json and index.html.

    What was trained or sampled stays, whatever ``seeds`` and ``parts`` were before. Raises ArchipelError for a plan that
    makes no sense or a judge that cannot be had (before any work), Stopped with everything kept.
    """
    judges = judges or JudgeSpec()
    stop = StopFlag() if stop is None else stop
    began = time.monotonic()
    planned = plan(run.config, seeds, parts)
    judges.open(run).require_frames(run.config.clips.frames)
    with store.lock(run.root / ".locks" / "study.lock", f"the study of {run.root}"), log_to(run.log("study")):
        opened = members.open_members(run, planned)
        store.write_json(folder(run) / "plan.json", {"format": FORMAT, "run": run.id, **planned.as_dict()})
        members.make(opened, stop, workers=workers, threads=threads)
        sampling.sample_all(opened, judges, stop, workers=workers)
        result = results.score(opened, judges, stop)
        found = ablations.all_of(opened, result, stop)
        about = {
            "format": FORMAT,
            "run": run.id,
            "name": run.root.name,
            "version": __version__,
            "commit": commit(),
            "command": command(run, seeds, planned.parts, judges),
            **_about(opened, result.sets),
            **result.extra,
            "ablations": found,
            "curve": trained.curve(opened, result),
            "pilot": _pilot(run),
            "samples": _samples(opened),
            "notes": [*result.notes, *_notes(opened)],
            "limits": limits(opened),
            "seconds": {"study": round(time.monotonic() - began, 1)},
        }
        store.write_json(folder(run) / "table.json", result.rows)
        store.write_json(folder(run) / "study.json", about)
        page = write_page(folder(run))
    logger.info("study: %s", page)
    return Done(page, result.said)


def _about(opened: Members, sets: Mapping[str, Prompts]) -> dict[str, Any]:
    run, planned = opened.run, opened.plan
    return {
        "seeds": [run.config.run.seed + seed for seed in range(planned.seeds)],
        "primary": {"arm": planned.primary, "metric": run.config.evaluate.primary},
        "goal": GOAL,
        "fps": run.config.clips.fps,
        "split_note": "all seeds share clips, split, codec and captions; they differ in partition, initialisation, order and noise",
        "sets": {
            name: {
                "title": TITLES[name],
                "split": one.split,
                "clips": len(one.rows),
                "groups": len(set(one.groups)),
                "prompts": one.digest,
            }
            for name, one in sets.items()
        },
        "members": [
            {
                "name": member.name,
                "title": member.title,
                "about": "",
                "overrides": dict(member.overrides),
                "jobs": list(member.jobs),
                "seeds": list(range(member.seeds)),
            }
            for member in planned.members
        ],
        "arms": [
            {
                "name": arm.name,
                "title": arm.title,
                "family": arm.family,
                "member": arm.member,
                "about": arm.how,
                "costs": costs(opened, arm),
            }
            for arm in planned.arms
        ],
    }


def _samples(opened: Members) -> dict[str, Any]:
    """Which clips the page shows: the first captions of a set, the first seed, the arms that the question is about."""
    run, planned = opened.run, opened.plan
    shown = [planned.primary, "full", "ancestral", "monolith", "small-batch", "random-shards", "oracle"]
    clips = {name: Prompts.of(run, name) for name in ("test", TRAIN)}
    found = {}
    for name, prompts in clips.items():
        sampling.show_real(run, prompts)
        arms = [arm.name for arm in planned.arms if arm.name in shown and name in arm.sets]
        order = sorted(arms, key=shown.index)
        found[name] = {
            "rule": f"the first {SHOWN} captions of the set, the first seed: chosen before anything was looked at",
            "rows": [
                {"caption": caption, "row": int(row)}
                for caption, row in zip(prompts.captions[:SHOWN], prompts.rows[:SHOWN], strict=False)
            ],
            "arms": ["real", *order],
        }
    return found


def _pilot(run: Run) -> Any:
    """The trials that the recipe was chosen by, where somebody put them beside the study."""
    path = folder(run) / "pilot.json"
    return store.read_json(path) if path.is_file() else None


def _notes(opened: Members) -> list[str]:
    fewer = sorted({arm.seeds for arm in opened.plan.arms if arm.seeds < opened.plan.seeds})
    if not fewer:
        return []
    return [
        f"some arms have {' or '.join(map(str, fewer))} seeds, the others {opened.plan.seeds} (column seeds); pairs are made of "
        "the seeds that both have"
    ]


def limits(opened: Members) -> list[str]:
    """What the study does not show."""
    config, k = opened.run.config, opened.run.config.partition.k
    return [
        f"Clips are {config.clips.size} x {config.clips.size} pixels and {config.clips.frames} frames of one source "
        f"({config.clips.source}): what holds here need not hold at the paper's scale.",
        "All seeds share one split: intervals cover content groups, partition, initialisation and noise, not other splits.",
        f"The archipelago has {k} times the monolith's parameters at equal training FLOPs, as in the paper; the parameter-matched "
        "monoliths say what that alone is worth.",
        "Distances are those of the named extractors; only I3D's is FVD, and none was computed unless a row says so.",
        "The oracle knows the real clip's cluster, which no caption gives: a bound, not a method.",
    ]


def commit() -> str:
    """The commit that this code is of, where it runs from a clone ("-dirty" where files differ from it); else "".

    The repository must hold this very file: an environment may lie within a repository of somebody's own.
    """
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return ""


def command(run: Run, seeds: int, parts: Sequence[str], judges: JudgeSpec) -> str:
    """What to type to repeat the study; only names of the run and of judges' files, since a page is passed on."""
    said = [f"archipel study {run.root.name} --seeds {seeds}"]
    said += [f"--only {','.join(parts)}"] if tuple(parts) != PARTS else []
    said += [f"--judge {spec.name}={Path(spec.where).name}" for spec in map(parse, judges.specs) if spec.where]
    said += ["--allow-torchscript"] if judges.allow_torchscript else []
    return " ".join(said)
