"""What reaches a terminal: nothing that it would obey, and tables that fit."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from archipel.cli_islands import _status_table
from archipel.edge import say
from archipel.islands import worker
from archipel.islands.bucket import Bucket
from archipel.islands.status import status


def test_strangers_words_are_no_orders_to_a_terminal(capsys: pytest.CaptureFixture) -> None:
    say("error: \x1b]0;title\x07 of\nrun.toml\u202e")
    worker.say("checkpoint \x1b[2J\r gone")
    assert capsys.readouterr().err == "error: ?]0;title? of\nrun.toml?\ncheckpoint ?[2J? gone\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_of_jobs_fits_the_terminal(width: int, bucket: Bucket) -> None:
    console = Console(width=width, record=True, file=io.StringIO(), no_color=True)
    console.print(_status_table(status(bucket), width))
    lines = console.export_text().splitlines()
    head = next(line for line in lines if line.lstrip().startswith("job "))
    rows = [line.split() for line in lines]
    assert "state" in head and "step" in head and "seen ago" in head, head
    assert ["monolith", "free"] in [row[:2] for row in rows] and not any(
        "…" in line for line in lines[lines.index(head) :]
    )
