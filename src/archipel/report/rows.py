"""Charts of named rows: bars or dots with intervals for several series, and pairs of values joined by lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archipel.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    Axis,
    fitted,
    legend,
    number,
    text_at,
    upright_lines,
    wrapped,
)

if TYPE_CHECKING:
    from markupsafe import Markup

Value = tuple[float, float | None, float | None]  # value, low, high


@dataclass(frozen=True)
class Group:
    """One series over named rows: ``values`` by the row's name; ``tone`` is a CSS class."""

    label: str
    values: dict[str, Value]
    tone: str = "arch"


def _ends(value: Value) -> list[float]:
    return [one for one in value if one is not None and math.isfinite(one)]


def category_chart(
    names: Sequence[str],
    groups: Sequence[Group],
    label: str,
    x_label: str,
    *,
    bars: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """For every name one line per group: a dot (or a bar from 0) with its interval; '' where there is no value.

    ``marks``: values of the axis that get a dashed line with a short text.
    """
    from markupsafe import Markup

    drawn = [
        (
            name,
            [(group, group.values[name]) for group in groups if math.isfinite(group.values.get(name, (math.nan,))[0])],
        )
        for name in names
    ]
    drawn = [(name, values) for name, values in drawn if values]
    if not drawn:
        return Markup("")
    width, step, gap, top = 640, 18 if len(groups) > 1 else 22, 8, TOP + 14 * bool(marks)
    name_width = min(310, max(110, 18 + LETTER * max(len(name) for name, _ in drawn)))
    height = top + sum(step * len(values) + gap for _, values in drawn) + BOTTOM
    spread = [end for _, values in drawn for _, value in values for end in _ends(value)]
    spread += [value for value, _ in marks if math.isfinite(value)]
    x_axis = Axis(spread, name_width, width - 58, zero=bars or min(spread) >= 0)
    if not bars:
        x_axis = x_axis.pad(0.03)
    body = upright_lines(x_axis, top, height - BOTTOM, marks)
    y = top + gap / 2
    for name, values in drawn:
        middle = y + step * len(values) / 2 + 4
        body.append(text_at(name_width - 12, middle, fitted(name, name_width - 18), "label", "end"))
        for group, (value, low, high) in values:
            body += _mark(x_axis, y + step / 2, value, low, high, group.tone, bars)
            y += step
        y += gap
    body.append(text_at((name_width + width - 58) / 2, height - 6, x_label, "label", "middle"))
    named = [(group.label, group.tone, False) for group in groups if group.label]
    return wrapped(body, label, width, height, "wide") + (legend(named) if len(groups) > 1 else Markup(""))


def _mark(axis: Axis, y: float, value: float, low: float | None, high: float | None, tone: str, bar: bool) -> list[str]:
    body = []
    zero, x = axis(max(axis.low, min(0.0, axis.high))), axis(value)
    if bar:
        body.append(
            f'<rect class="bar {tone}" x="{min(zero, x):g}" y="{y - 6:g}" width="{max(abs(x - zero), 0.5):g}" height="12" rx="2"/>'
        )
    right = x
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        right = max(right, axis(high))
        css = "whisker" if bar else f"span {tone}"
        body.append(f'<line class="{css}" x1="{axis(low)}" x2="{axis(high)}" y1="{y:g}" y2="{y:g}"/>')
    if not bar:
        body.append(f'<circle class="dot {tone}" cx="{x}" cy="{y:g}" r="4.5"/>')
    body.append(text_at(right + 7, y + 4, number(value), "tick"))
    return body


def paired_chart(
    pairs: Sequence[tuple[str, float, float]], left: str, right: str, label: str, y_label: str, *, lower: bool = True
) -> Markup:
    """One line per (name, value on the left, value on the right); '' where there is none.

    Lines that go the better way from left to right (down where ``lower``) take the archipelago's colour, the others the
    monolith's; the legend counts them.
    """
    from markupsafe import Markup

    pairs = [pair for pair in pairs if math.isfinite(pair[1]) and math.isfinite(pair[2])]
    if not pairs:
        return Markup("")
    width = 380
    values = [value for _, a, b in pairs for value in (a, b)]
    axis = Axis(values, HEIGHT - BOTTOM, TOP, zero=min(values) >= 0)
    axis = axis.raised() if min(values) >= 0 else axis.pad(0.05)
    body = []
    for tick in axis.ticks():
        y = axis(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        body.append(text_at(LEFT - 7, y + 4, number(tick), "tick", "end"))
    x1, x2 = LEFT + 70, width - RIGHT - 90
    better = [(b < a) == lower and a != b for _, a, b in pairs]
    taken: list[float] = []
    for (name, a, b), good in sorted(zip(pairs, better, strict=True), key=lambda one: axis(one[0][2])):
        css = "arch" if good else "mono"
        body.append(
            f'<line class="slope {css}" x1="{x1}" y1="{axis(a)}" x2="{x2}" y2="{axis(b)}"/>'
            f'<circle class="dot {css}" cx="{x1}" cy="{axis(a)}" r="4"/><circle class="dot {css}" cx="{x2}" cy="{axis(b)}" r="4"/>'
        )
        place = max([axis(b), *(y + 13 for y in taken[-1:])])
        taken.append(place)
        body.append(text_at(x2 + 10, place + 4, name, "tick"))
    for x, text in ((x1, left), (x2, right)):
        body.append(text_at(x, HEIGHT - BOTTOM + 18, fitted(text, 160), "label", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(text_at(13, middle, y_label, "label", "middle", f' transform="rotate(-90 13 {middle:g})"'))
    count, whole = sum(better), len(pairs)
    entries = [(f"{right} better: {count} of {whole}", "arch", False)] if count else []
    entries += [(f"{left} better: {whole - count} of {whole}", "mono", False)] if count < whole else []
    return wrapped(body, label, width, HEIGHT, "") + legend(entries)
