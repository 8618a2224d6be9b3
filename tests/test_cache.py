"""The cache: address, commit, resume, damage, reading across shards, and the order of training rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from archipel import cache, store
from archipel.errors import ArchipelError, DamagedError, LockedError, MissingStageError, Stopped
from archipel.progress import StopFlag

SPEC = {"clips": "abc", "encoder": {"name": "x", "weights": "123"}, "dtype": "float32", "code": 1}


class Maker:
    """Rows whose values are their item numbers; remembers what it was asked for and can be told to fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def __call__(self, begin: int, end: int) -> dict[str, np.ndarray]:
        if begin == self.fail_at:
            raise RuntimeError("killed")
        self.calls.append((begin, end))
        numbers = np.arange(begin, end)
        return {"value": np.repeat(numbers[:, None], 3, 1).astype(np.float32), "odd": numbers % 2 == 1}


def build(
    root: Path, make: cache.Make, items: int = 23, spec: dict = SPEC, stop: StopFlag | None = None
) -> cache.Entry:
    return cache.build(root, "latents", spec, items, make, run_id="run", label="test", per_shard=5, stop=stop)


def test_rows_read_alike_by_every_index_across_shards(tmp_path: Path) -> None:
    entry = build(tmp_path, Maker())
    assert (entry.rows, entry.names) == (23, ("odd", "value"))
    rows = entry["value"]
    whole = np.repeat(np.arange(23, dtype=np.float32)[:, None], 3, 1)
    assert (len(rows), rows.shape, rows.dtype) == (23, (23, 3), np.float32)
    assert np.array_equal(rows[:], whole)
    assert np.array_equal(rows[4:17:3], whole[4:17:3])
    assert np.array_equal(rows[::-1], whole[::-1])
    wanted = np.array([22, 0, 5, 4, 5, -1, 9, 10])
    assert np.array_equal(rows[wanted], whole[wanted])
    assert np.array_equal(rows[[3, 3]], whole[[3, 3]])
    assert np.array_equal(rows[-23], whole[0])
    assert np.array_equal(rows[entry["odd"][:]], whole[1::2])
    assert rows[np.array([], int)].shape == (0, 3)
    for bad in (23, -24, [0, 23]):
        with pytest.raises(IndexError):
            rows[bad]
    batch = rows[np.array([1, 2])]
    batch += 1  # a fresh array: neither the file nor later reads change
    assert np.array_equal(rows[1], whole[1])
    with pytest.raises(KeyError, match="it has odd, value"):
        entry["latents"]


def test_second_build_makes_nothing_and_leaves_every_byte(tmp_path: Path) -> None:
    folder = build(tmp_path, Maker()).folder
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    again = Maker()
    assert build(tmp_path, again).folder == folder
    assert again.calls == []
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert "partial.json" not in before and "partial.jsonl" not in before and "card.json" in before


def test_interrupted_build_continues_at_the_first_missing_shard_with_the_same_bytes(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", Maker()).folder
    with pytest.raises(RuntimeError, match="killed"):
        build(tmp_path / "torn", Maker(fail_at=10))
    folder = tmp_path / "torn" / whole.name
    assert not (folder / "card.json").exists()
    with pytest.raises(DamagedError, match="unfinished"):
        cache.open_entry(folder)
    (folder / ".shard-00002.abc.tmp.safetensors").write_bytes(b"torn")  # what kill -9 leaves of a file written aside
    second = Maker()
    build(tmp_path / "torn", second)
    assert second.calls == [(10, 15), (15, 20), (20, 23)]
    assert [p.name for p in sorted(folder.iterdir())] == [p.name for p in sorted(whole.iterdir())]
    assert all((whole / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "unlisted"])
def test_a_damaged_shard_of_an_unfinished_build_is_made_again(tmp_path: Path, harm: str) -> None:
    with pytest.raises(RuntimeError):
        build(tmp_path, Maker(fail_at=20))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    shard = folder / "shard-00001.safetensors"
    data = shard.read_bytes()
    if harm == "flip":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "truncate":
        shard.write_bytes(data[:-4])
    elif harm == "remove":
        shard.unlink()
    else:  # killed between the shard and the list
        lines = (folder / "partial.jsonl").read_text().splitlines(keepends=True)
        (folder / "partial.jsonl").write_text("".join(line for line in lines if shard.name not in line))
    again = Maker()
    entry = build(tmp_path, again)
    assert again.calls == [(5, 10), (20, 23)]
    assert shard.read_bytes() == data and entry.rows == 23


def test_an_unreadable_list_of_shards_costs_work_but_no_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build(tmp_path, Maker(fail_at=10))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "partial.json").write_text('{"shards": {"shard-00000.saf')
    again = Maker()
    build(tmp_path, again)
    assert len(again.calls) == 5


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_torn_last_line_of_the_journal_costs_one_shard(tmp_path: Path, kept: int) -> None:
    """Killed while it wrote a line: also a second kill, after lines that follow the torn one, loses nothing else."""
    with pytest.raises(RuntimeError):
        build(tmp_path, Maker(fail_at=10))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    journal = folder / "partial.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text(lines[0] + "\n" + lines[1][:kept])
    with pytest.raises(RuntimeError):
        build(tmp_path, second := Maker(fail_at=15))
    assert second.calls[:1] == [(5, 10)]
    build(tmp_path, third := Maker())
    assert third.calls == [(15, 20), (20, 23)]


