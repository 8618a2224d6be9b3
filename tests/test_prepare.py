"""The prepare stage on small procedural clips: what it leaves behind, resume, refusals, and a second call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import cache, config, store
from archipel.encoders import codecs, features
from archipel.encoders.text import POOLED_SCALE
from archipel.encoders.weights import CODEC_CODE, FEATURES_CODE, TEXT_CODE, weights_hash
from archipel.errors import ArchipelError, Stopped
from archipel.manifest import read_manifest, rows_of
from archipel.prepare import prepare
from archipel.progress import StopFlag
from archipel.run import Run

SMALL: dict[str, Any] = {
    "clips": {"source": "shapes", "count": 24, "frames": 4, "size": 16},
    "codec": {"patch": [2, 8, 8], "channels": 12},
    "partition": {"k": 2, "fine": 4},
    "evaluate": {"frames": 2, "image_size": 32},
}


def new_run(folder: Path, over: dict[str, Any] | None = None) -> Run:
    return Run.create(folder, config.build(config.merge(SMALL, over or {})))


def contents(run: Run) -> dict[str, bytes]:
    """Everything but logs and locks."""
    files = (path for path in run.root.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock"))
    return {str(path.relative_to(run.root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = new_run(tmp_path_factory.mktemp("prepare") / "run")
    prepare(run)
    return run


def test_every_entry_has_the_manifest_rows_and_its_own_contents(prepared: Run) -> None:
    clips = read_manifest(prepared.manifest)
    entries = {kind: cache.open_kind(prepared.cache, kind) for kind in ("pixels", "latents", "text", "features")}
    assert {entry.rows for entry in entries.values()} == {len(clips)} and len(clips) > 10
    frames = entries["pixels"]["clips"][:]
    codec = codecs.load_codec(prepared.codec)
    latents = entries["latents"]["latents"]
    assert latents.shape == (len(clips), *codec.latent_shape(4, 16, 16)) and latents.dtype == np.float32
    assert np.allclose(latents[:], codec.encode(codecs.from_uint8(frames)).numpy(), atol=1e-5)
    text = entries["text"]
    assert text["tokens"].shape == (len(clips), 16, 384) and text["mask"].dtype == np.bool_
    assert np.allclose(np.linalg.norm(text["pooled"][:], axis=1), POOLED_SCALE, rtol=1e-4)
    assert entries["features"].names == tuple(sorted(features.NAMES))
    row = len(clips) - 1
    alone = features.extract(features.NAMES, frames[row : row + 1], prepared.config.evaluate)
    for name in features.NAMES:
        assert np.allclose(entries["features"][name][row], alone[name][0].numpy(), atol=1e-4)


def test_codec_is_fitted_on_training_rows_and_its_card_says_what_it_costs(prepared: Run) -> None:
    card = store.read_card(prepared.codec, "codec")
    assert card is not None and prepared.done(prepared.codec)
    clips = read_manifest(prepared.manifest)
    frames = cache.open_kind(prepared.cache, "pixels")["clips"][:]
    train = np.array(rows_of(clips, "train"))
    again = codecs.PatchPCA.fit(frames, train, (2, 8, 8), 12, 0.5)
    saved = codecs.load_codec(prepared.codec)
    assert torch.allclose(again.basis, saved.basis, atol=1e-6) and saved.gamma == 0.5
    assert set(card["round_trip"]) == {"train", "validation"}
    report = codecs.round_trip(saved, codecs.from_uint8(frames[train]))
    assert card["round_trip"]["train"] == pytest.approx(report) and report["psnr"] > 15
    assert card["codec"]["explained_variance"] == pytest.approx(again.explained) and 0.5 < again.explained < 1


def test_keys_hold_all_that_made_the_rows(prepared: Run) -> None:
    latents, text, judged = (cache.open_kind(prepared.cache, kind).spec for kind in ("latents", "text", "features"))
    digest = store.sha256_json([clip.sha256 for clip in read_manifest(prepared.manifest)])
    assert latents["clips"] == text["clips"] == judged["clips"] == digest
    assert latents["window"] == judged["window"] and latents["window"]["size"] == 16
    assert latents["encoder"]["weights"] == store.sha256_file(prepared.codec / "model.safetensors")
    assert text["encoder"]["weights"] == weights_hash("minilm") and text["tokens"] == 16
    assert judged["encoder"] == {name: weights_hash(name) for name in ("efficientnet", "transnet")}
    assert all(spec["dtype"] == "float32" for spec in (latents, text, judged))
    assert (latents["code"], text["code"], judged["code"]) == (CODEC_CODE, TEXT_CODE, FEATURES_CODE)


def test_log_is_written_and_every_folder_verifies(prepared: Run) -> None:
    assert "codec patch-pca on train clips" in prepared.log("prepare").read_text()
    folders = [prepared.clips, prepared.codec, *(path for path in prepared.cache.iterdir() if path.is_dir())]
    assert len(folders) == 6 and all(store.read_card(folder) for folder in folders)
    assert [problem for folder in folders for problem in store.check_card(folder)] == []


@pytest.mark.slow
def test_a_second_call_changes_nothing_and_needs_no_torch(prepared: Run) -> None:
    before = contents(prepared)
    program = (
        "import sys; from archipel.prepare import prepare; from archipel.run import Run; "
        "prepare(Run.open(sys.argv[1])); print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(prepared.root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and done.stderr == ""
    assert contents(prepared) == before


def test_interrupted_work_continues_to_the_same_bytes(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of every part in turn: at the end nothing differs from a run in one go."""
    run = Run.create(tmp_path / "run", prepared.config)
    whole, stops, build = contents(prepared), 0, cache.build

    def stopping(*args: Any, stop: StopFlag, **kwargs: Any) -> cache.Entry:
        *head, items, make = args

        def once(begin: int, end: int) -> Any:
            made = make(begin, end)
            stop.signal = 2  # as if Ctrl-C came while the shard was made
            return made

        return build(*head, items, once, stop=stop, **{**kwargs, "per_shard": kwargs.get("per_shard", 64)})

    monkeypatch.setattr(cache, "build", stopping)
    for _ in range(12):
        try:
            prepare(run, StopFlag())
            break
        except Stopped:
            stops += 1
    assert stops >= 2
    assert contents(run) == whole


def test_a_damaged_codec_and_a_lost_shard_are_made_again(prepared: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(prepared.root, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    before = contents(run)
    model = run.codec / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    for kind in ("pixels", "features"):
        next(cache.open_kind(run.cache, kind).folder.glob("shard-*")).unlink()
    prepare(run)
    assert contents(run) == before


def test_too_few_groups_for_k_are_refused_with_the_number_that_works(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", {"clips": {"count": 6}, "partition": {"k": 6}})
    with pytest.raises(
        ArchipelError, match=r"partition.k = 6 is larger than the \d content groups .*: at most \d works"
    ):
        prepare(run)


def test_cut_captions_are_counted_on_screen_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = features.WIDTHS.items()
    monkeypatch.setattr(
        features, "extract", lambda names, clips, judge: {k: torch.zeros(len(clips), w) for k, w in widths}
    )
    run = new_run(tmp_path / "run", {"clips": {"count": 12}, "text": {"tokens": 4}, "codec": {"kind": "pixels"}})
    prepare(run)
    assert caplog.text.count("12 of 12 captions are longer than text.tokens = 4") == 1
    assert "WARNING" in run.log("prepare").read_text()
    assert cache.open_kind(run.cache, "latents")["latents"].shape == (12, 384, 2, 2, 2)
