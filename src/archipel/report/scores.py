"""Sections 'verdict', 'scores', 'probe' and 'copying': what was measured, with its interval, and what may be said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from archipel.report.reading import Reader, arm_label, arm_tone, finite, mapping
from archipel.report.svg import interval_chart, number
from archipel.run import MONOLITH

COPYING, CLUSTERS = "Copying and coverage", "Share of clips per cluster"  # shown in sections of their own
TOO_FEW = "too few clips"
RAW = "Raw Fréchet distances (biased in N: read them beside their floor, the row of real clips)"
ORDER = ("codec", "real")  # the codec's own distance first, then the floor


def _rows(reader: Reader) -> list[Mapping[str, Any]]:
    found = reader.json(reader.run.scores(reader.protocol))
    return (
        [mapping(row) for row in found if finite(mapping(row).get("value")) is not None]
        if isinstance(found, list)
        else []
    )


def extra(reader: Reader) -> Mapping[str, Any]:
    path = reader.run.scores(reader.protocol)
    return mapping(reader.json(path.with_name(path.stem + ".extra.json")))


def _arms(rows: Sequence[Mapping[str, Any]], primary: str) -> list[str]:
    return in_order(dict.fromkeys(str(row.get("arm")) for row in rows), primary)


def in_order(arms: Iterable[str], primary: str) -> list[str]:
    """Codec and real clips, the primary strategy, the monolith, then the others as they come."""
    found = list(arms)
    first = [arm for arm in dict.fromkeys([*ORDER, primary, MONOLITH]) if arm in found]
    return first + [arm for arm in found if arm not in first]


def family(metric: str) -> str:
    """Heading of the table that a metric belongs to."""
    name = metric.lower()
    if name.startswith("cluster-share"):
        return CLUSTERS
    if name.startswith(("nearest-", "share-nearer", "train-over")) or name in (
        "precision",
        "recall",
        "density",
        "coverage",
    ):
        return COPYING
    if name.startswith("kid-"):
        return "Kernel distances (unbiased)"
    if name.startswith("excess-"):
        return "Excess Fréchet distances (over real clips at the same N)"
    if name.startswith(("fd-", "fvd")):
        return RAW
    if name.startswith("psnr-first-frame"):
        return "Given first frames (dB)"
    return "Captions and motion"


def direction(metric: str) -> str:
    """'lower', 'higher' or '' (descriptive) is better."""
    heading = family(metric)
    if "istance" in heading:
        return "lower"
    if metric.startswith("retrieval@") or metric in ("text-video-probe", "precision", "recall", "density", "coverage"):
        return "higher"
    if metric.lower().startswith(("clip", "aesthetic", "psnr")):
        return "higher"
    return ""


MOST = 6  # decimals shown at most; beyond them numbers are written with powers of ten


def decimals(row: Any) -> int | None:
    """Decimals at which a value's interval shows two digits of its own width; None where that is no plain number."""
    value, low, high = (finite(mapping(row).get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None or not high > low:
        return None
    size = max(abs(value), abs(low), abs(high))
    found = max(0, math.ceil(-math.log10(high - low)) + 1)
    return found if found <= MOST and 1e-4 <= size < 1e5 else None


def cell(row: Any, digits: int | None = None) -> dict[str, str] | None:
    """{"value", "interval"} of {"value", "low", "high"} as text; None where there is no value.

    ``digits``: decimals of the whole column; a value that they would round to 0 keeps its own.
    """
    value, low, high = (finite(mapping(row).get(key)) for key in ("value", "low", "high"))
    if value is None:
        return None
    if low is None or high is None:
        return {"value": number(value), "interval": ""}
    places = decimals(row)
    if places is not None and digits is not None and abs(value) >= 10.0**-digits:
        places = digits
    if places is None:
        return {"value": number(value), "interval": f"{number(low, 2)} to {number(high, 2)}"}
    # Rounded first, so that nothing is shown as a negative 0.
    shown = [f"{round(part, places) + 0.0:,.{places}f}".replace("-", "−") for part in (value, low, high)]
    return {"value": shown[0], "interval": f"{shown[1]} to {shown[2]}"}


def _table(
    heading: str, metrics: Sequence[str], rows: Sequence[Mapping[str, Any]], arms: Sequence[str], reader: Reader
) -> dict[str, Any]:
    primary, chosen = reader.run.config.sample.strategy, reader.run.config.evaluate.primary
    by = {(str(row.get("arm")), str(row.get("metric"))): row for row in rows}
    lines = []
    for arm in arms:
        cells = [cell(by.get((arm, metric))) for metric in metrics]
        if any(cells):
            lines.append({"label": arm_label(arm, primary), "tone": arm_tone(arm, primary), "cells": cells})
    columns = [{"name": metric, "better": direction(metric), "primary": metric == chosen} for metric in metrics]
    return {"heading": heading, "columns": columns, "rows": lines, "folded": heading == RAW}


def _protocol(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One line per metric: what its score was computed with."""
    lines: dict[str, str] = {}
    for row in rows:
        parts = [
            f"{key} {value}"
            for key, value in mapping(row.get("protocol")).items()
            if isinstance(value, (str, int, float))
        ]
        counted = [f"{key} {number(value)}" for key in ("n", "groups") if (value := finite(row.get(key))) is not None]
        lines.setdefault(str(row.get("metric")), ", ".join([*counted, *parts]))
    return list(lines.items())


def scores(reader: Reader, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Context of the main table. ``facts`` is the content of scores/<split>.extra.json."""
    rows = _rows(reader)
    config = reader.run.config
    if not rows:
        return {
            "missing": reader.command("evaluate"),
            "tables": [],
            "copying": None,
            "primary_metric": config.evaluate.primary,
        }
    primary = config.sample.strategy
    arms = _arms(rows, primary)
    metrics = list(dict.fromkeys(str(row.get("metric")) for row in rows))
    metrics.sort(key=lambda metric: metric != config.evaluate.primary)
    families: dict[str, list[str]] = {}
    for metric in metrics:
        families.setdefault(family(metric), []).append(metric)
    main = [
        row for arm in arms for row in rows if row.get("arm") == arm and row.get("metric") == config.evaluate.primary
    ]
    chart = interval_chart(
        [
            (
                arm_label(str(row["arm"]), primary),
                float(row["value"]),
                finite(row.get("low")),
                finite(row.get("high")),
                arm_tone(str(row["arm"]), primary),
            )
            for row in main
        ],
        f"{config.evaluate.primary} of every arm with its interval",
        f"{config.evaluate.primary} (lower is better)"
        if direction(config.evaluate.primary) == "lower"
        else config.evaluate.primary,
    )
    return {
        "missing": "",
        "copying": _table(COPYING, families[COPYING], rows, arms, reader) if COPYING in families else None,
        "split": reader.protocol,
        "primary_metric": config.evaluate.primary,
        "chart": chart,
        "tables": [
            _table(heading, names, rows, arms, reader)
            for heading, names in sorted(families.items(), key=lambda one: one[0] == RAW)
            if heading not in (COPYING, CLUSTERS)
        ],
        "notes": [{"text": note, "warn": TOO_FEW in note.lower()} for note in notes(facts)],
        "protocols": _protocol(rows),
        "absent": [arm_label(arm, primary) for arm in config.evaluate.arms if arm not in arms],
    }


def notes(facts: Mapping[str, Any]) -> list[str]:
    found = facts.get("notes")
    entries = (
        found
        if isinstance(found, list)
        else list(mapping(found).values())
        if isinstance(found, Mapping)
        else [found]
        if found
        else []
    )
    return [str(entry) for entry in entries if isinstance(entry, (str, int, float))]


def interval_text(value: Any) -> str:
    """'−0.020 (−0.030 to −0.010)' of {"value", "low", "high"}; '–' where there is no value."""
    shown = cell(mapping(value))
    if shown is None:
        return "–"
    return f"{shown['value']} ({shown['interval']})" if shown["interval"] else shown["value"]
