"""The small picture at the top: clips -> partition -> experts -> router -> clips, and the monolith beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archipel.report.svg import tone

if TYPE_CHECKING:
    from markupsafe import Markup

SHOWN = 4  # islands drawn; more are counted


def _text(x: float, y: float, value: str, css: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}">{value}</text>'


def _box(x: float, y: float, width: float, height: float, title: str, sub: str) -> str:
    middle = y + height / 2
    return (
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="10"/>'
        + _text(x + width / 2, middle - 2 if sub else middle + 5, title)
        + (_text(x + width / 2, middle + 16, sub, "sub") if sub else "")
    )


def _bent(path: str, x: float, y: float, tip: str) -> str:
    """A way of straight parts with an arrow's tip at (x, y)."""
    return f'<path class="way" d="{path}"/><path class="tip" d="M{x:g} {y:g}{tip}z"/>'


def _way(x1: float, y1: float, x2: float, y2: float) -> str:
    bend = (x2 - x1) / 2
    return (
        f'<path class="way" d="M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2 - 6:g} {y2:g}"/>'
        f'<path class="tip" d="M{x2:g} {y2:g}l-8 -4v8z"/>'
    )


def flow_picture(k: int, clips: str, matched: bool, split: str) -> Markup:
    """Inline SVG for ``k`` experts. ``clips``: a short count such as '157 clips'; all texts are this module's or numbers."""
    from markupsafe import Markup, escape

    islands = min(k, SHOWN)
    top, pitch = 14.0, 50.0
    mono = top + pitch * islands + 12
    height = mono + 62
    centre = top + pitch * islands / 2
    body = [
        _box(8, centre - 27, 128, 54, "clips", str(escape(clips))),
        _box(192, centre - 27, 136, 54, "partition", f"{k} clusters" if k > 1 else "1 cluster"),
    ]
    body.append(_way(136, centre, 192, centre))
    for i in range(islands):
        y = top + pitch * (i + 0.5)
        last_of_many = i == islands - 1 and k > islands
        name = f"and {k - islands + 1} more" if last_of_many else f"expert {i}"
        body.append(f'<ellipse class="island {tone(i)}" cx="480" cy="{y:g}" rx="78" ry="19"/>')
        body.append(_text(480, y + 5, name))
        body.append(_way(328, centre, 400, y))
        body.append(_way(560, y, 640, centre))
    body.append(_box(640, centre - 27, 150, 54, "router", "who knows this clip?"))
    body.append(_way(790, centre, 856, centre))
    body.append(_box(856, centre - 27, 190, 54, "generated clips", f"captions of {escape(split)}"))
    body.append(_text(484, mono - 2, "no exchange between experts", "sub"))
    body.append(_box(402, mono + 8, 156, 44, "monolith", ""))
    below = mono + 30
    down = f"M72 {centre + 27:g}V{below - 14:g}Q72 {below:g} 86 {below:g}H394"
    body.append(_bent(down, 402, below, "l-8 -4v8"))
    up = f"M558 {below:g}H937Q951 {below:g} 951 {below - 14:g}V{centre + 35:g}"
    body.append(_bent(up, 951, centre + 27, "l-4 8h8"))
    body.append(_text(86, below - 8, "the same clips, all of them", "sub", "start"))
    body.append(_text(570, below - 8, "matched training compute" if matched else "", "sub", "start"))
    label = (
        f"Clips are partitioned into {k} clusters; one expert is trained on each without any exchange; a router mixes them "
        "into generated clips. A monolith trained on all clips stands beside them."
    )
    head = f'<svg class="flow" viewBox="0 0 1060 {height:g}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return Markup(f'<div class="flowbox">{head}{"".join(body)}</svg></div>')
