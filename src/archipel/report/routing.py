"""Section 'router': how well it knows a noisy clip's cluster, by timestep, with and without the caption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archipel.report.reading import Reader, finite, floats, mapping
from archipel.report.svg import Series, heat_map, line_chart, number

MEASURES = (("accuracy", "accuracy"), ("cross_entropy", "cross-entropy (nats)"), ("ece", "expected calibration error"))
BRANCHES = (("with caption", "arch", "with_text"), ("without caption", "t2", "without_text"))


def _curve(branch: Any, key: str) -> tuple[list[float], list[float]]:
    """(t, value) of a branch's bins."""
    bins = [mapping(row) for row in mapping(branch).get("bins") or []]
    pairs = [
        (t, value)
        for row in bins
        if (t := finite(row.get("t"))) is not None and (value := finite(row.get(key))) is not None
    ]
    return [t for t, _ in pairs], [value for _, value in pairs]


def _confusion(found: Any, k: int) -> list[list[float]]:
    """Row-normalised confusion matrix (true cluster x predicted), K x K; [] where there is none of that size."""
    if not isinstance(found, list) or len(found) != k:
        return []
    rows = [floats(row) for row in found]
    if any(len(row) != k for row in rows):
        return []
    return [[value / max(sum(row), 1e-12) for value in row] for row in rows]


def _chart(quality: Mapping[str, Any], key: str, title: str) -> dict[str, Any] | None:
    """One measure by timestep in both branches, with the prior's value as a level line."""
    series = [Series(label, *_curve(quality.get(name), key), css, dots=True) for label, css, name in BRANCHES]
    series = [one for one in series if one.x]
    level = finite(mapping(quality.get("prior")).get(key))
    if level is not None and series and key != "ece":
        series.append(Series("prior alone", [series[0].x[0], series[0].x[-1]], [level, level], "real", dash=True))
    if not series:
        return None
    chart = line_chart(
        series, f"Router {title} by timestep, with and without caption", "t (0 = clip, 1 = noise)", title, zero=True
    )
    return {"title": title, "svg": chart}


def routing(reader: Reader) -> dict[str, Any]:
    """Context: one chart per measure, the confusion matrix, the temperatures of the calibration."""
    run = reader.run
    folder = run.root / "router"
    quality = mapping(reader.json(folder / "quality.json"))
    calibration = mapping(reader.json(folder / "calibration.json"))
    if not quality:
        return {"missing": reader.command("route"), "charts": [], "note": ""}
    k = run.config.partition.k
    names = [str(i) for i in range(k)]
    matrix = _confusion(mapping(quality.get("confusion")).get(BRANCHES[0][2]), k)
    label = "Confusion matrix of the router with captions: rows are true clusters"
    return {
        "missing": "" if calibration else reader.command("route"),
        "note": str(quality.get("note") or ""),
        "charts": [chart for key, title in MEASURES if (chart := _chart(quality, key, title))],
        "confusion": heat_map(matrix, names, names, label, "cluster the router chose", "true cluster")
        if matrix
        else "",
        "temperatures": [number(v) for v in floats(calibration.get("temperature"))],
        "n": finite(quality.get("n")),
    }
