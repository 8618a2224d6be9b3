"""The study's tables: the paper's table with intervals and costs, comparisons, copying, pilot, protocols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from archipel.report.reading import finite, mapping
from archipel.report.scores import CLUSTERS, COPYING, RAW, cell, decimals, direction, family, interval_text
from archipel.report.svg import number
from archipel.study.page_reading import FAMILIES, StudyFiles, duration, entries, flat, sentence, words

COSTS = (
    ("parameters", "parameters"),
    ("training_flops", "training FLOPs"),
    ("samples", "samples"),
    ("updates", "updates"),
    ("sampling_flops", "sampling FLOPs per clip"),
)
MORE_COSTS = (
    ("active", "active parameters"),
    ("evaluations", "network evaluations per clip"),
    ("epochs", "passes over own clips"),
    ("seconds", "training seconds, summed"),
)
HEADINGS = {
    "Kernel distances (unbiased)": "KID, unbiased",
    "Excess Fréchet distances (over real clips at the same N)": "Excess Fréchet distance",
    "Captions and motion": "Captions, look and motion",
}


def short_name(metric: str) -> str:
    """A metric without the estimator that its column group already names."""
    for prefix in ("KID-", "excess-FD-", "excess-"):
        if metric.startswith(prefix):
            return metric.removeprefix(prefix)
    return metric


def _column_groups(files: StudyFiles, metrics: Sequence[str]) -> list[dict[str, Any]]:
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        groups.setdefault(family(metric), []).append(metric)
    order = [family(files.metric), *HEADINGS]
    groups = dict(sorted(groups.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))
    return [
        {
            "heading": HEADINGS.get(heading, heading),
            "better": better.pop() if len(better := {direction(metric) for metric in names}) == 1 else "",
            "columns": [
                {
                    "name": short_name(metric),
                    "metric": metric,
                    "better": direction(metric),
                    "primary": metric == files.metric,
                    "unit": files.unit(metric),
                }
                for metric in names
            ],
        }
        for heading, names in groups.items()
    ]


def cost_cells(files: StudyFiles, arm: str, keys: Sequence[tuple[str, str]] = COSTS) -> list[dict[str, str] | None]:
    """One cell per cost; training FLOPs also as a multiple of the baseline's."""
    found: list[dict[str, str] | None] = []
    for key, _ in keys:
        value = finite(files.costs(arm).get(key))
        beside = ""
        if key == "training_flops" and (share := files.relative(arm)) is not None and arm != files.baseline:
            beside = f"{share:.3f} × baseline" if abs(share - 1) < 0.1 else f"{share:.3g} × baseline"
        found.append(None if value is None else {"value": number(value), "interval": beside})
    return found


def _seeds(files: StudyFiles, where: str, arm: str) -> dict[str, str] | None:
    """On how many seeds an arm's values rest; None where no seed changes it."""
    counts = [
        finite(row.get("seeds")) for row in files.rows if row.get("arm") == arm and row.get("set", "test") == where
    ]
    most = max((count for count in counts if count is not None), default=0)
    return {"value": f"{most:.0f}", "interval": ""} if most else None


def _places(files: StudyFiles, where: str, metric: str) -> int | None:
    """Decimals of a column: what most of its rows deserve."""
    own = [decimals(files.score(where, one["name"], metric)) for one in files.arms]
    found = Counter(places for places in own if places is not None).most_common(1)
    return found[0][0] if found else None


def _cell(row: Any, digits: int | None) -> dict[str, str] | None:
    """A score; one whose judge also made the arm's clusters is bracketed and named a circle."""
    found = cell(row, digits)
    if found is None or mapping(row).get("circle") is not True:
        return found
    return {"value": f"({found['value']})", "interval": f"{found['interval']}, circle".lstrip(", ")}


