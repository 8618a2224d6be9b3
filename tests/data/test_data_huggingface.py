from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archipel.config import Clips
from archipel.data import count_items, huggingface, open_source
from archipel.data.base import Rejected, Window
from archipel.errors import ArchipelError, DamagedError

WINDOW = Window(3, 10.0, 0.0, 16, "center", (255, 255, 255))


def clips_at(path: Path | str, **more: Any) -> Clips:
    return Clips(source="huggingface", path=str(path), **more)


@pytest.mark.parametrize("raw", [False, True])
def test_a_folder_saved_by_datasets(
    raw: bool, tmp_path: Path, make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    import datasets

    data = [make_loop(4), make_loop(6), make_loop(5)]
    videos = data if raw else [{"bytes": d, "path": "clip.webp"} for d in data]
    table = {"video": videos, "caption": ["one", "two", None], "group": ["g", "g", "h"]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "saved"))
    source = open_source(clips_at(tmp_path / "saved"), 0)
    items = source.items()
    assert [(i.key, i.caption, i.group, i.split) for i in items] == [
        ("rows/0000000", "one", "g", None),
        ("rows/0000001", "two", "g", None),
        ("rows/0000002", None, "h", None),
    ]
    assert [source.read(item) for item in items] == data
    assert read_numbers(source.decode(items[1], source.read(items[1]), WINDOW)) == [0, 1, 2]
    assert str(tmp_path) not in json.dumps(source.provenance())


def test_splits_of_a_saved_dictionary_are_kept(tmp_path: Path) -> None:
    import datasets

    parts = {
        name: datasets.Dataset.from_dict({"clip": [name.encode()], "text": [f"about {name}"]})
        for name in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = open_source(clips_at(tmp_path / "saved", video_column="clip", caption_column="text"), 0)
    items = source.items()
    assert [(i.key, i.split) for i in items] == [
        ("train/0000000", "train"), ("validation/0000000", "validation"), ("test/0000000", "test"),
    ]  # fmt: skip
    assert [source.read(item) for item in items] == [b"train", b"validation", b"test"]


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    rows = [{"video": {"bytes": bytes([n]) * 9, "path": None}, "caption": f"clip {n}"} for n in range(7)]
    pq.write_table(pa.Table.from_pylist(rows[:5]), tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[5:]), tmp_path / "test-00000-of-00001.parquet")
    source = open_source(clips_at(tmp_path), 0)
    items = source.items()
    assert [(i.key, i.caption, i.split) for i in items] == [
        *[(f"test/{n:07d}", f"clip {n + 5}", "test") for n in range(2)],
        *[(f"train/{n:07d}", f"clip {n}", "train") for n in range(5)],
    ]
    for item in reversed(items):
        assert item.caption is not None
        assert source.read(item) == bytes([int(item.caption[-1])]) * 9


def test_cells_that_name_files_stay_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.mp4").write_bytes(b"inside")
    names = [
        "a.mp4",
        "../secret",
        str(tmp_path / "secret"),
        "https://example.org/a.mp4",
        "pipe:cat /etc/passwd",
        "b.mp4",
    ]
    rows = [{"video": {"bytes": None, "path": name}, "caption": "c"} for name in names]
    rows.append({"video": None, "caption": "c"})
    pq.write_table(pa.Table.from_pylist(rows), data / "x.parquet")
    source = open_source(clips_at(data), 0)
    items = source.items()
    assert source.read(items[0]) == b"inside"
    reasons = []
    for item in items[1:]:
        with pytest.raises(Rejected) as caught:
            source.read(item)
        reasons.append(caught.value.reason.partition(":")[0])
    assert reasons == ["outside the data set"] * 4 + ["missing", "no frames"]


def test_state_files_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}))
    with pytest.raises(ArchipelError, match="names a file outside its folder"):
        open_source(clips_at(tmp_path / "a"), 0).items()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dataset_dict.json").write_text(json.dumps({"splits": ["../a"]}))
    with pytest.raises(ArchipelError, match="names a split outside its folder"):
        open_source(clips_at(tmp_path / "b"), 0).items()
    (tmp_path / "a" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    (tmp_path / "a" / "x.arrow").write_bytes(b"not arrow")
    with pytest.raises(DamagedError, match="not a readable Arrow file"):
        open_source(clips_at(tmp_path / "a"), 0).items()


def test_wrong_columns_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="holds no data set"):
        open_source(clips_at(tmp_path), 0).items()
    pq.write_table(pa.table({"clip": [b""], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ArchipelError, match=r"clips\.video_column = 'video' is not a column .*: it has clip, caption"):
        open_source(clips_at(tmp_path), 0).items()
    for path in ("pipe:echo", "https://huggingface.example/x", "../../nowhere", "a/b/c"):
        with pytest.raises(ArchipelError, match=r"^clips\.path = "):
            count_items(clips_at(path))


def test_the_hub_is_asked_without_remote_code_and_without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        part = datasets.Dataset.from_dict({"video": [b"1", b"2"], "caption": ["one", "two"]})
        return datasets.DatasetDict({"train": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    source = open_source(clips_at("somebody/clips@v1"), 0)
    items = source.items()
    assert [(i.caption, i.split, source.read(i)) for i in items] == [("one", None, b"1"), ("two", None, b"2")]
    assert asked["path"] == "somebody/clips" and asked["revision"] == "v1"
    assert not asked.get("trust_remote_code", False)
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY is True
    assert huggingface.os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] == "0"
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is False
    assert source.provenance()["hub"] == "somebody/clips@v1"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the hub"), r"no network: .*`--source shapes`"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "a data set with code of its own"),
        (ValueError("the data set is broken\nin many ways"), "cannot be loaded: ValueError: the data set is broken$"),
    ],
)
def test_failures_of_the_hub_are_explained(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ArchipelError, match=words):
        open_source(clips_at("somebody/clips"), 0).items()
