"""``python -m archipel.study.publish STUDY_FOLDER OUT_FOLDER``: a finished study as a page of a repository's docs."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from archipel.errors import ArchipelError
from archipel.study.markdown import docs_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write OUT_FOLDER/NAME.md and what it shows; prints the page's path. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m archipel.study.publish", description=__doc__)
    parser.add_argument("study", type=Path, help="RUN/study")
    parser.add_argument("out", type=Path, help="where NAME.md and NAME/ are written, such as docs/results")
    parser.add_argument("--name", default=None, help="name of the page; without it, today's date")
    given = parser.parse_args(arguments)
    name = given.name or datetime.date.today().isoformat()
    try:
        print(docs_page(given.study, given.out, name))
    except (ArchipelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