def table(
    files: StudyFiles, where: str, metrics: Sequence[str], families: Sequence[str], costs: bool
) -> dict[str, Any]:
    """Arms of ``families`` down, ``metrics`` and costs across, for one prompt set."""
    groups = _column_groups(files, metrics)
    ordered = [column["metric"] for group in groups for column in group["columns"]]
    places = [_places(files, where, metric) for metric in ordered]
    bodies = []
    for name, heading in FAMILIES:
        lines = []
        for one in files.arms:
            arm = one["name"]
            if files.family(arm) != name or name not in families:
                continue
            cells = [_cell(files.score(where, arm, m), digits) for m, digits in zip(ordered, places, strict=True)]
            if any(cells):
                tag = "primary arm" if arm == files.arm else "baseline" if arm == files.baseline else ""
                lines.append(
                    {
                        "label": files.title(arm),
                        "about": files.about(arm),
                        "tone": files.tone(arm),
                        "tag": tag,
                        "cells": cells,
                        "costs": [_seeds(files, where, arm), *cost_cells(files, arm)] if costs else [],
                    }
                )
        if lines:
            bodies.append({"heading": heading, "rows": lines})
    return {
        "set": where,
        "title": files.set_title(where),
        "groups": groups,
        "columns": [column for group in groups for column in group["columns"]],
        "costs": ["seeds", *(title for _, title in COSTS)] if costs else [],
        "width": 1 + len(ordered) + (1 + len(COSTS) if costs else 0),
        "bodies": bodies,
    }


def _told(files: StudyFiles, where: str) -> str:
    """Caption of a set's table: how many clips, groups and seeds."""
    part = mapping(mapping(files.study.get("sets")).get(where))
    groups, clips = files.groups(where), finite(part.get("clips"))
    split = str(part.get("split") or where)
    counts = [f"{clips:.0f} captions"] if clips is not None else []
    counts += [f"{groups:.0f} content groups"] if groups is not None else []
    counts += [f"{len(files.seeds)} seeds"] if files.seeds else []
    return f"Held against real clips of the {split} split. {', '.join(counts)}. Intervals at 95 %, over seeds and content groups."


def results(files: StudyFiles) -> dict[str, Any]:
    """Context: for every prompt set the main table, the ablations' arms, and raw Fréchet with its floor."""
    main = [name for name, _ in FAMILIES if name != "ablation"]
    found = []
    for where in files.sets:
        metrics = [metric for metric in files.metrics(where) if family(metric) not in (COPYING, CLUSTERS, RAW)]
        raw = [metric for metric in files.metrics(where) if family(metric) == RAW]
        one = table(files, where, metrics, main, costs=True)
        if not one["bodies"]:
            continue
        more = table(files, where, metrics, ["ablation"], costs=True)
        floor = table(files, where, raw, [name for name, _ in FAMILIES], costs=False)
        found.append(
            one
            | {
                "caption": _told(files, where),
                "few": files.few(where),
                "ablations": more if more["bodies"] else None,
                "raw": floor if floor["bodies"] else None,
            }
        )
    return {"missing": "" if found else "table.json has no rows", "tables": found, "primary": files.metric}


def comparisons(files: StudyFiles) -> dict[str, Any]:
    """Context: every comparison with its difference, ratio and verdict, one table per prompt set."""
    rows = entries(files.study.get("comparisons"))
    against = dict.fromkeys(str(row.get("baseline")) for row in rows)
    several, decides = len(against) > 1, files.compared()
    found = []
    for where in dict.fromkeys([*files.sets, *(str(row.get("set")) for row in rows)]):
        lines = []
        for row in rows:
            if str(row.get("set")) != where:
                continue
            marks = ["decides"] * (row is decides) + ["circle"] * (row.get("circle") is True)
            line = [
                files.title(str(row.get("arm"))),
                str(row.get("metric")) + (f" ({', '.join(marks)})" if marks else ""),
            ]
            line += [files.title(str(row.get("baseline")))] if several else []
            line += [
                interval_text(row.get("difference")),
                interval_text(row["ratio"]) if row.get("ratio") else "not stated",
            ]
            lines.append([*line, str(row.get("verdict") or "")])
        if lines:
            columns = ["arm", "metric", *(["against"] if several else []), "difference", "ratio", "verdict"]
            found.append({"title": files.set_title(where), "columns": columns, "caption": "", "rows": lines})
    return {"tables": found, "against": "" if several else "".join(map(files.title, against))}


