"""The headline of a study: the question, the answer that the deciding interval carries, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.report.reading import finite, mapping
from archipel.report.scores import cell, direction, interval_text
from archipel.report.svg import number
from archipel.study.page_charts import ratios
from archipel.study.page_reading import FEW, StudyFiles, ends

QUESTION = (
    "With the same clips and the same training compute, do experts that never exchange anything, mixed by a router, come "
    "nearer to real clips than one monolith, and how much nearer?"
)


def _sign(row: Mapping[str, Any]) -> int:
    """1 where the arm is better by the intervals of the difference and of the ratio, −1 where worse, 0 where neither."""
    _, low, high = ends(row.get("difference"))
    _, least, most = ends(row.get("ratio"))
    if low is None or high is None:
        return 0
    better = -1 if direction(str(row.get("metric"))) == "higher" else 1
    sign = better if high < 0 else -better if low > 0 else 0
    if least is not None and most is not None and least <= 1 <= most:
        return 0
    return sign


def _answer(row: Mapping[str, Any], base: str, few: bool) -> tuple[str, str]:
    """(sentence, mood) of the deciding comparison."""
    ratio = cell(mapping(row.get("ratio")))
    interval = f" (95 % interval {ratio['interval']})" if ratio and ratio["interval"] else ""
    size = f": the ratio is {ratio['value']}{interval}" if ratio else ""
    sign = _sign(row)
    if sign > 0:
        told = (
            f"The {base} lies {ratio['value']} times as far from the real clips as the archipelago{interval}"
            if ratio
            else "The archipelago came nearer to the real clips than the monolith; by how many times cannot be said"
        )
        mood = "good"
    elif sign < 0:
        told = "The monolith came nearer to the real clips than the archipelago" + size
        mood = "plain"
    else:
        told = "No difference between archipelago and monolith can be told" + size
        mood = "plain"
    return (f"{told}; too few clips to conclude", "warn") if few else (told, mood)


def goal_text(files: StudyFiles, row: Mapping[str, Any]) -> str:
    """Whether the goal is reached, part by part; '' where no goal is stated."""
    goal = mapping(files.study.get("goal"))
    wanted, least = finite(goal.get("ratio")), finite(goal.get("low"))
    if wanted is None:
        return ""
    stated = f"a ratio of {wanted:g}" + (f" with the interval above {least:g}" if least is not None else "")
    value, low, _ = ends(row.get("ratio"))
    if value is None:
        return f"The goal, {stated}, cannot be judged: no ratio is stated, since the arm's distance may be 0."
    reached = value >= wanted and (least is None or (low is not None and low > least))
    if reached and (row.get("reached") is False or files.few(str(row.get("set")))):
        return f"The goal, {stated}, is reached in numbers and does not count: see what is said against it."
    return f"The goal, {stated}, is {'reached' if reached else 'not reached'}."


def compute_text(files: StudyFiles) -> str:
    """The arms' training compute beside each other."""
    share = files.relative(files.arm)
    if share is None:
        return "What the two arms cost in training is not known: read the difference as one between unequal budgets."
    if abs(share - 1) <= 0.02:
        return f"Training compute is matched: the archipelago used {share:.3f} times the baseline's FLOPs, router included."
    return f"Training compute is not equal: the archipelago used {share:.3g} times the baseline's FLOPs."


def _cautions(files: StudyFiles, row: Mapping[str, Any], few: bool) -> list[str]:
    said = []
    where = str(row.get("set"))
    if few:
        groups = files.groups(where) or 0
        said.append(f"Too few clips to conclude: {groups:.0f} content groups, at least {FEW} are needed.")
    if row.get("circle") is True:
        said.append("The deciding metric's features also made the partition: a circle, which no study should rest on.")
    copied = mapping(mapping(files.study.get("copying")).get(where))
    if copied.get("grew") is True:
        said.append(f"Copying grew: {copied.get('verdict') or 'a gain does not count.'}")
    share = files.relative(files.arm)
    if share is None or abs(share - 1) > 0.02:
        said.append(compute_text(files))
    if len(files.seeds) == 1:
        said.append("One seed: the interval does not cover what another partition or training would have given.")
    return said


def _tiles(files: StudyFiles) -> list[dict[str, str]]:
    tiles = []
    if files.seeds:
        tiles.append({"value": str(len(files.seeds)), "label": "seeds of partition, initialisation and noise"})
    for where in files.sets:
        clips = finite(mapping(mapping(files.study.get("sets")).get(where)).get("clips"))
        groups = files.groups(where)
        if clips is not None:
            of = f", {groups:.0f} content groups" if groups is not None else ""
            tiles.append({"value": number(clips), "label": f"captions: {files.set_title(where)}{of}"})
    if (share := files.relative(files.arm)) is not None:
        tiles.append({"value": f"{share:.3f}", "label": "archipelago's training FLOPs over the baseline's"})
    if files.arms:
        tiles.append({"value": str(len(files.arms)), "label": "rows: real clips, codec, arms, controls, bounds"})
    return tiles


def headline(files: StudyFiles) -> dict[str, Any]:
    """Context: question, answer, cautions, tiles and the chart of ratios. Claims come from the deciding comparison alone."""
    row = files.compared()
    base = {
        "question": QUESTION,
        "tiles": _tiles(files),
        "chart": ratios(files),
        "baseline": files.title(files.baseline) if files.baseline else "",
    }
    if row is None:
        title = "Archipelago and monolith are not compared yet"
        short = "study.json holds no comparison that decides."
        return base | {"title": title, "mood": "plain", "short": short, "long": "", "cautions": []}
    where = str(row.get("set"))
    few = files.few(where)
    against = files.title(str(row.get("baseline")))
    title, mood = _answer(row, "better monolith" if row.get("baseline") == files.baseline else "monolith", few)
    cautions = _cautions(files, row, few)
    pair = f"{files.title(str(row.get('arm')))} less {against} is {interval_text(row.get('difference'))}"
    short = f"{row.get('metric')}, {files.set_title(where)}: {pair}"
    if ends(row.get("ratio"))[0] is not None:
        short += f"; the baseline's distance over the arm's is {interval_text(row['ratio'])}"
    share = files.relative(files.arm)
    even = compute_text(files) if share is not None and abs(share - 1) <= 0.02 else ""
    long = " ".join(filter(None, ["Intervals at 95 %.", goal_text(files, row), even]))
    mood = "plain" if mood == "good" and (row.get("circle") is True or not even) else mood
    if mood == "good" and any(said.startswith("Copying grew") for said in cautions):
        mood = "warn"
    return base | {"title": title, "mood": mood, "short": short + ".", "long": long, "cautions": cautions}
