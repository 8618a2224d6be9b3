"""A whole run on released weights, autoencoder and text encoder of one family, without the folder they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.tiny_parts import tiny_pipeline

from archipel import pipeline
from archipel.ensemble.pipeline import Archipelago

SETS = ["clips.count=16", "partition.fine=4", "text.tokens=6", "evaluate.frames=2", "evaluate.image_size=32",
        "router.steps=2", "router.batch=1", "router.width=8", "expert.steps=3", "sample.steps=2"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("wan", 5), ("cogvideox", 9)])
def test_from_released_weights_to_a_clip(name: str, frames: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "pipe", name)
    parts = dict.fromkeys(("codec", "text", "weights"), str(folder))
    run = pipeline.init(tmp_path / "run", preset="tiny", sets=SETS, **parts)  # type: ignore[arg-type]
    pipeline.prepare(run)
    shutil.rmtree(folder)
    pipeline.partition(run)
    for job in ("0", "1", "monolith"):
        pipeline.train(run, job, threads=1)
    pipeline.route(run)
    made = Archipelago.load(run.root).generate(["a red ball"], strategy="top1", seeds=[0])
    assert made.clips.shape == (1, frames, 16, 16, 3)
    assert pipeline.verify(run)[1] == []
