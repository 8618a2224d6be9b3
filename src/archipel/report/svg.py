"""Charts as inline SVG: drawn by hand, themed by the page's CSS classes, a few kilobytes each, no library.

Colours are never written here: a mark carries a class (``t0`` ... ``t7``, ``mono``, ``real`` and so on) and the style
sheet gives it a colour for light and for dark. Every label is escaped, since captions and file names are not ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 14, 44
TONES = 8
LETTER = 7.0  # mean width of a letter in a chart's 12 px type


def tone(index: int) -> str:
    """CSS class of the index-th expert's colour."""
    return f"t{index % TONES}"


@dataclass(frozen=True)
class Series:
    """One line of a chart: finite ``x`` and ``y`` of one length; ``tone`` is a CSS class; ``dots`` marks every point.

    ``low`` and ``high``, where given, are as long as ``y`` (NaN: none) and drawn as upright bars.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "t0"
    dash: bool = False
    dots: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def spans(self, log_x: bool, log_y: bool) -> list[tuple[float, float, float]]:
        """(x, low, high) of the points whose interval can be drawn on these axes."""
        rows = [(float(x), float(a), float(b)) for x, a, b in zip(self.x, self.low, self.high, strict=False)]
        return [
            (x, a, b)
            for x, a, b in rows
            if all(map(math.isfinite, (x, a, b))) and (x > 0 or not log_x) and (a > 0 or not log_y)
        ]

    def points(self, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
        """The points that can be drawn on these axes."""
        pairs = [(float(x), float(y)) for x, y in zip(self.x, self.y, strict=False)]
        return [
            (x, y)
            for x, y in pairs
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
        ]


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float, digits: int = 3) -> str:
    """A number for people: 0.1234 -> '0.123', 1234.5 -> '1,234', 1.5e6 -> '1.5 M', 2e-5 -> '2 × 10⁻⁵', NaN -> '–'."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e9 or size < 1e-4:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{_short(mantissa)} × 10{str(int(power)).translate(_RAISED)}"
    unit = " M" if size >= 1e6 else ""
    if unit:
        value, size = value / 1e6, size / 1e6
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return _short(f"{value:.{min(5, max(0, digits - 1 - math.floor(math.log10(size))))}f}") + unit


