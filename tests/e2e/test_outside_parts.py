"""A whole run on released weights, autoencoder and text encoder of one family, without the folder they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny_parts import tiny_pipeline

from archipel import pipeline, store
from archipel.encoders.text import open_text
from archipel.ensemble.pipeline import Archipelago
from archipel.islands.publish import publish
from archipel.islands.remote import open_source
from archipel.progress import StopFlag

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
    # A bucket has the parts, and whoever generates from it gets them.
    url = (tmp_path / "bucket").as_uri()
    publish(run, url, StopFlag())
    source = open_source(url)
    for mine, theirs in ((run.text, source.text()), (run.codec, source.codec())):
        assert mine != theirs and store.sha256_file(mine / "card.json") == store.sha256_file(theirs / "card.json")
        assert store.check_card(theirs) == []
    there = open_text(run.config.text, source.text()).encode(["a red ball"])
    assert torch.equal(there.tokens, open_text(run.config.text, run.text).encode(["a red ball"]).tokens)
