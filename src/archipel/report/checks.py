"""Parts that come from scores/<split>.extra.json: the text-video probe, copying, shares of clips per cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archipel.report.reading import arm_label, finite, floats, mapping
from archipel.report.scores import interval_text
from archipel.report.svg import number


def _show(value: Any) -> str:
    """A JSON value in a table's cell: a number, or an interval {"value", "low", "high"}."""
    if isinstance(value, Mapping):
        return interval_text(value)
    one = finite(value)
    return number(one) if one is not None else "–"


def _is_cell(value: Any) -> bool:
    return finite(value) is not None or finite(mapping(value).get("value")) is not None


def table(caption: str, first: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rows of (name, mapping) as a table: one column per key with a showable value, in order of first appearance."""
    keys = list(dict.fromkeys(key for _, row in rows for key, value in row.items() if _is_cell(value)))
    return {
        "caption": caption,
        "columns": [first, *(str(key).replace("_", " ") for key in keys)],
        "rows": [[name, *(_show(row.get(key)) for key in keys)] for name, row in rows],
    }


def probe(facts: Mapping[str, Any], primary: str) -> dict[str, Any]:
    """Context of the probe's section; ``withheld`` says why its numbers for generated clips are not shown."""
    found = mapping(facts.get("probe"))
    withheld = ""
    if found.get("withheld"):
        withheld = str(
            found.get("reason") or "The probe finds real clips' captions less than three times as often as chance."
        )
    listed = [mapping(row) for row in found.get("table") or []]
    rows = [(arm_label(str(row.get("clips")), primary), row) for row in listed]
    if rows and mapping(found.get("chance")):
        rows.append(("chance", mapping(found["chance"])))
    caption = "Real clips, the same through the codec, with one frame repeated, and played backwards"
    tables = [table(caption, "", rows)] if rows else []
    return {"tables": tables, "withheld": withheld, "pool": finite(found.get("pool"))}


MEANINGS = (
    (
        "train-over-test",
        "distance to the nearest training clip over that to the nearest unseen real clip: how often it is smaller than an "
        "unseen real clip's own; 0.5 is no copying",
    ),
    (
        "share-nearer-train",
        "how often a clip is nearer to the training clips than an unseen real clip is; 0.5 is no copying",
    ),
    ("nearest-train, nearest-test", "mean distance to the nearest training clip and to the nearest unseen real clip"),
    ("precision, density", "how many generated clips lie among the real ones"),
    ("recall, coverage", "how many real clips have generated ones near them"),
)


def copying(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Context of the copying section: what may be said, and what its measures mean."""
    found = mapping(facts.get("copying"))
    said = str(found.get("verdict") or "")
    return {
        "verdict": said[:1].upper() + said[1:],
        "extractor": str(found.get("extractor") or ""),
        "meanings": MEANINGS,
    }


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
