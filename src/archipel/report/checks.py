"""Parts that come from scores/<split>.extra.json: the text-video probe, copying, shares of clips per cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archipel.report.reading import arm_label, finite, floats, mapping
from archipel.report.svg import number

_WORDS = {
    "top1": "retrieval@1",
    "top5": "retrieval@5",
    "chance1": "chance@1",
    "chance5": "chance@5",
    "n": "clips",
    "low": "low",
    "high": "high",
}


def _words(key: str) -> str:
    return _WORDS.get(key, key.replace("_", " "))


def _show(value: Any) -> str:
    """A JSON value in a table's cell: a number, an interval {"value", "low", "high"}, or a short text."""
    if isinstance(value, Mapping):
        centre, low, high = (finite(value.get(key)) for key in ("value", "low", "high"))
        if centre is None:
            return "–"
        return (
            f"{number(centre)} ({number(low)} to {number(high)})"
            if low is not None and high is not None
            else number(centre)
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    one = finite(value)
    return number(one) if one is not None else str(value)[:80] if isinstance(value, str) else "–"


def _is_cell(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (
        isinstance(value, Mapping) and finite(value.get("value")) is not None
    )


def table(
    caption: str, first: str, rows: Sequence[tuple[str, Mapping[str, Any]]], skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Rows of (name, mapping) as a table: one column per key with a showable value, in order of first appearance."""
    keys = list(
        dict.fromkeys(key for _, row in rows for key, value in row.items() if _is_cell(value) and key not in skip)
    )
    return {
        "caption": caption,
        "columns": [first, *(_words(key) for key in keys)],
        "rows": [[name, *(_show(row.get(key)) for key in keys)] for name, row in rows],
    }


def _named(value: Any, primary: str, key: str = "arm") -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of a mapping by name, or of a list whose entries carry their name."""
    if isinstance(value, Mapping):
        return [(arm_label(str(name), primary), row) for name, row in value.items() if isinstance(row, Mapping)]
    if isinstance(value, list):
        rows = [mapping(row) for row in value]
        return [
            (arm_label(str(row.get(key, row.get("clips", row.get("name", "")))), primary), row) for row in rows if row
        ]
    return []


def probe(facts: Mapping[str, Any], primary: str) -> dict[str, Any]:
    """Context of the probe's section; ``withheld`` says why its numbers for generated clips are not shown."""
    found = mapping(facts.get("probe"))
    withheld = ""
    if found.get("withheld"):
        withheld = str(
            found.get("reason") or "The probe finds real clips' captions less than three times as often as chance."
        )
    rows = _named(found.get("table"), primary)
    if rows and mapping(found.get("chance")):
        rows.append(("chance", mapping(found["chance"])))
    tables = (
        [
            table(
                "Real clips, the same through the codec, with one frame repeated, and played backwards",
                "clips",
                rows,
                ("arm", "clips"),
            )
        ]
        if rows
        else []
    )
    return {"tables": tables, "withheld": withheld, "pool": finite(found.get("pool"))}


def copying(facts: Mapping[str, Any], primary: str) -> dict[str, Any]:
    """Context of the copying section: one row per arm, and what may be said."""
    found = mapping(facts.get("copying"))
    rows = _named(found.get("arms"), primary)
    tables = (
        [table(f"In the space of {found.get('extractor', 'the primary extractor')}", "arm", rows, ("arm",))]
        if rows
        else []
    )
    return {"tables": tables, "verdict": str(found.get("verdict") or "")}


def shares(facts: Mapping[str, Any], primary: str) -> dict[str, list[float]]:
    """Share of clips per cluster by label: the data first, then the primary strategy, the monolith, the others."""
    found = mapping(facts.get("clusters"))
    arms = mapping(found.get("arms"))
    rows: dict[str, list[float]] = {}
    for key, label in (("data_train", "training clips"), ("captions", "real clips of these captions")):
        if floats(found.get(key)):
            rows[label] = floats(found[key])
    for arm in dict.fromkeys([primary, "monolith", *arms]):
        if floats(arms.get(arm)):
            rows[arm_label(str(arm), primary)] = floats(arms[arm])
    return rows
