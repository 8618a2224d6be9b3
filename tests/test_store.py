"""Files: written aside, hashed, mapped, locked; damage is found and named."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from archipel import store
from archipel.errors import ArchipelError, DamagedError, LockedError


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    store.write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), store.aside(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert store.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_round_trip_and_agree_with_the_reference_reader(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = {
        "latents": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "mask": np.array([[True, False]]),
        "row": np.array([3, 1], np.int64),
        "empty": np.zeros((0, 5), np.float32),
        "clips": np.arange(6, dtype=np.uint8).reshape(1, 6),
    }
    path = tmp_path / "t.safetensors"
    store.write_tensors(path, tensors)
    mapped, reference = store.map_tensors(path), load_file(path)
    assert set(mapped) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(mapped[name], value)
        np.testing.assert_array_equal(mapped[name], reference[name])
    assert isinstance(mapped["latents"], np.memmap)


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    a, b = np.ones(3, np.float32), np.zeros(2, np.int64)
    store.write_tensors(tmp_path / "1", {"a": a, "b": b})
    store.write_tensors(tmp_path / "2", {"b": b, "a": a})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "header", "huge", "empty", "gone", "offsets", "negative"])
def test_damaged_tensor_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.safetensors"
    store.write_tensors(path, {"a": np.arange(100, dtype=np.float32)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")

    def with_header(entry: dict[str, object]) -> bytes:
        header = json.dumps({"a": entry}).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    broken = {
        "truncate": data[:-40],
        "header": data[:8] + b"{" * length + data[8 + length :],
        "huge": (10 << 30).to_bytes(8, "little") + data[8:],
        "empty": b"",
        "gone": None,
        "offsets": with_header({"dtype": "F32", "shape": [100], "data_offsets": [400, 800]}),
        "negative": with_header({"dtype": "F32", "shape": [-1, -100], "data_offsets": [0, 400]}),
    }[damage]
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    with pytest.raises(DamagedError, match=r"t\.safetensors"):
        store.map_tensors(path)


def test_cards_find_every_kind_of_damage(tmp_path: Path) -> None:
    for name in ("same", "changed", "shorter", "gone"):
        (tmp_path / name).write_bytes(b"0123456789")
    store.write_card(tmp_path, "thing", "run", ["same", "changed", "shorter", "gone"], note="x")
    assert store.check_card(tmp_path) == []
    (tmp_path / "changed").write_bytes(b"0123456780")
    (tmp_path / "shorter").write_bytes(b"012")
    (tmp_path / "gone").unlink()
    assert sorted(p.path.name for p in store.check_card(tmp_path)) == ["changed", "gone", "shorter"]


def test_cards_of_another_kind_or_a_newer_format_are_refused(tmp_path: Path) -> None:
    store.write_card(tmp_path, "thing", "run", [])
    with pytest.raises(DamagedError, match="kind"):
        store.read_card(tmp_path, "other")
    store.write_json(tmp_path / "card.json", {"format": 9, "kind": "thing"})
    with pytest.raises(ArchipelError, match="format 9"):
        store.read_card(tmp_path)
    assert store.read_card(tmp_path / "nothing here") is None


def test_a_card_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    store.write_card(folder, "thing", "run", [])
    card = store.read_json(folder / "card.json") | {"files": {"../secret": {"sha256": "", "bytes": 1}}}
    store.write_sealed(folder / "card.json", card)
    assert "outside" in store.check_card(folder)[0].reason


def test_every_flipped_bit_of_a_card_is_noticed(tmp_path: Path) -> None:
    store.write_card(tmp_path, "thing", "run", [], steps=12, share=0.25, words=["a", None], shapes={1: (2, 3)})
    path = tmp_path / "card.json"
    whole = path.read_bytes()
    card = store.read_card(tmp_path)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = store.read_card(tmp_path)
        except ArchipelError as error:
            assert str(path) in str(error)
        else:
            assert found == card, f"bit {bit} changed what was read"  # white space
    older = {key: value for key, value in (card or {}).items() if key != store.CHECK}
    store.write_json(path, older)
    assert store.read_card(tmp_path) == older, "cards of earlier versions have no seal"


def test_jsonl_survives_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    store.append_jsonl(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert store.read_jsonl(path) == [{"step": 1}]


def _hold(path: str, ready: object, done: object) -> None:
    with store.lock(Path(path), "a test"):
        ready.set()  # type: ignore[attr-defined]
        done.wait(20)  # type: ignore[attr-defined]


def test_a_second_process_is_locked_out_and_a_killed_holder_is_not_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    path = tmp_path / "x.lock"
    holder = context.Process(target=_hold, args=(str(path), ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(LockedError, match="a test"), store.lock(path, "a test"):
        pass
    holder.kill()
    holder.join()
    with store.lock(path, "a test"):
        pass
