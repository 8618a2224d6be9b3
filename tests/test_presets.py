"""Every preset resolves for every source, with compute that is matched and arms that the run can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from archipel import config, pipeline, presets
from archipel.errors import ConfigError


@pytest.mark.parametrize("source", [None, "shapes", "fluent-emoji", "folder"])
@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_resolve(name: str, source: str | None, tmp_path: Path) -> None:
    for number in range(80 if source == "folder" else 0):
        (tmp_path / f"{number}.gif").write_bytes(b"")
    made = pipeline.resolve(source=source, preset=name, data=str(tmp_path) if source == "folder" else "")
    assert made.run.preset == name
    assert made.clips.source == (source or presets.PRESETS[name]["clips"].get("source", "shapes"))
    assert abs(made.compute.archipelago_flops / made.compute.monolith_flops - 1) <= made.compute.tolerance
    assert made.monolith.batch == made.partition.k * made.expert.batch
    assert made.sample.strategy in made.evaluate.arms and "monolith" in made.evaluate.arms
    assert made.evaluate.frames <= made.clips.frames
    again = config.build(made.model_dump(mode="json"))
    assert again == made


def test_a_preset_gives_way_to_set_and_to_the_source(tmp_path: Path) -> None:
    made = pipeline.resolve(preset="tiny", source="shapes", sets=["expert.width=96", "expert.heads=4"])
    assert made.expert.width == 96 and sum(made.expert.rope_axes) == 24
    (tmp_path / "a.gif").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"partition\.k = 2 .* number of clips 1"):
        pipeline.resolve(preset="tiny", source="folder", data=str(tmp_path))
    assert pipeline.resolve(preset="demo", source="shapes").clips.packages == config.Clips().packages


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean demo"):
        presets.values("demos")