def baseline(files: StudyFiles) -> dict[str, Any]:
    """Context: which monolith the headline is held against, and how it was chosen."""
    part = mapping(files.study.get("baseline"))
    rows = [
        [
            files.title(str(one.get("arm"))) + (" (chosen)" if one.get("arm") == files.baseline else ""),
            interval_text(one),
        ]
        for one in entries(part.get("candidates"))
    ]
    metric = str(part.get("metric") or "its metric")
    return {
        "chosen": files.title(files.baseline) if files.baseline else "",
        "set": str(part.get("set") or "validation"),
        "metric": metric,
        "table": {"caption": "", "columns": ["candidate", metric], "rows": rows} if rows else None,
    }


def copying(files: StudyFiles) -> dict[str, Any]:
    """Context: verdicts per prompt set and the tables of copying and coverage."""
    told = mapping(files.study.get("copying"))
    found = []
    for where in dict.fromkeys([*files.sets, *map(str, told)]):
        part = mapping(told.get(where))
        metrics = [metric for metric in files.metrics(where) if family(metric) == COPYING]
        one = table(files, where, metrics, [name for name, _ in FAMILIES if name != "ablation"], costs=False)
        verdict = str(part.get("verdict") or "")
        if verdict or one["bodies"]:
            found.append(one | {"verdict": verdict, "grew": part.get("grew") is True})
    return {"missing": "" if found else "study.json and table.json say nothing on copying", "sets": found}


def overrides_text(value: Any) -> str:
    """'expert.batch = 4, expert.steps = 800' of changed keys; 'as the run' where there are none."""
    said = [f"{key} = {inner}" for key, inner in flat_keys(mapping(value))]
    return ", ".join(said) or "none: the run's own"


