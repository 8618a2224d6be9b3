"""What every page of Archipel shares: escaping, a policy that pins scripts and styles, sections that may fail alone."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from archipel import __version__
from archipel.errors import ArchipelError

logger = logging.getLogger("archipel")
HERE = Path(__file__).parent
# What a strange or damaged file can make a section fail with; anything else is a fault of ours and is raised.
BAD_INPUT = (
    ArchipelError,
    OSError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ZeroDivisionError,
    OverflowError,
)


def guarded(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A section's context, or what to say instead of it where its files are not of the expected shape."""
    try:
        return {"broken": "", **make()}
    except BAD_INPUT as error:
        logger.warning("report: section %s could not be shown: %r", name, error)
        return {"broken": f"its files are not of the expected shape ({type(error).__name__}: {error}).", "missing": ""}


def stylesheet(*more: Path) -> str:
    """The style sheet of the run's report, followed by those of ``more``."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (HERE / "page.css", *more))


def fill(
    folder: Path,
    style: str,
    context: Mapping[str, Any],
    sections: Sequence[tuple[str, str]],
    *,
    page: str = "page.html",
) -> str:
    """The template ``folder``/page.html as text: every value escaped, no address outside, scripts and styles by hash.

    Macros of the run's report are there as "macros.html". Raises ArchipelError where jinja2 (extra ``eval``) is not
    installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ArchipelError("the report needs jinja2: install it with `pip install 'archipel[eval]'`") from error
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    text = environment.get_template(page).render(
        **context,
        version=__version__,
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        policy=policy,
    )
    return text + "\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
