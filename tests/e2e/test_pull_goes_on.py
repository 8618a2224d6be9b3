"""A run whose experts were trained on islands comes home: route, generate, evaluate and report go on, with equal results."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.run import Run

_HARBOURS = runpy.run_path(str(Path(__file__).parents[1] / "islands" / "harbours.py"))


@pytest.mark.slow
def test_what_was_pulled_is_scored_as_if_it_had_been_trained_here(
    finished: Path, inside: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    islands = Run.open(shutil.copytree(finished, tmp_path / "islands"))
    with StopFlag() as stop:
        publish(islands, str(tmp_path / "bucket"), stop)
    harbour = _HARBOURS["Harbour"](islands, tmp_path / "bucket")
    harbour.commit(*islands.job_names)
    harbour.admit(*(name for name in islands.job_names if name != "1"))
    home = tmp_path / "home"
    gone = ("experts", "router", "samples", "scores", "report", "ledger.json", "logs")
    shutil.copytree(finished, home, ignore=lambda folder, names: gone if Path(folder) == finished else ())
    code, said = inside("pull", harbour.url, home)
    assert code == 0 and "committed but not admitted, and left: 1" in said
    code, said = inside("generate", home, "--arms")
    assert code == 2 and "archipel train" in said, "scores are never made with a part missing"
    harbour.admit("1")
    code, said = inside("pull", harbour.url, home)
    assert code == 0 and "brought: 1" in said
    code, said = inside("run", home)
    assert code == 0 and "is already trained" not in said and "train 0" not in said, "nothing was trained again"
    assert (home / "report" / "index.html").is_file()
    for path in sorted((finished / "scores").glob("*.json")):
        here, there = (json.loads((root / "scores" / path.name).read_text()) for root in (home, finished))
        for value in (here, there):
            if isinstance(value, dict):
                value.pop("seconds", None)
        assert here == there, path.name
    code, said = inside("verify", home)
    assert code == 0, said
