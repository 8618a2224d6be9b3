"""One ablation as study.json holds it: a title, a question, a small table, a chart, a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archipel.evaluation.intervals import Interval
from archipel.study import probing
from archipel.study.members import Members
from archipel.study.plan import TEST
from archipel.study.results import Result

Ablation = dict[str, Any]


def ablation(
    name: str,
    title: str,
    question: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    verdict: str,
    *,
    about: str = "",
    chart: Mapping[str, Any] | None = None,
) -> Ablation:
    """One entry of study.json. Cells are intervals, numbers, text or None."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    return {
        "name": name, "title": title, "question": question, "about": about, "columns": list(columns),
        "rows": cells, "chart": chart, "verdict": verdict,
    }  # fmt: skip


def _cell(cell: Any) -> Any:
    return probing.as_dict(cell) if isinstance(cell, Interval) else cell


def chart_of(kind: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, Interval]]]) -> dict[str, Any]:
    def point(at: float, value: Interval) -> list[float | None]:
        given = probing.as_dict(value)
        return [at, given["value"], given["low"], given["high"]]

    points = [{"name": name, "points": [point(at, value) for at, value in found]} for name, found in series.items()]
    return {"kind": kind, "x": x, "y": y, "series": points}


def metric_of(members: Members) -> str:
    return members.run.config.evaluate.primary


def interval_of(result: Result, arm: str, metric: str, prompts: str = TEST) -> Interval | None:
    return result.interval(prompts, arm, metric)
