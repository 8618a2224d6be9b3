"""A study's results as a Markdown page with its plots, sample sheets and table.json beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError
from archipel.report.reading import finite
from archipel.report.svg_file import standalone
from archipel.study.page import context, gather
from archipel.study.page_reading import StudyFiles
from archipel.study.sheets import sheet

_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def md(value: object) -> str:
    """``value`` as Markdown text: nothing in it formats, links, breaks a table or is HTML."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", text)


def grid(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table as lines, an empty one before and after; numbers' columns are not aligned by force."""
    lines = ["", "| " + " | ".join(map(md, columns)) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(map(md, row)) + " |" for row in rows]
    return [*lines, ""]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "part"


class Page:
    """Lines of the page, and the files that it shows."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.files: dict[str, bytes] = {}

    def add(self, *lines: str) -> None:
        self.lines += lines

    def said(self, part: Mapping[str, Any]) -> bool:
        """Say why a section cannot be shown; False where it can."""
        for key, start in (("broken", "Could not be shown"), ("missing", "Not there")):
            if part.get(key):
                self.add("", f"{start}: {md(part[key])}", "")
                return True
        return False

    def table(self, table: Mapping[str, Any] | None) -> None:
        if table:
            self.add(*grid(table["columns"], table["rows"]))

    def chart(self, name: str, title: str, chart: Any) -> None:
        """A chart as an SVG file beside the page."""
        if chart:
            self.picture(f"{_slug(name)}.svg", title, standalone(str(chart)).encode())

    def picture(self, file: str, title: str, data: bytes) -> None:
        self.files[file] = data
        self.add("", f"![{md(title)}]({self.folder}/{file})", "")


def _results(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("## Results", "")
    if page.said(parts["results"]):
        return
    page.add(
        f"The metric that decides is {md(parts['metric'])}. ↓ lower is better, ↑ higher. Nothing "
        "is set in bold, since only paired differences say which arm is better.",
    )
    for table in parts["results"]["tables"]:
        page.add("", f"### {md(table['title'])}", "", md(table["caption"]))
        if table["few"]:
            page.add("", "**Too few clips to conclude.**")
        for shown in filter(None, (table, table["ablations"])):
            _scores(page, shown)
        if table["raw"]:
            page.add("", "<details><summary>Raw Fréchet distances, beside their floor (real clips)</summary>")
            _scores(page, table["raw"])
            page.add("</details>")


def _scores(page: Page, table: Mapping[str, Any]) -> None:
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    names = [
        column["metric"] + (" (primary)" if column["primary"] else "") + arrows[column["better"]]
        for column in table["columns"]
    ]
    rows: list[list[str]] = []
    for body in table["bodies"]:
        for row in body["rows"]:
            texts = [
                "–" if c is None else c["value"] + (f" ({c['interval']})" if c["interval"] else "")
                for c in [*row["cells"], *row["costs"]]
            ]
            rows.append([row["label"] + (f" ({row['tag']})" if row["tag"] else ""), *texts])
    page.add(*grid(["arm", *names, *table["costs"]], rows))


def _compared(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("## Compared in pairs", "")
    if not page.said(parts["comparisons"]):
        against = parts["comparisons"]["against"]
        page.add(
            f"Arm less baseline{f' ({md(against)})' if against else ''}; a ratio is the baseline's distance over the arm's. "
            "Where the arm's distance may be 0 no ratio is stated."
        )
        for table in parts["comparisons"]["tables"]:
            page.add("", f"### {md(table['title'])}")
            page.table(table)
    page.add("", "### Which monolith is the baseline", "")
    chosen = parts["baseline"]
    if not page.said(chosen):
        if chosen["chosen"]:
            page.add(f"{md(chosen['chosen'])}, the better one on {md(chosen['set'])} clips by {md(chosen['metric'])}.")
        page.table(chosen["table"])


def _plots(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("## Plots", "")
    for key in ("forests", "pairs", "curve"):
        part = parts[key]
        if not page.said(part):
            for chart in part["charts"]:
                page.add("", f"{md(chart['title'])}:")
                page.chart(chart["name"], chart["title"], chart["svg"])
    if not parts["curve"].get("broken"):
        page.table(parts["curve"]["table"])


def _ablations(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("## Ablations", "")
    if page.said(parts["ablations"]):
        return
    if not parts["ablations"]["entries"]:
        page.add("None were made.")
    for one in parts["ablations"]["entries"]:
        page.add("", f"### {md(one['title'])}", "")
        if page.said(one):
            continue
        page.add(" ".join(md(one[key]) for key in ("question", "about") if one[key]))
        page.chart(f"ablation-{one['name']}", one["title"], one["svg"])
        page.table(one["table"])
        if one["verdict"]:
            page.add("", f"What it says: {md(one['verdict'])}")


def _samples(page: Page, files: StudyFiles, parts: Mapping[str, Any]) -> None:
    page.add("", "## Samples", "")
    if page.said(parts["samples"]):
        return
    shown = files.study.get("samples")
    for where in shown if isinstance(shown, dict) else ():
        prompts, clips, _ = gather(files, where)
        if not prompts or not clips:
            page.add("", f"No kept clips of {md(files.set_title(where))}.")
            continue
        captions = [str(prompt.get("caption", "")) for prompt in prompts[:8]]
        fps = finite(files.study.get("fps")) or 8.0
        data = sheet(captions, [files.title(arm) for arm in clips], list(clips.values()), fps)
        rule = next((one["rule"] for one in parts["samples"]["sets"] if one["title"] == files.set_title(where)), "")
        page.add("", f"{md(files.set_title(where))}. Rule: {md(rule)}.")
        page.picture(f"samples-{_slug(where)}.webp", f"Samples, {files.set_title(where)}", data)


def _rest(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("", "## Copying", "")
    if not page.said(parts["copying"]):
        for one in parts["copying"]["sets"]:
            page.add("", f"### {md(one['title'])}", "", md(one["verdict"]))
            if one["bodies"]:
                _scores(page, one)
    page.add("", "## Pilot", "")
    pilot = parts["pilot"]
    if not page.said(pilot):
        if pilot["table"]:
            page.add(" ".join(md(pilot[key]) for key in ("about", "even") if pilot[key]))
            page.add(*(["", f"Chosen: {md(pilot['chosen'])}"] if pilot["chosen"] else []))
            page.table(pilot["table"])
        else:
            page.add("No pilot trials are recorded.")
    page.add("", "## Ledger", "")
    if not page.said(parts["ledger"]):
        page.table(parts["ledger"]["table"])
        page.add(*(f"- {md(name)}: {md(value)}" for name, value in parts["ledger"]["clock"]))
    page.add("", "## How it was measured", "", md(parts["measured"].get("split_note", "")))
    if not parts["measured"]["broken"]:
        page.table(parts["measured"]["sets"])
    if not page.said(parts["measured"]):
        page.add(*(f"- {md(name)}: {md(value)}" for name, value in parts["measured"]["shared"]))
        page.table(parts["measured"]["protocols"])


def _ending(page: Page, parts: Mapping[str, Any]) -> None:
    page.add("", "## Members, and how to repeat it", "", "    " + " ".join(parts["command"].split()), "")
    if not parts["members"]["broken"]:
        page.add(*(f"- {md(name)}: {md(value)}" for name, value in parts["members"]["facts"]))
    if not page.said(parts["members"]):
        page.table(parts["members"]["table"])
    page.add("", "## Notes and limits", "")
    if not page.said(parts["limits"]):
        page.add(*(f"- {md(text)}" for text in [*parts["limits"]["notes"], *parts["limits"]["limits"]]))


def docs_page(folder: Path, out: Path, name: str) -> Path:
    """Write ``out``/``name``.md and, in ``out``/``name``/, table.json, study.json, plots (SVG) and sample sheets (WebP).

    ``folder`` is RUN/study. Raises ArchipelError where it holds no study, and where ``name`` is no plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ArchipelError(f"{name!r} is no name for a page: use letters, digits, '.', '-' and '_'")
    files = StudyFiles(folder)
    if not files.written or not files.rows:
        raise ArchipelError(f"{folder} holds no finished study: {'; '.join(files.problems) or 'its table is empty'}")
    parts = context(files)
    head = parts["headline"]
    page = Page(name)
    page.add(f"# {md(head['title'])}", "", f"Study of {md(files.name)}, {name}. {md(head['question'])}", "")
    page.add(*filter(None, [f"**{md(head['short'])}** {md(head['long'])}" if head["short"] else ""]))
    for caution in head["cautions"]:
        page.add("", f"> {md(caution)}")
    page.chart("ratios", "The baseline's distance over the archipelago's, per metric and prompt set", head["chart"])
    for write in (_results, _compared, _plots, _ablations):
        write(page, parts)
        page.add("")
    _samples(page, files, parts)
    _rest(page, parts)
    _ending(page, parts)
    if parts["problems"]:
        page.add("", "Files that could not be read:", "", *(f"- {md(problem)}" for problem in parts["problems"]))
    for file in ("table.json", "study.json"):
        page.files[file] = (folder / file).read_bytes()
    for file, data in page.files.items():
        store.write_bytes(out / name / file, data)
    path = out / f"{name}.md"
    store.write_text(path, re.sub(r"\n{3,}", "\n\n", "\n".join(page.lines)).strip() + "\n")
    return path
