"""A run with parts from outside: taken by prepare, then independent of where they came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_parts import tiny_autoencoder, tiny_pipeline, tiny_text

from archipel import cache, pipeline, store
from archipel.encoders import codecs
from archipel.encoders.text import open_text
from archipel.errors import ArchipelError
from archipel.manifest import read_manifest
from archipel.prepare import prepare
from archipel.run import Run

SETS = ["clips.count=16", "partition.fine=4", "text.tokens=6", "evaluate.frames=2", "evaluate.image_size=32",
        "router.steps=1", "router.batch=1", "router.width=8"]  # fmt: skip


def new_run(root: Path, folder: Path, *sets: str, **parts: Any) -> Run:
    asked = {"codec": str(folder), "text": str(folder), **parts}
    return pipeline.init(root / "run", preset="tiny", sets=[*SETS, *sets], **asked)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """FLUX's weights, clips with two windows, given frames; the folder it all came from is gone."""
    root = tmp_path_factory.mktemp("outside")
    folder = tiny_pipeline(root / "pipe", "flux")
    sets = ("expert.tasks=[1, 5, 1, 1]", "clips.phases=2")
    run = new_run(root, folder, *sets, weights=str(folder))
    pipeline.prepare(run)
    shutil.rmtree(folder)
    return run


def test_parts_are_in_the_run_and_verify(prepared: Run) -> None:
    for folder, kind in ((prepared.codec, "codec"), (prepared.text, "text"), (prepared.base, "base")):
        assert prepared.done(folder) and store.read_card(folder, kind) and not store.check_card(folder)
    listed = set((store.read_card(prepared.text) or {})["files"])
    assert {name.split("/")[0] for name in listed} == {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
    config = prepared.config
    assert store.sha256_file(prepared.codec / "model.safetensors") == config.codec.sha256
    assert store.sha256_file(prepared.base / "model.safetensors") == config.expert.weights_sha256
    assert pipeline.verify(prepared)[1] == []
    assert {s.name: s.state for s in pipeline.states(prepared)}["prepare"] == "done"


def test_the_cache_holds_what_the_parts_make_of_the_clips(prepared: Run) -> None:
    codec, text = codecs.load_codec(prepared.codec), open_text(prepared.config.text, prepared.text)
    entries = {kind: cache.open_kind(prepared.cache, kind) for kind in ("pixels", "latents", "text")}
    frames, latents = entries["pixels"]["clips"][:], entries["latents"]
    assert latents["latents"].shape[1:] == codec.latent_shape(5, 16, 16)
    assert np.allclose(latents["latents"][:], codec.encode(codecs.from_uint8(frames)).numpy(), atol=1e-5)
    found = text.encode([clip.caption for clip in read_manifest(prepared.manifest)])
    assert np.allclose(entries["text"]["tokens"][:], found.tokens.numpy(), atol=1e-5)
    assert np.allclose(entries["text"]["pooled"][:], found.pooled.numpy(), atol=1e-5)
    assert (entries["text"]["mask"][:] == found.mask.numpy()).all()


def test_first_and_last_frames_as_stills(prepared: Run) -> None:
    codec, latents = codecs.load_codec(prepared.codec), cache.open_kind(prepared.cache, "latents")
    pixels = cache.open_kind(prepared.cache, "pixels")
    windows = {"": pixels["clips"][:], "phases_": pixels["phases"][:]}
    for prefix, clips in windows.items():
        for name, frame in (("first", 0), ("last", -1)):
            stills = torch.from_numpy(np.ascontiguousarray(clips[..., frame, :, :, :]))
            wanted = codecs.still_latents(codec, stills.flatten(0, -4), 5).unflatten(0, stills.shape[:-3])
            assert np.allclose(latents[prefix + name][:], wanted.numpy(), atol=1e-5)


def test_the_round_trip_is_reported(prepared: Run) -> None:
    card = store.read_card(prepared.codec) or {}
    assert card["codec"]["model"] == "AutoencoderKLHunyuanVideo" and set(card["round_trip"]) == {"train", "validation"}
    report = card["round_trip"]["train"]
    assert {"psnr", "seam_space", "seam_time", "latent_mean", "latent_std", "clips"} <= set(report)
    rows = cache.open_kind(prepared.cache, "latents")["latents"][:]
    assert report["latent_std"] == pytest.approx(float(rows.std()), rel=0.3)


def test_a_second_prepare_needs_nothing_from_outside(prepared: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.root.rglob("*.safetensors")}
    pipeline.prepare(prepared)
    assert before == {path: path.stat().st_mtime_ns for path in prepared.root.rglob("*.safetensors")}


def test_damage_is_found_and_named_when_the_source_is_gone(prepared: Run, tmp_path: Path) -> None:
    shutil.copytree(prepared.root, tmp_path / "run")
    (tmp_path / "run" / "text" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ArchipelError, match=r"text .*there is no such folder"):
        prepare(Run.open(tmp_path / "run"))


def test_weights_that_changed_between_init_and_prepare_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    tiny_autoencoder(folder / "vae", "tiny")
    tiny_text(folder, "t5")
    run = new_run(tmp_path, folder, "clips.frames=2")
    tiny_text(folder, "t5", seed=7)
    with pytest.raises(ArchipelError, match=r"text.sha256 is"):
        prepare(run)
    tiny_text(folder, "t5")
    shutil.rmtree(run.codec)
    tiny_autoencoder(folder / "vae", "tiny", seed=7)
    with pytest.raises(ArchipelError, match=r"sha256 .* run.toml says"):
        prepare(run)
    tiny_autoencoder(folder / "vae", "tiny")
    prepare(run)
    assert cache.open_kind(run.cache, "latents")["latents"].shape[1:] == (4, 2, 2, 2)