def _short(text: str) -> str:
    """Without zeros at the end, and with a minus sign instead of a hyphen."""
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class Axis:
    """A linear or logarithmic map of [low, high] to pixels [begin, end]."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, *, log: bool = False, zero: bool = False
    ) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if zero and not log:
            low, high = min(low, 0.0), max(high, 0.0)
        if high <= low:
            pad = abs(low) * 0.5 or 0.5
            low, high = (low / 2, high * 2) if log else (low if zero and low == 0 else low - pad, high + pad)
        self.low, self.high, self.begin, self.end, self.log = low, high, begin, end, log

    def pad(self, share: float) -> Axis:
        """Widen both ends by a share of the span (linear axes only)."""
        if not self.log:
            span = self.high - self.low
            self.low, self.high = self.low - span * share, self.high + span * share
        return self

    def raised(self) -> Axis:
        """Raise the upper end to a round number."""
        ticks = nice_ticks(self.low, self.high)
        if len(ticks) > 1 and ticks[-1] < self.high - 1e-9:
            self.high = ticks[-1] + ticks[1] - ticks[0]
        return self

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self, count: int = 5) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, count)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        marks = (1,) if last - first > 3 else (1, 2, 5)
        every = [m * 10.0**p for p in range(first, last + 1) for m in marks]
        inside = [t for t in every if self.low * 0.999 <= t <= self.high * 1.001]
        return inside[:: max(1, math.ceil(len(inside) / (count + 2)))] or [self.low]


def text_at(x: float, y: float, value: object, css: str = "", anchor: str = "start", extra: str = "") -> str:
    from markupsafe import escape

    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}"{extra}>{escape(str(value))}</text>'


def wrapped(body: Sequence[str], label: str, width: float, height: float, css: str = "") -> Markup:
    from markupsafe import Markup, escape

    # A square chart keeps its own size, a strip is stretched; the others grow with their column.
    own = {"square": f' width="{width:g}"', "strip": ' preserveAspectRatio="none"'}.get(css, "")
    return Markup(
        f'<svg class="chart {css}"{own} viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def legend(entries: Sequence[tuple[str, str, bool]]) -> Markup:
    """HTML legend of (label, CSS class, dashed)."""
    from markupsafe import Markup, escape

    items = "".join(
        f'<li><i class="key {css}{" dashed" if dash else ""}" aria-hidden="true"></i>{escape(label)}</li>'
        for label, css, dash in entries
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def _digits(ticks: Sequence[float]) -> int:
    """Significant digits that tell neighbouring ticks apart: 3, more where the axis shows a narrow range."""
    step = min((abs(b - a) for a, b in pairwise(ticks)), default=0.0)
    largest = max(map(abs, ticks), default=0.0)
    return 3 if step <= 0 else min(6, max(3, math.floor(math.log10(largest / step)) + 2))


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, width: float, height: float) -> list[str]:
    body = []
    places = y_axis.ticks()
    for tick in places:
        y, text = y_axis(tick), number(tick, _digits(places))
        body.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        body.append(text_at(LEFT - 7, y + 4, text, "tick", "end"))
    ticks = x_axis.ticks()
    while len(ticks) > 2 and sum(LETTER * len(number(tick)) + 16 for tick in ticks) > width - RIGHT - LEFT:
        ticks = ticks[:: 3 if x_axis.log and len(ticks) > 3 else 2]
    for tick in ticks:
        x, text = x_axis(tick), number(tick)
        body.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{height - BOTTOM}" y2="{height - BOTTOM + 4}"/>')
        body.append(text_at(min(x, width - LETTER * len(text) / 2), height - BOTTOM + 17, text, "tick", "middle"))
    body.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>')
    body.append(text_at((LEFT + width - RIGHT) / 2, height - 6, x_label, "label", "middle"))
    middle = (TOP + height - BOTTOM) / 2
    if max(len(number(tick, _digits(places))) for tick in places) > 6:  # wide numbers leave no room beside them
        body.append(text_at(2, 10, y_label, "label"))
    else:
        body.append(text_at(13, middle, y_label, "label", "middle", f' transform="rotate(-90 13 {middle:g})"'))
    return body


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over common axes with a legend; '' where no series has a point. ``label`` says it to a screen reader.

    ``marks``: values of y that get a dashed line of their own with a short text, and are always in sight.
    """
    from markupsafe import Markup

    drawn = [(one, one.points(log_x, log_y)) for one in series]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return Markup("")
    x_axis = Axis([x for _, points in drawn for x, _ in points], LEFT, WIDTH - RIGHT, log=log_x)
    marks = [mark for mark in marks if math.isfinite(mark[0]) and (mark[0] > 0 or not log_y)]
    spread = [end for one, _ in drawn for _, low, high in one.spans(log_x, log_y) for end in (low, high)]
    spread += [y for _, points in drawn for _, y in points] + [value for value, _ in marks]
    y_axis = Axis(spread, HEIGHT - BOTTOM, TOP, log=log_y, zero=zero)
    y_axis = y_axis.raised() if zero else y_axis.pad(0.05)
    body = _frame(x_axis, y_axis, x_label, y_label, WIDTH, HEIGHT)
    for value, text in marks:
        y = y_axis(value)
        body.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        body.append(text_at(LEFT + 5, y - 5, text, "tick"))
    for one, points in drawn:
        for x, low, high in one.spans(log_x, log_y):
            ends = f'y1="{y_axis(low):g}" y2="{y_axis(high):g}"'
            body.append(f'<line class="span thin {one.tone}" x1="{x_axis(x):g}" x2="{x_axis(x):g}" {ends}/>')
        path = " ".join(f"{x_axis(x):g},{y_axis(y):g}" for x, y in points)
        css = f"line {one.tone}{' dashed' if one.dash else ''}"
        if len(points) > 1:
            body.append(f'<polyline class="{css}" points="{path}"/>')
        if one.dots or len(points) == 1:
            body += [
                f'<circle class="dot {one.tone}" cx="{x_axis(x):g}" cy="{y_axis(y):g}" r="2.6"/>' for x, y in points
            ]
    return wrapped(body, label, WIDTH, HEIGHT) + legend([(one.label, one.tone, one.dash) for one, _ in drawn])


