"""Experts that are adapters over a short shared training, from `init` to the report, through the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from archipel import store

pytestmark = pytest.mark.slow


def test_adapters_over_a_trunk_from_init_to_report(
    tmp_path: Path, inside: Callable[..., tuple[int, str]], settings: list[str]
) -> None:
    root = tmp_path / "run"
    more = [
        "expert.warm_start=trunk", "expert.trunk_steps=10", "expert.lora_rank=2", 'evaluate.arms=["top1", "monolith"]',
        "clips.count=48", "expert.steps=10", "router.steps=10", "router.batch=4",
    ]  # fmt: skip
    chosen = [f"--set={one}" for one in [*settings, *more]]
    code, said = inside("init", root, "--source", "shapes", "--preset", "tiny", *chosen)
    assert code == 0, said
    code, said = inside("run", root, "--threads", 1)
    assert code == 0, said
    assert (root / "report" / "index.html").is_file()
    base = store.read_card(root / "base", "base")
    assert base is not None and base["start"]["steps"] == 10
    whole = (root / "base" / "model.safetensors").stat().st_size
    for name in ("0", "1", "monolith"):
        card = store.read_card(root / "experts" / name)
        assert card is not None and card["network"]["lora"]["base"] == base["sha256"] == card["warm_start"]["sha256"]
        assert (root / "experts" / name / "model.safetensors").stat().st_size < whole / 5
    ledger = store.read_json(root / "ledger.json")
    assert ledger["matched"] is True and ledger["base"]["source"] == "trunk"
    assert not list((root / "shards").rglob("init.safetensors"))
    code, said = inside("generate", root, "a red square moves left", "--strategy", "top2", "-o", tmp_path / "clip.mp4")
    assert code == 0 and (tmp_path / "clip.mp4").stat().st_size > 0, said
    code, said = inside("verify", root)
    assert code == 0, said
    code, said = inside("train", root, "0")
    assert code == 0 and "already trained" in said
