from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archipel.config import Clips
from archipel.data import count_items, open_source
from archipel.data.base import Rejected, Window
from archipel.data.folder import Folder
from archipel.errors import ArchipelError

WINDOW = Window(4, 8.0, 0.0, 16, "center", (255, 255, 255))


def test_every_format_with_its_sidecar(
    tmp_path: Path,
    make_video: Callable[..., bytes],
    make_loop: Callable[..., bytes],
    read_numbers: Callable[[np.ndarray], list[int]],
) -> None:
    for name in ("a.mp4", "b.webm", "sub/c.MOV"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_video(24, container=path.suffix.lower()[1:]))
    for name in ("d.gif", "e.webp", "f.png"):
        (tmp_path / name).write_bytes(make_loop(8, kind=name[2:], milliseconds=125))
    for path in list(tmp_path.rglob("*")):
        if path.is_file():
            path.with_suffix(".txt").write_text(f"  clip\n{path.stem} ")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    (tmp_path / "notes.md").write_text("not a clip")

    source = open_source(Clips(source="folder", path=str(tmp_path)), 0)
    items = source.items()
    assert [item.key for item in items] == ["a.mp4", "b.webm", "d.gif", "e.webp", "f.png", "sub/c.MOV"]
    assert [item.caption for item in items] == [f"clip {letter}" for letter in "abdefc"]
    assert len({item.group for item in items}) == 6
    for item in items:
        step = 3 if item.key[0] in "abs" else 1
        assert read_numbers(source.decode(item, source.read(item), WINDOW)) == [0, step, 2 * step, 3 * step]
    assert count_items(Clips(source="folder", path=str(tmp_path))) == 6
    assert count_items(Clips(source="folder", path=str(tmp_path), count=4)) == 4
    assert str(tmp_path) not in json.dumps(source.provenance())


def test_sidecars_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("latin", "missing", "empty", "bom", "nul", "long"):
        (tmp_path / f"{name}.gif").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b" \n\t")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfgood")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "long.txt").write_bytes(b"a" * 100_000)
    found = {item.key[:-4]: item for item in Folder(str(tmp_path)).items()}
    assert found["bom"].caption == "good" and found["bom"].error is None
    assert found["empty"].caption is None and found["empty"].error is None
    assert {name: item.error for name, item in found.items() if item.error} == {
        "latin": "undecodable text: the caption is not UTF-8 (byte 3)",
        "missing": "no caption: missing.txt is missing",
        "nul": "undecodable text: the caption holds NUL bytes",
        "long": "undecodable text: the caption is longer than 64 KiB",
    }


def _write_table(folder: Path, kind: str, rows: list[dict[str, object]]) -> None:
    if kind == "csv":
        columns = list(rows[0])
        lines = [",".join(columns)] + [",".join(f'"{row.get(c) or ""}"' for c in columns) for row in rows]
        (folder / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    elif kind == "jsonl":
        (folder / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_name_clips_captions_groups_and_splits(kind: str, tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(b"1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two.mp4").write_bytes(b"2")
    (tmp_path / "unlisted.mp4").write_bytes(b"3")
    _write_table(
        tmp_path,
        kind,
        [
            {"file": "in/two.mp4", "caption": 'a dog, "running"'.replace('"', ""), "group": "dogs", "split": "val"},
            {"file": "./one.mp4", "caption": "a cat", "group": None, "split": None},
            {"file": "in/two.mp4", "caption": "again", "group": None, "split": None},
            {"file": "gone.mp4", "caption": "not there", "group": None, "split": None},
            {"file": "x.mp4", "caption": "odd split", "group": None, "split": "sometimes"},
            {"file": "", "caption": "no file", "group": None, "split": None},
        ],
    )
    source = Folder(str(tmp_path))
    items = source.items()
    assert [(i.caption, i.group, i.split) for i in items[:2]] == [
        ("a dog, running", "dogs", "validation"),
        ("a cat", "one.mp4", None),
    ]
    assert source.read(items[0]) == b"2"
    assert items[2].error == "duplicate: in/two.mp4 has a row already"
    with pytest.raises(Rejected, match=r"^missing: there is no such file$"):
        source.read(items[3])
    assert items[4].error == "unknown split: 'sometimes' is not train, validation or test"
    assert items[5].error == "no file: the cell is empty or not text"
    assert len({item.key for item in items}) == 6
    assert source.count() == 6


def test_broken_rows_of_a_table_spoil_nothing_but_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"file,caption\n1.mp4,good\n2.mp4,caf\xe9\n3.mp4,fine\n")
    items = Folder(str(tmp_path)).items()
    assert [(i.key, i.caption, i.error) for i in items] == [
        ("1.mp4", "good", None),
        ("2.mp4", None, "undecodable text: the caption is not UTF-8"),
        ("3.mp4", "fine", None),
    ]
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.jsonl").write_bytes(
        b'{"file": "1.mp4", "caption": "good"}\n{"file": "2.mp4", "capt\n[1]\n{"file": "4.mp4", "caption": "\\ud800"}\n'
        b'{"file": "5.mp4", "caption": 7}\n{"file": "6.mp4", "caption": "\xff"}\n{"caption": "no file"}\n'
    )
    assert [item.error for item in Folder(str(tmp_path)).items()] == [
        None,
        "undecodable text: the row is not JSON",
        "undecodable text: the row is not a JSON object",
        "undecodable text: the caption holds lone surrogates",
        "undecodable text: the caption is int, not text",
        "undecodable text: the row is not UTF-8 (byte 30)",
        "no file: the cell is empty or not text",
    ]


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/../../secret.txt", "C:\\secret.mp4", "..\\x.mp4"])
def test_a_table_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"file": name, "caption": "mine"}) + "\n")
    with pytest.raises(ArchipelError, match=r"row 1: file .* leads out of the folder"):
        Folder(str(tmp_path)).items()


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.mp4").symlink_to(tmp_path / "secret")
    (data / "a.txt").write_text("clip a")
    (data / "b.mp4").write_bytes(b"b")
    (data / "b.txt").symlink_to(tmp_path / "secret")
    (data / "c.mp4").write_bytes(b"c")
    (data / "c.txt").symlink_to(data / "a.txt")  # within the folder: fine
    source = Folder(str(data))
    a, b, c = source.items()
    with pytest.raises(Rejected, match=r"^outside the folder: "):
        source.read(a)
    assert b.caption is None and str(b.error).startswith("outside the folder: ")
    assert c.caption == "clip a"


def test_what_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="there is no such folder"):
        count_items(Clips(source="folder", path=str(tmp_path / "nowhere")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchipelError, match="is a file"):
        count_items(Clips(source="folder", path=str(tmp_path / "file")))
    with pytest.raises(ArchipelError, match="a command or a remote address"):
        count_items(Clips(source="folder", path="s3://bucket/clips"))
    (tmp_path / "a.csv").write_text("name,text\n")
    with pytest.raises(ArchipelError, match=r"no column file and no column caption \(it has name, text\)"):
        Folder(str(tmp_path)).items()
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ArchipelError, match=r"several tables \(a\.csv, b\.jsonl\)"):
        Folder(str(tmp_path))
    (tmp_path / "a.csv").unlink()
    (tmp_path / "b.jsonl").rename(tmp_path / "b.parquet")
    with pytest.raises(ArchipelError, match="not a readable parquet"):
        Folder(str(tmp_path)).items()
