"""Damage to checkpoints: recognised, named, and passed over for the older one."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from archipel import store
from archipel.errors import ArchipelError
from archipel.training import checkpoint


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints after steps 10 and 20; the value of ``w`` says which."""
    for step in (10, 20):
        checkpoint.save(tmp_path, step, {"w": np.full(50, step, np.float32)}, {"run": "id", "note": step})
    return tmp_path


def test_the_newest_is_read_with_its_facts(two: Path) -> None:
    found = checkpoint.latest(two, "id")
    assert found is not None and found.step == 20 and found.manifest["note"] == 20
    assert (found.arrays["w"] == 20).all()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_torn_one_is_named_and_the_older_one_used(
    two: Path, name: str, damage, caplog: pytest.LogCaptureFixture
) -> None:
    damage(two / "00000020" / name)
    with caplog.at_level(logging.WARNING, "archipel"):
        found = checkpoint.latest(two, "id")
    assert found is not None and found.step == 10 and (found.arrays["w"] == 10).all()
    assert "00000020 is passed over" in caplog.text


def test_a_flipped_bit_is_seen(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(two / "00000020" / "state.safetensors")
    with caplog.at_level(logging.WARNING, "archipel"):
        found = checkpoint.latest(two, "id")
    assert found is not None and found.step == 10 and "sha256" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', '{"format": 1, "run": "id", "step": 3, "files": 5}'])
def test_a_manifest_that_is_none_is_passed_over(two: Path, content: str) -> None:
    (two / "00000020" / "manifest.json").write_text(content)
    if '"run"' not in content and "format" in content:
        content = json.dumps({**json.loads(content), "run": "id"})
        (two / "00000020" / "manifest.json").write_text(content)
    found = checkpoint.latest(two, "id")
    assert found is not None and found.step == 10


def test_with_all_damaged_there_is_none(two: Path) -> None:
    for step in ("00000010", "00000020"):
        truncate(two / step / "state.safetensors")
    assert checkpoint.latest(two, "id") is None
    assert checkpoint.latest(two / "nothing", "id") is None


def test_another_runs_and_a_newer_formats_are_refused_not_passed_over(two: Path) -> None:
    with pytest.raises(ArchipelError, match=r"another run\.toml"):
        checkpoint.latest(two, "other")
    path = two / "00000020" / "manifest.json"
    store.write_sealed(path, {**store.read_json(path), "format": 99})
    with pytest.raises(ArchipelError, match="format 99"):
        checkpoint.latest(two, "id")


def test_a_full_disk_leaves_the_older_ones_and_no_rubbish(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(two, 30, {"w": np.zeros(3, np.float32)}, {"run": "id"})
    found = checkpoint.latest(two, "id")
    assert found is not None and found.step == 20
    assert sorted(path.name for path in two.iterdir()) == ["00000010", "00000020"]


def test_writing_a_step_again_replaces_it(two: Path) -> None:
    checkpoint.save(two, 20, {"w": np.full(50, 21, np.float32)}, {"run": "id"})
    found = checkpoint.latest(two, "id")
    assert found is not None and (found.arrays["w"] == 21).all()
    assert sorted(path.name for path in two.iterdir()) == ["00000010", "00000020"]


def test_older_ones_go_only_after_the_new_one_is_whole(two: Path) -> None:
    (two / "notes.txt").write_text("left alone")
    checkpoint.save(two, 30, {"w": np.zeros(3, np.float32)}, {"run": "id"})
    assert sorted(path.name for path in two.iterdir()) == ["00000020", "00000030", "notes.txt"]