def test_many_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    """300 shards, three tensors each: a process that may open 256 files reads them all, in order and at random."""
    import resource

    values = np.arange(900, dtype=np.float32)

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        return {name: values[begin:end, None] + shift for shift, name in enumerate("abc")}

    entry = cache.build(tmp_path, "many", {}, 900, make, run_id="r", label="many", per_shard=3)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        tables = [entry[name] for name in "abc"]
        wanted = np.random.default_rng(0).permutation(900)
        for shift, table in enumerate(tables):
            np.testing.assert_array_equal(table[:][:, 0], values + shift)
            np.testing.assert_array_equal(table[wanted][:, 0], values[wanted] + shift)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_verify_finds_damage_in_a_committed_entry_and_removal_heals_it(tmp_path: Path) -> None:
    entry = build(tmp_path, Maker())
    shard = entry.folder / "shard-00002.safetensors"
    data = shard.read_bytes()
    assert store.check_card(entry.folder) == []
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (problem,) = store.check_card(entry.folder)
    assert problem.path == shard and "damaged" in problem.reason
    shard.unlink()
    again = Maker()
    build(tmp_path, again)
    assert again.calls == [(10, 15)] and shard.read_bytes() == data
    assert store.check_card(entry.folder) == []


def test_another_spec_is_another_folder_and_the_old_one_is_left_alone(tmp_path: Path) -> None:
    old = build(tmp_path, Maker())
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    for spec in ({**SPEC, "code": 2}, {**SPEC, "encoder": {"name": "x", "weights": "124"}}):
        new = build(tmp_path, Maker(), spec=spec)
        assert new.folder != old.folder and new.spec == spec
    assert build(tmp_path, Maker(), items=24).folder != old.folder
    reordered = dict(reversed(list(SPEC.items())))
    assert build(tmp_path, Maker(), spec=reordered).folder == old.folder
    assert before == {path.name: path.read_bytes() for path in old.folder.iterdir()}


def test_items_may_be_refused_even_a_whole_shard_of_them(tmp_path: Path) -> None:
    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        kept = np.array([n for n in range(begin, end) if n % 2 == 0 and not 5 <= n < 10], np.int64)
        return {"item": kept, "x": np.ones((len(kept), 2, 2), np.uint8)}

    entry = build(tmp_path, make)
    assert entry["item"][:].tolist() == [0, 2, 4, 10, 12, 14, 16, 18, 20, 22]
    assert entry["x"][entry["item"][:] > 10].shape == (6, 2, 2)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="unequal numbers of rows"):
        build(tmp_path, lambda begin, end: {"a": np.zeros(5), "b": np.zeros(4)})
    with pytest.raises(ArchipelError, match="unequal"):
        build(tmp_path, lambda begin, end: {"a": np.zeros(())})
    with pytest.raises(ArchipelError, match="do not fit together"):
        build(tmp_path, lambda begin, end: {"a": np.zeros((end - begin, 1 + (begin > 5)))})
    with pytest.raises(ArchipelError, match="nothing to make"):
        build(tmp_path, Maker(), items=0)


def test_a_stop_keeps_whole_shards_and_the_next_build_continues(tmp_path: Path) -> None:
    stop, maker = StopFlag(), Maker()

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        if begin == 5:
            stop.signal = 2
        return dict(maker(begin, end))

    with pytest.raises(Stopped):
        build(tmp_path, make, stop=stop)
    assert maker.calls == [(0, 5), (5, 10)]
    again = Maker()
    assert build(tmp_path, again).rows == 23
    assert again.calls[0] == (10, 15)


def test_two_builders_of_one_entry_are_kept_apart(tmp_path: Path) -> None:
    refused: list[str] = []

    def make(begin: int, end: int) -> dict[str, np.ndarray]:
        with pytest.raises(LockedError, match="another process") as error:
            build(tmp_path, Maker())
        refused.append(str(error.value))
        return Maker()(begin, end)

    assert build(tmp_path, make).rows == 23
    assert len(refused) == 5


def test_index_names_entries_and_a_missing_kind_names_the_stage(tmp_path: Path) -> None:
    root = tmp_path / "run" / "cache"
    with pytest.raises(MissingStageError, match="archipel prepare"):
        cache.open_kind(root, "latents")
    entry = build(root, Maker())
    cache.set_index(root, {"latents": entry.folder.name})
    cache.set_index(root, {"text": "text-123"})
    assert np.array_equal(cache.open_kind(root, "latents")["odd"][:4], [False, True, False, True])
    with pytest.raises(MissingStageError, match="no finished text"):
        cache.open_kind(root, "text")
    (entry.folder / "shard-00001.safetensors").unlink()  # a stage that asks is sent back to prepare, which heals it
    with pytest.raises(MissingStageError, match="no finished latents"):
        cache.open_kind(root, "latents")
    store.write_json(root / "index.json", {"latents": "../elsewhere"})
    with pytest.raises(DamagedError, match=r"index\.json"):
        cache.open_kind(root, "latents")


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    for epoch in range(3):
        assert sorted(cache.order(7, epoch, 101)) == list(range(101))
    assert not np.array_equal(cache.order(7, 0, 101), cache.order(7, 1, 101))
    assert not np.array_equal(cache.order(7, 0, 101), cache.order(8, 0, 101))
    # Pinned: a run that is resumed with another numpy must see the same order.
    assert cache.order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(("batch", "n"), [(4, 10), (7, 10), (10, 10), (25, 10), (1, 1), (16, 240)])
def test_batches_are_the_endless_epochs_cut_up(batch: int, n: int) -> None:
    steps = 3 * n // batch + 4
    stream = np.concatenate([cache.batch_rows(3, step, batch, n) for step in range(steps)])
    epochs = np.concatenate([cache.order(3, epoch, n) for epoch in range(len(stream) // n + 1)])
    assert np.array_equal(stream, epochs[: len(stream)])


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        cache.order(0, 0, 0)
    for arguments in ((0, -1, 4, 10), (0, 0, 0, 10), (0, 0, 4, 0)):
        with pytest.raises(ValueError, match="batch_rows needs"):
            cache.batch_rows(*arguments)