def flat_keys(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Leaves of nested mappings with dotted keys."""
    found: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{before}.{key}" if before else str(key)
        found += flat_keys(inner, name) if isinstance(inner, Mapping) else [(name, str(inner))]
    return found


def pilot(files: StudyFiles) -> dict[str, Any]:
    """Context: every trial of the pilot, and whether arms had equally many."""
    part = mapping(files.study.get("pilot"))
    trials = entries(part.get("trials"))
    counts: dict[str, int] = {}
    for trial in trials:
        arm = str(trial.get("arm"))
        counts[arm] = counts.get(arm, 0) + 1
    each = ", ".join(f"{files.title(arm)} {count}" for arm, count in counts.items())
    equal = len(set(counts.values())) == 1
    even = f"Every arm had as many trials: {each}." if equal else f"The arms did not have equally many trials: {each}."
    rows = []
    for trial in trials:
        value = finite(trial.get("value"))
        rows.append(
            [
                files.title(str(trial.get("arm"))),
                overrides_text(trial.get("overrides")),
                str(trial.get("seed", "–")),
                str(trial.get("metric") or "–"),
                "–" if value is None else number(value),
            ]
        )
    return {
        "about": str(part.get("about") or ""),
        "even": even if trials else "",
        "equal": equal,
        "chosen": overrides_text(part.get("chosen")) if part.get("chosen") else "",
        "table": {"caption": "", "columns": ["arm", "changed keys", "seed", "metric", "value"], "rows": rows}
        if rows
        else None,
    }


def ledger(files: StudyFiles) -> dict[str, Any]:
    """Context: what every arm cost, and what the study took by the clock."""
    keys = (COSTS[0], MORE_COSTS[0], *COSTS[1:], MORE_COSTS[1])
    rows = []
    for one in files.arms:
        cells = cost_cells(files, one["name"], keys)
        if any(cells):
            texts = ["–" if c is None else c["value"] + (f" ({c['interval']})" if c["interval"] else "") for c in cells]
            rows.append([files.title(one["name"]), *texts])
    clock = [
        (name, duration(value))
        for name, inner in flat(mapping(files.study.get("seconds")))
        if (value := finite(inner)) is not None
    ]
    columns = ["arm", *(title for _, title in keys)]
    return {
        "missing": "" if rows else "no arm in study.json has costs",
        "table": {"caption": "", "columns": columns, "rows": rows} if rows else None,
        "clock": clock,
    }


def measured(files: StudyFiles) -> dict[str, Any]:
    """Context: prompt sets, and for every metric what it was computed with."""
    sets = []
    for where in files.named:
        part = mapping(mapping(files.study.get("sets")).get(where))
        counts = [finite(part.get(key)) for key in ("clips", "groups")]
        prompts = str(part.get("prompts") or "–")[:16]
        split = str(part.get("split") or "–")
        sets.append([files.set_title(where), split, *("–" if n is None else number(n) for n in counts), prompts])
    columns = ["prompt set", "split", "captions", "content groups", "sha256 of the prompts"]
    values: dict[str, dict[str, dict[str, None]]] = {}
    # Floors are made from halves of the real clips: a protocol of their own, which table.json has.
    arms = [row for row in files.rows if row.get("arm") != "real"]
    for row in arms or files.rows:
        protocol = dict(flat(mapping(row.get("protocol"))))
        for key, value in protocol.items():
            values.setdefault(str(row.get("metric")), {}).setdefault(key, {})[_brief(value)] = None
    keys = list(dict.fromkeys(key for found in values.values() for key in found))
    told = {metric: {key: _joined(found.get(key, {})) for key in keys} for metric, found in values.items()}
    same = [key for key in keys if len({one[key] for one in told.values()}) == 1] if len(told) > 1 else []
    shared = [(key, text) for key in same if (text := next(iter(told.values()))[key]) != "–"]
    rest = [key for key in keys if key not in same]
    lines = [[metric, *(one[key] for key in rest)] for metric, one in told.items()]
    table = {"caption": "", "columns": ["metric", *rest], "rows": lines} if lines else None
    return {
        "sets": {"caption": "", "columns": columns, "rows": sets} if sets else None,
        "split_note": sentence(str(files.study.get("split_note") or "")),
        "shared": shared,
        "protocols": table,
        "missing": "" if lines else "no row of table.json has a protocol",
    }


def _joined(values: Mapping[str, None]) -> str:
    """The values of a protocol's key over prompt sets and arms, a few of them."""
    found = [value for value in values if value]
    return "–" if not found else ", ".join(found) if len(found) <= 4 else f"{len(found)} values, see table.json"


def _brief(value: Any) -> str:
    """A protocol's value; hashes shortened to 16 digits, whole ones stand in table.json."""
    text = "" if value is None else str(value)
    hashed = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:16] + "…" if hashed else text


def members(files: StudyFiles) -> dict[str, Any]:
    """Context: the ordinary runs that the study is made of, with the keys that they change."""
    rows = []
    for one in entries(files.study.get("members")):
        title = str(one.get("title") or one.get("name"))
        jobs = ", ".join(words(one.get("jobs", []))) or "–"
        seeds = ", ".join(words(one.get("seeds", []))) or "–"
        rows.append([title, str(one.get("about") or ""), overrides_text(one.get("overrides")), jobs, seeds])
    columns = ["member", "what it is", "changed keys", "jobs", "seeds"]
    facts = [
        (name, str(files.study[key])) for name, key in (("commit", "commit"), ("run id", "run")) if files.study.get(key)
    ]
    return {
        "table": {"caption": "", "columns": columns, "rows": rows} if rows else None,
        "facts": facts,
        "command": files.command,
        "missing": "" if rows else "study.json lists no members",
    }
