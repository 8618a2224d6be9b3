"""PSNR of generated first frames against the given ones: closed forms, and what an evaluation makes of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from archipel import store
from archipel.errors import DamagedError, MissingStageError
from archipel.evaluation import first_frame, stage
from archipel.evaluation.stage import evaluate
from archipel.report.scores import direction, family
from archipel.run import Run

MIX = [1.0, 5.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def small() -> ModuleType:
    """The small runs of the tests of the stage (tests are no package)."""
    path = Path(__file__).with_name("test_evaluation_stage.py")
    spec = importlib.util.spec_from_file_location("small_evaluations", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_psnr_is_that_of_the_textbook() -> None:
    wanted = np.full((3, 4, 4, 3), 100, np.uint8)
    frames = wanted.copy()
    frames[1] += 10
    frames[2, :2] = 0  # half of the numbers are off by 100
    found = first_frame.psnr(frames, wanted)
    assert found[1] == pytest.approx(20 * np.log10(255 / 10))
    assert found[2] == pytest.approx(20 * np.log10(255 / 100) + 10 * np.log10(2))
    assert found[0] == pytest.approx(58.92, abs=0.01), "equal frames: what rounding leaves, not infinity"
    assert first_frame.psnr(np.uint8([[[[0]]]]), np.uint8([[[[255]]]])) == pytest.approx(0.0), "no overflow of 8 bits"
    with pytest.raises(ValueError, match="cannot be compared"):
        first_frame.psnr(frames[:2], wanted)


def begin(run: Run, offsets: dict[str, int]) -> None:
    """Samples whose first frames are the real ones, a little brighter."""
    real = store.map_tensors(run.samples("test") / "real.safetensors")["clips"]
    for arm, offset in offsets.items():
        clips = np.clip(real.astype(int) + offset, 0, 255).astype(np.uint8)
        store.write_tensors(run.begun("test") / f"{arm}.safetensors", {"clips": clips})
    store.write_card(run.begun("test"), "samples", run.id, [f"{arm}.safetensors" for arm in offsets])


def test_an_evaluation_scores_given_first_frames_beside_what_is_no_gain(tmp_path: Path, small: ModuleType) -> None:
    run = small.make_run(tmp_path / "run", expert={"tasks": MIX})
    with pytest.raises(MissingStageError, match=r"test-first-frame.*archipel generate"):
        evaluate(run, extract=small.Networks())
    begin(run, {"top1": 2, "monolith": 20})
    evaluate(run, extract=small.Networks())
    rows = {(r["arm"], r["metric"]): r for r in store.read_json(run.scores("test")) if r["metric"].startswith("PSNR")}
    assert set(rows) == {
        *((arm, first_frame.METRIC) for arm in ("codec", "top1", "monolith")),
        *((arm, first_frame.TEXT_ONLY) for arm in ("top1", "monolith")),
    }
    real = store.map_tensors(run.samples("test") / "real.safetensors")["clips"]
    for arm, metric, where in (("top1", first_frame.METRIC, "begun"), ("codec", first_frame.METRIC, "samples")):
        clips = store.map_tensors(getattr(run, where)("test") / f"{arm}.safetensors")["clips"]
        row, values = rows[arm, metric], first_frame.psnr(clips[:, 0], real[:, 0])
        assert row["value"] == pytest.approx(values.mean()) and row["low"] <= row["value"] <= row["high"]
        assert row["n"] == len(real) and row["protocol"]["frames"] == 1 and row["protocol"]["split"] == "test"
    told, alone = rows["top1", first_frame.METRIC], rows["top1", first_frame.TEXT_ONLY]
    assert told["value"] > rows["monolith", first_frame.METRIC]["value"] > alone["value"]
    assert told["protocol"]["estimator"] != alone["protocol"]["estimator"]
    assert first_frame.NOTE in store.read_json(stage.extra_path(run))["notes"]
    begin(run, {"top1": 5, "monolith": 20})  # generated anew: scored anew
    evaluate(run, extract=small.Networks())
    rows = {(r["arm"], r["metric"]): r for r in store.read_json(run.scores("test"))}
    assert rows["top1", first_frame.METRIC]["value"] < told["value"] - 3
    (run.begun("test") / "top1.safetensors").unlink()
    run.scores("test").unlink()
    with pytest.raises(DamagedError, match=r"top1\.safetensors holds no clips"):
        evaluate(run, extract=small.Networks())


def test_other_runs_have_no_such_score(tmp_path: Path, small: ModuleType) -> None:
    run = small.make_run(tmp_path / "run", expert={"tasks": [1.0, 0.0, 0.0, 2.0]}, clips={"frames": 8, "count": 84})
    evaluate(run, extract=small.Networks())
    assert not [row for row in store.read_json(run.scores("test")) if row["metric"].startswith("PSNR")]


def test_the_report_knows_it() -> None:
    for metric in (first_frame.METRIC, first_frame.TEXT_ONLY):
        assert direction(metric) == "higher" and "first frame" in family(metric)
