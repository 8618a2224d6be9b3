"""The scale curves: laws against closed forms, cases at toy sizes, and a call that goes on where the first ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/ is not installed: it is a folder of the clone. What a case sets for its own process is undone."""
    import resource

    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)


def test_laws_are_those_that_the_points_were_made_by() -> None:
    from bench.scale.fitting import fit

    x = np.array([1e3, 1e4, 1e5, 1e6])
    law = fit(x, 3e-4 * x**1.25)
    assert law is not None and law.points == 3
    assert law.power == pytest.approx(1.25) and law.factor == pytest.approx(3e-4) and law.residual < 1e-9
    assert law(1e7) == pytest.approx(3e-4 * 1e7**1.25)
    assert fit(x[:2], x[:2]) is None and fit(x, [0.0, 0.0, 1.0, 2.0]) is None  # too few points above zero


@pytest.mark.parametrize(
    "case", ["write-cache", "read-cache", "manifest", "partition", "shards", "batches", "evaluate"]
)
def test_a_case_of_the_clips_measures_itself(case: str, work: Path) -> None:
    from bench.scale import clips

    found = clips.CASES[case](work, 400)
    assert found["cpu"] > 0 and found["wall"] > 0 and found["peak"] >= 0
    assert found == json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


@pytest.mark.parametrize("kind", ["frames", "size"])
def test_frames_and_pixels_give_tokens(kind: str, tmp_path: Path) -> None:
    from bench.scale import models

    small, large = (getattr(models, f"step_{kind}")(tmp_path, n) for n in (16, 32))
    text = 2 * small["tokens"] - large["tokens"] if kind == "frames" else (4 * small["tokens"] - large["tokens"]) / 3
    assert text == int(text) > 0, "tokens of a clip grow with frames, and with the square of a side; captions' stay"


def test_a_call_measures_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    known = {
        "points": {
            "after": {"codec-size": {"16": {"cpu": 1.0, "wall": 1.0, "peak": 1.0, "load": 0.0, "date": "2026-01-01"}}}
        }
    }
    out.write_text(json.dumps(known))
    call = [sys.executable, "-m", "bench.scale", "--only", "codec-size", "--most", "32", "--out", str(out)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = json.loads(out.read_text())["points"]["after"]["codec-size"]
    assert points["16"]["cpu"] == 1.0 and 0 < points["32"]["cpu"] < 60 and "failed" not in points["32"]
    assert "codec-size" in (tmp_path / "scale.md").read_text()
