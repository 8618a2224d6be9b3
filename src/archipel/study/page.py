"""The study's page: one self-contained file from table.json, study.json and the kept clips."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.report.html import fill, guarded, stylesheet
from archipel.report.reading import finite, mapping
from archipel.report.samples import grid
from archipel.study import page_charts, page_tables
from archipel.study.page_headline import headline
from archipel.study.page_reading import StudyFiles, entries, sentence, words

logger = logging.getLogger("archipel")
HERE = Path(__file__).parent
BUDGET = 2_400_000  # bytes of pictures per prompt set
ROWS = 8  # captions shown: the first ones, whatever they look like
SECTIONS = (
    ("results", "Results"),
    ("plots", "Plots"),
    ("ablations", "Ablations"),
    ("samples", "Samples"),
    ("copying", "Copying"),
    ("pilot", "Pilot"),
    ("ledger", "Ledger"),
    ("measured", "Measured"),
    ("repeat", "Repeat"),
    ("limits", "Limits"),
)
STANDING_LIMITS = (
    "Distances are taken in the feature spaces named beside them and cannot be compared with numbers from other "
    "extractors, sizes or data.",
    "Many arms and metrics stand here and their intervals are not corrected for that: only the deciding comparison, fixed "
    "before the test clips were opened, answers the question.",
    "The experts together have more parameters than the monolith; the controls say how much of a gain that may be.",
)


def write_page(folder: Path) -> Path:
    """Write ``folder``/index.html (aside, then renamed) from the study's files in ``folder`` and return its path."""
    path = folder / "index.html"
    store.write_text(path, render_study(folder))
    logger.info("study page: %s (%.2f MB)", path, path.stat().st_size / 1e6)
    return path


def render_study(folder: Path) -> str:
    """The page as text: no address outside of it, every value escaped, scripts and styles pinned by hash.

    Works with whatever files there are: a part without its files says so, a damaged file is named and left out. Raises
    ArchipelError where jinja2 (extra ``eval``) is not installed.
    """
    return fill(HERE, stylesheet(HERE / "page.css"), context(StudyFiles(folder)), SECTIONS)


def gather(files: StudyFiles, where: str) -> tuple[list[Mapping[str, Any]], dict[str, np.ndarray], list[str]]:
    """(captions, clips uint8 (M, F, H, W, 3) by arm, arms without clips) of one prompt set, real clips first."""
    part = mapping(mapping(files.study.get("samples")).get(where))
    seed = files.first_seed(where)
    arms = sorted(dict.fromkeys(words(part.get("arms", []))), key=lambda arm: arm != "real")
    clips, absent = {}, []
    for arm in arms:
        found = files.clips(where, arm, seed)
        if found is None:
            absent.append(arm)
        else:
            clips[arm] = found
    prompts = entries(part.get("rows"))
    return prompts[: max(map(len, clips.values()), default=0)], clips, absent


def samples(files: StudyFiles) -> dict[str, Any]:
    """Context: per prompt set captions down and arms across, every picture a data URI."""
    fps = finite(files.study.get("fps")) or 8.0
    found: list[dict[str, Any]] = []
    for where in dict.fromkeys([*files.sets, *map(str, mapping(files.study.get("samples")))]):
        prompts, clips, absent = gather(files, where)
        part = mapping(mapping(files.study.get("samples")).get(where))
        if not part:
            continue
        if not clips or not prompts:
            found.append({"title": files.set_title(where), "rows": [], "absent": [], "rule": "", "columns": []})
            continue
        names = {arm: files.title(arm) for arm in clips}
        rows = grid(clips, list(clips), prompts, names, fps, ROWS, BUDGET)
        columns = [{"label": names[arm], "note": files.about(arm), "tone": files.tone(arm)} for arm in clips]
        found.append(
            {
                "title": files.set_title(where),
                "rule": str(part.get("rule") or "the first captions"),
                "rows": rows,
                "columns": columns,
                "absent": [files.title(arm) for arm in absent],
            }
        )
    return {"missing": "" if found else "study.json names no samples", "sets": found}


def ablations(files: StudyFiles) -> list[dict[str, Any]]:
    """Context of every ablation; one that cannot be shown says so and takes no other with it."""
    found = []
    for place, part in enumerate(entries(files.study.get("ablations"))):
        name = str(part.get("title") or part.get("name") or f"ablation {place}")
        found.append({"title": name} | guarded(f"ablation {name}", lambda part=part: page_charts.ablation(part)))  # type: ignore[misc]
    return found


def limits(files: StudyFiles) -> dict[str, Any]:
    """Context: notes and limits of this study, and those that every study has."""
    crossed = mapping(files.study.get("extractors"))
    return {
        "notes": list(
            dict.fromkeys(map(sentence, [*words(crossed.get("sentence", [])), *words(files.study.get("notes", []))]))
        ),
        "limits": [*map(sentence, words(files.study.get("limits", []))), *STANDING_LIMITS],
    }


def context(files: StudyFiles) -> dict[str, Any]:
    """Everything that the template (and the Markdown page) shows, section by section."""
    parts: dict[str, Any] = {
        "headline": {
            "title": "The study's files could not be read",
            "mood": "warn",
            "short": "",
            "long": "",
            "cautions": [],
            "tiles": [],
            "chart": "",
            "question": "",
            **guarded("headline", lambda: headline(files)),
        },
        "results": guarded("results", lambda: page_tables.results(files)),
        "comparisons": guarded("comparisons", lambda: page_tables.comparisons(files)),
        "baseline": guarded("baseline", lambda: page_tables.baseline(files)),
        "forests": guarded("plots", lambda: {"charts": page_charts.forests(files)}),
        "pairs": guarded("paired plots", lambda: {"charts": page_charts.pairs(files)}),
        "curve": guarded("curve", lambda: page_charts.curve(files)),
        "ablations": guarded("ablations", lambda: {"entries": ablations(files)}),
        "samples": guarded("samples", lambda: samples(files)),
        "copying": guarded("copying", lambda: page_tables.copying(files)),
        "pilot": guarded("pilot", lambda: page_tables.pilot(files)),
        "ledger": guarded("ledger", lambda: page_tables.ledger(files)),
        "measured": guarded("measured", lambda: page_tables.measured(files)),
        "members": guarded("members", lambda: page_tables.members(files)),
        "limits": guarded("limits", lambda: limits(files)),
    }
    return {
        **parts,
        "name": files.name,
        "page_title": f"{files.name} · Archipel study",
        "metric": files.metric,
        "seed_count": len(files.seeds),
        "run_id": str(files.study.get("run") or "unknown"),
        "commit": str(files.study.get("commit") or ""),
        "command": files.command,
        "problems": files.problems,
    }
