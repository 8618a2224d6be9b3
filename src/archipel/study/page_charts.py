"""The study's charts: all arms with intervals and floor, seeds in pairs, the ratio against compute, every ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from archipel.report.reading import finite, mapping
from archipel.report.rows import Group, category_chart, paired_chart
from archipel.report.scores import direction, interval_text
from archipel.report.svg import Series, interval_chart, line_chart, number, tone
from archipel.study.page_reading import StudyFiles, capital, ends, entries, sentence
from archipel.study.page_tables import short_name

ACROSS = {"width": "width", "flops": "FLOPs"}


def _lower(metric: str) -> str:
    better = direction(metric)
    return f"{metric} ({better} is better)" if better else metric


def ratios(files: StudyFiles) -> Any:
    """The primary arm against the chosen baseline, in every metric and prompt set that has a ratio; '' where none has."""
    rows, decides = [], files.compared()
    for row in entries(files.study.get("comparisons")):
        value, low, high = ends(row.get("ratio"))
        if row.get("arm") != files.arm or row.get("baseline") != files.baseline or value is None:
            continue
        first = row is decides
        circle = " (circle)" if row.get("circle") is True else ""
        tone = "arch" if first else "t7" if circle else "other"
        rows.append((f"{row.get('set')}: {row.get('metric')}{circle}", value, low, high, tone, not first))
    rows.sort(key=lambda row: row[5])
    goal = finite(mapping(files.study.get("goal")).get("ratio"))
    marks = [(1.0, "equal")] + ([(goal, f"goal {goal:g}")] if goal is not None else [])
    said = "Baseline's distance over the archipelago's, with intervals"
    return interval_chart([row[:5] for row in rows], said, "baseline's distance / archipelago's", marks=marks)


def forests(files: StudyFiles) -> list[dict[str, Any]]:
    """Per prompt set: the primary metric of every arm with its interval; the real clips' own value is the floor."""
    found = []
    for where in files.sets:
        rows = []
        for one in files.arms:
            arm = one["name"]
            row = files.score(where, arm, files.metric)
            value, low, high = ends(row)
            if value is not None:
                rows.append((files.title(arm), value, low, high, files.tone(arm)))
        floor = finite(mapping(files.score(where, "real", files.metric)).get("value"))
        marks = [(floor, "floor")] if floor is not None else []
        title = files.set_title(where)
        chart = interval_chart(rows, f"{files.metric} of every arm, {title}", _lower(files.metric), marks=marks)
        if chart:
            found.append({"name": f"arms-{where}", "title": title, "svg": chart})
    return found


def pairs(files: StudyFiles) -> list[dict[str, Any]]:
    """Per entry of "paired": one line per seed from the baseline to the arm."""
    found = []
    for place, row in enumerate(entries(files.study.get("paired"))):
        points = []
        for one in entries(row.get("points")):
            base, own = finite(one.get("baseline")), finite(one.get("arm"))
            if base is not None and own is not None:
                points.append((f"seed {one.get('seed')}", base, own))
        metric, where = str(row.get("metric")), str(row.get("set"))
        arm, base_name = files.title(str(row.get("arm"))), files.title(str(row.get("baseline")))
        said = f"{metric} per seed, {base_name} and {arm}"
        lower = direction(metric) != "higher"
        chart = paired_chart(points, "baseline", "arm", said, short_name(metric), lower=lower)
        if chart:
            title = f"{files.set_title(where)}: {base_name} (baseline) and {arm} (arm), {metric}"
            found.append({"name": f"paired-{place}-{where}", "title": title, "svg": chart})
    return found


def _curve_series(points: Sequence[Mapping[str, Any]], across: str, along: str) -> list[Series]:
    """One series per value of ``across``, over ``along``; points without a ratio are left out."""
    groups: dict[str, list[tuple[float, float, float, float]]] = {}
    for point in points:
        x = finite(point.get(along))
        value, low, high = ends(point.get("ratio"))
        if x is not None and value is not None:
            far = math.nan
            ends_of = (far if low is None else low, far if high is None else high)
            key = finite(point.get(across))
            name = f"{ACROSS[across]} {number(key)}" if key is not None else "ratio"
            groups.setdefault(name, []).append((x, value, *ends_of))
    found = []
    for place, (name, values) in enumerate(groups.items()):
        columns = list(zip(*sorted(values), strict=True))
        found.append(Series(name, columns[0], columns[1], tone(place), dots=True, low=columns[2], high=columns[3]))
    return found


