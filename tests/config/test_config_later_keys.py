"""Keys that came later: a run made with their defaults has the id that it had before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archipel import cache, config, presets, store
from archipel.config import RunConfig
from archipel.data.stage import ingest
from archipel.errors import ConfigError
from archipel.manifest import read_manifest
from archipel.prepare import _source, fit_codec
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training import budget

# sha256 of run.toml, resolved, as it was before the first later key. Where this fails, a new key is not `_later`.
IDS = {
    "": "6b68aaa090ad3d02c37ccd953795b04707da0431dc65fd90b8a9d3b345bc1cde",
    "tiny": "9fff38743cba86e37a4b53c1bca04437524aaad68884d83996aea9469a0e2deb",
    "gpu": "a1dc64745450be2930996ebebfb927252d24a34ebb951568756b64741165dbd1",
}


@pytest.mark.parametrize("preset", IDS)
def test_the_same_settings_make_the_same_run_as_ever(preset: str) -> None:
    values = presets.fit_rope(presets.values(preset)) if preset else {}
    text = config.to_toml(budget.resolve(config.build(values)))
    assert store.sha256_bytes(text.encode()) == IDS[preset]


def test_a_later_key_is_written_where_it_says_something(tmp_path: Path) -> None:
    made = config.build({"clips": {"seed": 7}, "partition": {"seed": -1}})
    text = config.to_toml(made)
    assert "seed = 7" in text and text.count("seed") == 2  # run.seed, clips.seed
    assert config.parse(text.encode(), "run.toml")[0] == made
    with pytest.raises(ConfigError, match=r"clips.seed = -2"):
        config.build({"clips": {"seed": -2}})


SMALL: dict[str, Any] = {
    "clips": {"source": "shapes", "count": 24, "frames": 4, "size": 16},
    "codec": {"patch": [2, 8, 8], "channels": 4},
    "partition": {"k": 2},
    "evaluate": {"frames": 2},
}


def _prepared(root: Path, **over: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The manifest's bytes and the codec's spec."""
    run = Run.create(root, config.build(config.merge(SMALL, over)))
    ingest(run, StopFlag())
    clips, pixels = read_manifest(run.manifest), cache.open_kind(run.cache, "pixels")
    fit_codec(run, clips, pixels, _source(run, clips, pixels), None)
    card = store.read_card(run.codec)
    assert card is not None
    return run.manifest.read_bytes(), card["spec"]


def test_runs_of_other_seeds_share_clips_split_and_codec_where_they_are_told_to(tmp_path: Path) -> None:
    plain = _prepared(tmp_path / "a", run={"seed": 3})
    assert _prepared(tmp_path / "b", run={"seed": 4}, clips={"seed": 3}) == plain
    assert _prepared(tmp_path / "c", run={"seed": 4}) != plain


def test_the_seeds_of_clips_and_clusters_are_the_run_s_unless_given() -> None:
    plain = RunConfig.model_validate({"run": {"seed": 5}})
    assert (plain.clips_seed, plain.partition_seed) == (5, 5)
    own = RunConfig.model_validate({"run": {"seed": 5}, "clips": {"seed": 0}, "partition": {"seed": 9}})
    assert (own.clips_seed, own.partition_seed) == (0, 9)