def stacked_area(
    x: Sequence[float], shares: Sequence[Sequence[float]], labels: Sequence[str], label: str, x_label: str
) -> Markup:
    """Shares (K rows of S values that sum to about 1 per column) as stacked bands over ``x``."""
    if len(x) < 2:
        return bar_chart(labels, [("share", "arch", [row[0] if row else 0.0 for row in shares])], label)
    x_axis = Axis([float(v) for v in x], LEFT, WIDTH - RIGHT)
    y_axis = Axis([0.0, 1.0], HEIGHT - BOTTOM, TOP)
    body = []
    below = [0.0] * len(x)
    for k, row in enumerate(shares):
        above = [b + float(v) for b, v in zip(below, row, strict=True)]
        forth = [f"{x_axis(a):g},{y_axis(min(b, 1.0)):g}" for a, b in zip(x, above, strict=True)]
        back = [f"{x_axis(a):g},{y_axis(min(b, 1.0)):g}" for a, b in zip(reversed(x), reversed(below), strict=True)]
        body.append(f'<polygon class="area {tone(k)}" points="{" ".join(forth + back)}"/>')
        below = above
    body += _frame(x_axis, y_axis, x_label, "mean weight", WIDTH, HEIGHT)
    return wrapped(body, label, WIDTH, HEIGHT) + legend([(name, tone(k), False) for k, name in enumerate(labels)])


def cells(weights: Sequence[Sequence[float]], width: float, height: float, *, least: float) -> list[str]:
    """Stacked shares over S steps of K values as rectangles, noise on the left; those lower than ``least`` pixels are left out."""
    cell = width / max(len(weights), 1)
    made = []
    for s, row in enumerate(weights):
        y = 0.0
        for k, value in enumerate(row):
            share = max(0.0, min(float(value), 1.0)) * height
            if share >= least:
                place = f'x="{s * cell:.2f}" y="{y:.2f}" width="{cell + 0.3:.2f}" height="{share:.2f}"'
                made.append(f'<rect class="cell {tone(k)}" {place}/>')
            y += share
    return made


def trace(weights: Sequence[Sequence[float]], label: str) -> Markup:
    """One clip's weights, S steps of K values: a thin strip of stacked cells, noise on the left."""
    width, height = 220.0, 22.0
    return wrapped(cells(weights, width, height, least=0.2), label, width, height, "strip")


def bar_chart(names: Sequence[str], groups: Sequence[tuple[str, str, Sequence[float]]], label: str) -> Markup:
    """Horizontal bars of shares: for every name one bar per group, which is (legend, CSS class, one value per name)."""
    from markupsafe import Markup

    if not names or not groups:
        return Markup("")
    left, bar, gap = 96, 14, 14
    height = len(names) * (len(groups) * bar + gap) + gap
    values = [[v if math.isfinite(v) else 0.0 for v in map(float, row)] for _, _, row in groups]
    x_axis = Axis([0.0, max([1e-9, *(v for row in values for v in row)])], left, WIDTH - 60, zero=True)
    body, y = [], float(gap)
    for place, name in enumerate(names):
        body.append(text_at(left - 8, y + len(groups) * bar / 2 + 3, name[:16], "label", "end"))
        for (_, css, _), row in zip(groups, values, strict=True):
            value = row[place] if place < len(row) else 0.0
            long = max(x_axis(value) - left, 0.5)
            body.append(f'<rect class="bar {css}" x="{left}" y="{y:g}" width="{long:g}" height="{bar - 2}" rx="2"/>')
            body.append(text_at(x_axis(value) + 5, y + bar - 3, f"{value:.0%}", "tick"))
            y += bar
        y += gap
    return wrapped(body, label, WIDTH, height) + legend([(name, css, False) for name, css, _ in groups])


