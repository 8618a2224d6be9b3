"""The headline: what was compared, in plain words, and no more than the numbers carry.

The word that says two arms had the same compute is written only where the ledger says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.report.reading import Reader, arm_label, finite, mapping
from archipel.report.scores import TOO_FEW, direction, interval_text, notes
from archipel.report.svg import number
from archipel.run import MONOLITH

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def compute_text(cost: Mapping[str, Any]) -> str:
    """A sentence on training compute. Only with ``matched`` true does it use that word."""
    ratio = cost.get("ratio")
    if cost.get("matched") is True:
        return (
            f"Training compute is matched: archipelago over monolith is {cost['ratio_text']} in FLOPs, router included."
        )
    if cost.get("imported"):
        return (
            f"Not all experts were trained by this run ({', '.join(cost['imported'])} came from elsewhere): read every difference "
            "below as one between unequal budgets."
        )
    if ratio is None:
        return "What the arms cost in training is not known yet: read every difference below as one between unequal budgets."
    return (
        f"Training compute is not equal: the archipelago used {cost['ratio_text']} times the monolith's FLOPs, more than "
        f"{cost['tolerance']:.0%} apart. A difference between the arms may be a difference in compute."
    )


def compared(reader: Reader) -> str:
    """What was compared with what."""
    config = reader.run.config
    k = config.partition.k
    count = _NUMBERS[k].capitalize() if k < len(_NUMBERS) else str(k)
    how = (
        "dealt out at random"
        if config.partition.method == "random"
        else f"grouped by their {config.partition.features} features"
    )
    return (
        f"{count} expert{'' if k == 1 else 's'}, each trained alone on its own part of the clips ({how}), mixed by a small router, "
        f"against one monolith trained on all of them. Same captions, same noise, same sampler."
    )


def _comparisons(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = facts.get("comparisons")
    return [mapping(row) for row in found] if isinstance(found, list) else []


def _main(reader: Reader, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The comparison of the primary strategy with the monolith on the primary metric, the only one that decides."""
    config = reader.run.config
    for row in _comparisons(facts):
        if row.get("metric") == config.evaluate.primary and row.get("arm") == config.sample.strategy:
            return row
    return None


def _said(row: Mapping[str, Any], grew: bool, few: bool) -> tuple[str, str]:
    """(title, mood) of the deciding comparison. Differences are of distances where the metric says so."""
    gap = mapping(row.get("difference"))
    low, high = finite(gap.get("low")), finite(gap.get("high"))
    if low is None or high is None or low <= 0 <= high:
        title, mood = "No difference between archipelago and monolith can be told", "plain"
    elif (high < 0) == (direction(str(row.get("metric"))) == "lower"):
        title, mood = "The archipelago came nearer to the real clips than the monolith", "good"
        if grew:
            title, mood = "The archipelago came nearer to the real clips, but it also copies more", "warn"
    else:
        title, mood = "The monolith came nearer to the real clips than the archipelago", "plain"
    if few:
        return f"{title}; too few clips to conclude", "warn"
    return title, mood


def _cautions(facts: Mapping[str, Any], cost: Mapping[str, Any], few: bool) -> list[str]:
    said = []
    if few:
        said.append("Too few clips to conclude: the page shows how the comparison is made, not how it ends.")
    crossed = mapping(facts.get("extractors"))
    if crossed.get("circle") is True:
        said.append(str(crossed.get("sentence", "The primary metric's features also made the partition.")))
    copied = mapping(facts.get("copying"))
    if copied.get("grew") is True and copied.get("verdict"):
        said.append(f"Copying: {copied['verdict']}")
    if cost.get("matched") is not True:
        said.append(compute_text(cost))
    return said