def curve(files: StudyFiles) -> dict[str, Any]:
    """Context: the ratio against training FLOPs and against expert width, and its numbers."""
    part = mapping(files.study.get("curve"))
    points = entries(part.get("points"))
    goal = finite(mapping(files.study.get("goal")).get("ratio"))
    marks = [(1.0, "equal")] + ([(goal, f"goal {goal:g}")] if goal is not None else [])
    charts = []
    for along, across, label in (
        ("flops", "width", str(part.get("x") or "training FLOPs")),
        ("width", "flops", "width of an expert"),
    ):
        series = _curve_series(points, across, along)
        places = {x for one in series for x in one.x if x > 0}
        if len(places) < 2:
            continue
        log = max(places) / min(places) >= 8
        chart = line_chart(series, f"The ratio against {label}", label, "ratio", log_x=log, marks=marks)
        charts.append({"name": f"ratio-{along}", "title": f"The ratio against {label}", "svg": chart})
    rows = []
    for point in points:
        flops, width = finite(point.get("flops")), finite(point.get("width"))
        cells = ["–" if width is None else number(width), "–" if flops is None else number(flops)]
        ratio = interval_text(point.get("ratio")) if point.get("ratio") else "not stated"
        rows.append([str(point.get("label") or "–"), *cells, ratio, str(point.get("metric") or "–")])
    columns = ["point", "expert width", "training FLOPs", "ratio", "metric"]
    return {"charts": charts, "table": {"caption": "", "columns": columns, "rows": rows} if rows else None}


def _points(series: Mapping[str, Any]) -> list[tuple[Any, float, float | None, float | None]]:
    found = []
    for point in series.get("points") or []:
        if isinstance(point, (list, tuple)) and len(point) >= 2 and (y := finite(point[1])) is not None:
            low, high = (finite(point[i]) if len(point) > i else None for i in (2, 3))
            found.append((point[0], y, low, high))
    return found


def ablation_chart(part: Mapping[str, Any]) -> Any:
    """Chart of one ablation by its "kind"; '' where there is none. Raises ValueError for a kind that is not known."""
    kind = part.get("kind")
    series = entries(part.get("series"))
    x_label, y_label = str(part.get("x") or ""), str(part.get("y") or "")
    said = f"{y_label} by {x_label}" if x_label else y_label
    if kind == "lines":
        lines = []
        for place, one in enumerate(series):
            points = [(x, *rest) for x, *rest in _points(one) if finite(x) is not None]
            columns = [[math.nan if row[i] is None else float(row[i]) for row in points] for i in range(4)]
            label, dots = str(one.get("name") or ""), len(points) < 30
            lines.append(Series(label, columns[0], columns[1], tone(place), dots=dots, low=columns[2], high=columns[3]))
        return line_chart(lines, said, x_label, y_label)
    if kind not in ("bars", "intervals"):
        raise ValueError(f"its chart is of the unknown kind {kind!r}")
    names: dict[str, None] = {}
    groups = []
    for place, one in enumerate(series):
        values = {}
        for x, y, low, high in _points(one):
            name = number(x) if finite(x) is not None else str(x)
            names[name] = None
            values[name] = (y, low, high)
        groups.append(Group(str(one.get("name") or ""), values, tone(place)))
    return category_chart(list(names), groups, said, y_label, bars=kind == "bars")


def cell_text(value: Any) -> str:
    """An ablation's cell: an interval, a number, a text or nothing."""
    if isinstance(value, Mapping):
        return interval_text(value)
    if (plain := finite(value)) is not None:
        return number(plain)
    return value if isinstance(value, str) and value else "–"


def ablation(part: Mapping[str, Any]) -> dict[str, Any]:
    """Context of one ablation."""
    rows = [[cell_text(entry) for entry in row] for row in part.get("rows") or [] if isinstance(row, (list, tuple))]
    columns = [str(name) for name in part.get("columns") or []]
    drawn = part.get("chart")
    return {
        "name": str(part.get("name") or ""),
        "title": capital(str(part.get("title") or part.get("name") or "Ablation")),
        "question": str(part.get("question") or ""),
        "about": sentence(str(part.get("about") or "")),
        "table": {"caption": "", "columns": columns, "rows": rows} if rows else None,
        "svg": ablation_chart(mapping(drawn)) if drawn else "",
        "verdict": sentence(str(part.get("verdict") or "")),
    }
