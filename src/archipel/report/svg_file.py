"""A chart of a page as an SVG file of its own: with its colours, its legend drawn in, and a background."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from archipel.report.svg import LETTER

_SPACE = "http://www.w3.org/2000/svg"
_KINDS = (".tick", ".span", ".slope", "line.mark", ".pair", ".grid", ".line", ".dot", ".heat", ".t0", ".key.")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _style() -> str:
    """The light palette and the rules for marks, out of the page's style sheet."""
    sheet = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    palette = sheet[sheet.index(":root{") : sheet.index("}") + 1].replace("color-scheme:light dark;", "")
    return "\n".join([palette, *(line for line in sheet.splitlines() if line.startswith(_KINDS))])


def standalone(chart: str) -> str:
    """The text of an SVG file from a chart of report.svg or report.rows (an SVG element, perhaps with a legend after it).

    Raises ValueError where ``chart`` is no such thing.
    """
    try:
        found = ElementTree.fromstring(f"<div>{_NOT_XML.sub('', chart)}</div>")
    except ElementTree.ParseError as error:
        raise ValueError(f"a chart is no well-formed SVG: {error}") from None
    svg = found.find(f"{{{_SPACE}}}svg")
    if svg is None:
        raise ValueError("there is no chart to write")
    _, _, width, height = (float(part) for part in svg.get("viewBox", "0 0 640 320").split())
    x, y, lines = 14.0, height + 16, 0
    for item in found.iter("li"):
        text = "".join(item.itertext())
        tone = (item[0].get("class") or "").removeprefix("key ").split()[0] if len(item) else "t0"
        long = LETTER * len(text) + 40
        if lines == 0 or x + long > width:
            x, y, lines = 14.0, y + (18 if lines else 0), lines + 1
        ElementTree.SubElement(
            svg, f"{{{_SPACE}}}circle", {"class": f"dot {tone}", "cx": f"{x:g}", "cy": f"{y - 4:g}", "r": "4.5"}
        )
        label = ElementTree.SubElement(svg, f"{{{_SPACE}}}text", {"class": "label", "x": f"{x + 10:g}", "y": f"{y:g}"})
        label.text = text
        x += long
    whole = height + (18 * lines + 8 if lines else 0)
    back = ElementTree.Element(
        f"{{{_SPACE}}}rect", {"width": f"{width:g}", "height": f"{whole:g}", "style": "fill:var(--card)"}
    )
    style = ElementTree.Element(f"{{{_SPACE}}}style")
    style.text = _style()
    svg.insert(0, back)
    svg.insert(0, style)
    svg.set("viewBox", f"0 0 {width:g} {whole:g}")
    svg.set("width", f"{width:g}")
    svg.set("height", f"{whole:g}")
    ElementTree.register_namespace("", _SPACE)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"