def memorised(reader: Reader) -> str:
    """A caution where jobs' validation loss rose again by more than 5 % before the end; empty where none did."""
    named = []
    for name in (*reader.run.expert_names, MONOLITH):
        rows = reader.lines(reader.run.expert(name) / "metrics.jsonl")
        losses = [(finite(row.get("validation_ema")), row.get("step")) for row in rows]
        known = [(loss, step) for loss, step in losses if loss is not None]
        if known and known[-1][0] > 1.05 * min(known)[0]:
            named.append(f"{'expert ' if name != MONOLITH else ''}{name} (lowest at step {min(known)[1]})")
    if not named:
        return ""
    return (
        f"The loss on validation clips had risen again at the end for {', '.join(named)}: these networks know their "
        "training clips partly by heart. Read the samples of training captions, and the copying table, with that in mind."
    )


def _tiles(reader: Reader, facts: Mapping[str, Any], cost: Mapping[str, Any]) -> list[dict[str, str]]:
    config = reader.run.config
    k = config.partition.k
    tiles = [{"value": str(k), "label": f"expert{'' if k == 1 else 's'} and one router, against one monolith"}]
    if cost.get("ratio") is not None:
        tiles.append({"value": str(cost["ratio_text"]), "label": "archipelago's training FLOPs over the monolith's"})
    clips, groups = finite(facts.get("clips")), finite(facts.get("groups"))
    if clips is not None:
        tiles.append(
            {
                "value": number(clips),
                "label": f"clips per arm, of {number(groups)} content groups" if groups else "clips per arm",
            }
        )
    size = config.clips
    tiles.append(
        {
            "value": f"{size.size} × {size.size} × {size.frames}",
            "label": f"pixels and frames, {size.fps:g} frames per second",
        }
    )
    return tiles


def verdict(reader: Reader, facts: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, Any]:
    """Context of the headline. Claims come from the paired interval of the primary metric and from nothing else."""
    config = reader.run.config
    row = _main(reader, facts)
    few = any(TOO_FEW in note.lower() for note in notes(facts))
    base = {
        "compared": compared(reader),
        "compute": compute_text(cost),
        "tiles": _tiles(reader, facts, cost),
        "tables": _tables(reader, facts),
        "long": compute_text(cost) if cost.get("matched") is True else "",
        "cautions": [*_cautions(facts, cost, few), *filter(None, [memorised(reader)])]
        if row is not None or cost.get("ratio") is not None
        else [],
    }
    if row is None:
        scored = bool(facts)
        title = (
            "Archipelago and monolith could not be compared"
            if scored
            else "Archipelago and monolith are not compared yet"
        )
        short = (
            "The scores hold no comparison on the primary metric."
            if scored
            else f"There are no scores yet: {reader.command('evaluate')} makes them."
        )
        return {**base, "title": title, "mood": "plain", "short": short}
    title, mood = _said(row, mapping(facts.get("copying")).get("grew") is True, few)
    if mood == "good" and (cost.get("matched") is not True or mapping(facts.get("extractors")).get("circle") is True):
        mood = "plain"
    name = arm_label(config.sample.strategy, config.sample.strategy)
    short = f"{config.evaluate.primary}, {name} less {arm_label(MONOLITH, '').lower()}: {interval_text(row.get('difference'))}."
    if finite(mapping(row.get("ratio")).get("value")) is not None:
        short += f" That is {interval_text(row['ratio'])} times the monolith's distance."
    return {**base, "title": title, "mood": mood, "short": short, "long": f"Intervals at 95 %. {base['long']}"}


def _tables(reader: Reader, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences and ratios of every distance; where the denominator may be 0 there is no ratio."""
    rows = [
        [
            str(row.get("metric", ""))
            + (" (primary)" if row.get("metric") == reader.run.config.evaluate.primary else ""),
            interval_text(row.get("difference")),
            interval_text(row["ratio"]) if row.get("ratio") else "not stated: the monolith's distance may be 0",
        ]
        for row in _comparisons(facts)
    ]
    if not rows:
        return []
    arm = arm_label(reader.run.config.sample.strategy, reader.run.config.sample.strategy)
    return [
        {
            "heading": f"{arm} against the monolith",
            "caption": "Paired over captions and noise; below 0 (ratio below 1) the archipelago is nearer to the real clips.",
            "columns": ["metric", "difference", "ratio"],
            "rows": rows,
        }
    ]
