"""Image-to-video through the command line: a run trained to be given frames, its scores and page, and --image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archipel import store
from archipel.evaluation.first_frame import METRIC, TEXT_ONLY

pytestmark = pytest.mark.slow

Inside = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, inside: Inside) -> Path:
    root = tmp_path_factory.mktemp("image") / "run"
    settings = [
        "clips.count=48", "clips.phases=1", "expert.tasks=[1, 5, 1, 1]", "router.reads_image=true", "expert.steps=120",
        "expert.checkpoint_every=60", "expert.validate_every=60", "router.steps=20", "sample.steps=4",
        'evaluate.arms=["top1", "monolith"]', "evaluate.count=8", "evaluate.showcase=0",
    ]  # fmt: skip
    code, said = inside(
        "init", root, "--source", "shapes", "--preset", "tiny", *(f"--set={setting}" for setting in settings)
    )
    assert code == 0, said
    code, said = inside("run", root, "--threads", 1)
    assert code == 0, said
    return root


def test_scores_and_page_tell_how_well_clips_begin_with_the_given_frame(run: Path) -> None:
    rows = store.read_json(run / "scores" / "test.json")
    found = {(row["arm"], row["metric"]): row["value"] for row in rows}
    for arm in ("top1", "monolith"):
        assert found[arm, TEXT_ONLY] + 1 < found[arm, METRIC] < found["codec", METRIC], found
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Clips that were given their first frame" in page and METRIC in page
    for name in ("0", "1", "monolith"):
        assert set(store.read_json(run / "experts" / name / "card.json")["validation"]["ema"]["tasks"]) == {
            "text", "head", "loop", "tail",
        }  # fmt: skip


def test_generate_with_pictures(run: Path, tmp_path: Path, inside: Inside) -> None:
    real = store.map_tensors(run / "samples" / "test" / "real.safetensors")["clips"]
    for name, frame in (("first", real[0, 0]), ("last", real[1, -1])):
        Image.fromarray(np.asarray(frame)).resize((40, 40), Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
    made = []
    for more in (
        [],
        ["--image", tmp_path / "first.png"],
        ["--image", tmp_path / "first.png", "--last-image", tmp_path / "last.png"],
    ):
        out = tmp_path / f"{len(made)}.gif"
        code, said = inside("generate", run, "a red ball bounces", *more, "-o", out, "--scale", 1)
        assert code == 0, said
        made.append(out.read_bytes())
    assert len(set(made)) == 3
    code, said = inside("generate", run, "a red ball", "--image", tmp_path / "none.png", "-o", tmp_path / "x.gif")
    assert code != 0 and "none.png is not there" in said