def fitted(name: str, width: float) -> str:
    """``name`` with an ellipsis where it is wider than ``width`` in a chart's letters."""
    longest = max(4, int(width / LETTER))
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"


def interval_chart(
    rows: Sequence[tuple[str, float, float | None, float | None, str]],
    label: str,
    x_label: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """A dot with its interval per row (name, value, low, high, CSS class) over one axis.

    ``marks``: values of the axis that get a dashed line with a short text, and are always in sight.
    """
    from markupsafe import Markup

    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return Markup("")
    marks = [mark for mark in marks if math.isfinite(mark[0])]
    step, top = 26, TOP + 14 * bool(marks)
    name_width = min(310, max(150, 18 + LETTER * max(len(row[0]) for row in rows)))
    width = max(640, round(name_width + 400))
    height = top + step * len(rows) + BOTTOM
    spread = [value for value, _ in marks]
    spread += [v for _, value, low, high, _ in rows for v in (value, low, high) if v is not None and math.isfinite(v)]
    x_axis = Axis(spread, name_width, width - 22, zero=min(spread) >= 0).pad(0.03)
    body = upright_lines(x_axis, top, height - BOTTOM, marks)
    for i, (name, value, low, high, css) in enumerate(rows):
        y = top + step * (i + 0.5)
        body.append(text_at(name_width - 12, y + 4, fitted(name, name_width - 18), "label", "end"))
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            body.append(f'<line class="span {css}" x1="{x_axis(low)}" x2="{x_axis(high)}" y1="{y:g}" y2="{y:g}"/>')
        body.append(f'<circle class="dot {css}" cx="{x_axis(value)}" cy="{y:g}" r="5"/>')
    body.append(text_at((name_width + width) / 2, height - 6, x_label, "label", "middle"))
    return wrapped(body, label, width, height, "wide")


def upright_lines(axis: Axis, top: float, bottom: float, marks: Sequence[tuple[float, str]]) -> list[str]:
    """Grid lines at the ticks of a horizontal axis with their numbers, and dashed lines at ``marks`` with their texts."""
    body = []
    for tick in axis.ticks(6):
        x = axis(tick)
        body.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        body.append(text_at(x, bottom + 17, number(tick), "tick", "middle"))
    for value, text in marks:
        if math.isfinite(value):
            x = axis(value)
            body.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
            body.append(text_at(x, top - 6, text, "tick", "middle"))
    return body


def heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """Shares in [0, 1] as a grid whose opacity is the value; the number stands in every cell up to 12 x 12."""
    from markupsafe import Markup

    if not matrix or not matrix[0]:
        return Markup("")
    cell = 56 if len(columns) <= 6 else 36 if len(columns) <= 12 else 18
    left, top = 84, 18
    width, height = max(left + cell * len(columns) + 8, 280), top + cell * len(rows) + 46
    body = []
    for i, row in enumerate(matrix):
        body.append(text_at(left - 8, top + cell * (i + 0.5) + 4, rows[i], "tick", "end"))
        for j, value in enumerate(row):
            value = float(value) if math.isfinite(float(value)) else 0.0
            x, y = left + cell * j, top + cell * i
            side, shade = cell - 2, 0.06 + 0.94 * min(max(value, 0), 1)
            body.append(
                f'<rect class="heat" x="{x}" y="{y}" width="{side}" height="{side}" rx="4" fill-opacity="{shade:.2f}"/>'
            )
            if len(columns) <= 12:
                body.append(
                    text_at(
                        x + cell / 2 - 1,
                        y + cell / 2 + 3,
                        f"{value:.2f}",
                        "tick on" if value > 0.55 else "tick",
                        "middle",
                    )
                )
    for j, name in enumerate(columns):
        body.append(text_at(left + cell * (j + 0.5), height - 28, name, "tick", "middle"))
    body.append(text_at(left + cell * len(columns) / 2, height - 8, x_label, "label", "middle"))
    body.append(
        text_at(
            13,
            top + cell * len(rows) / 2,
            y_label,
            "label",
            "middle",
            f' transform="rotate(-90 13 {top + cell * len(rows) / 2:g})"',
        )
    )
    return wrapped(body, label, width, height, "square")
