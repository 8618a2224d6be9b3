from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archipel.config import Clips
from archipel.data import count_items, open_source
from archipel.data.base import Rejected, Window
from archipel.data.webdataset import WebDataset, expand
from archipel.errors import ArchipelError

WINDOW = Window(3, 10.0, 0.0, 16, "center", (255, 255, 255))


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_are_members_that_share_a_stem(
    tmp_path: Path, make_loop: Callable[..., bytes], read_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    webp, gif = make_loop(6), make_loop(6, kind="gif")
    write_tar(
        tmp_path / "shard-000.tar",
        [
            ("./0001.webp", webp),
            ("./0001.txt", b"first"),
            ("a/0002.json", json.dumps({"caption": "second", "group": "g", "split": "test"}).encode()),
            ("a/0002.gif", gif),
            ("0003.cls", b"7"),  # no clip: no sample
            ("0004.webp", webp),
        ],
    )
    write_tar(tmp_path / "shard-001.tgz", [("0001.txt", b"caf\xe9"), ("0001.webp", webp)], "w:gz")
    source = open_source(Clips(source="webdataset", path=str(tmp_path)), 0)
    items = source.items()
    assert [(i.key, i.caption, i.group, i.split, i.error) for i in items] == [
        ("shard-000.tar/0001.webp", "first", "shard-000.tar/0001.webp", None, None),
        ("shard-000.tar/a/0002.gif", "second", "g", "test", None),
        ("shard-000.tar/0004.webp", None, "shard-000.tar/0004.webp", None, None),
        (
            "shard-001.tgz/0001.webp", None, "shard-001.tgz/0001.webp", None,
            "undecodable text: the caption is not UTF-8 (byte 3)",
        ),
    ]  # fmt: skip
    for item in (items[3], items[0], items[1]):  # in any order
        assert read_numbers(source.decode(item, source.read(item), WINDOW)) == [0, 1, 2]


def test_patterns(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s-{number:03d}.tar", [])
    names = [f"s-{number:03d}.tar" for number in range(4)]
    assert [p.name for p in expand(str(tmp_path / "s-{000..003}.tar"))] == names
    assert [p.name for p in expand(str(tmp_path / "s-{001..002}.tar"))] == names[1:3]
    assert [p.name for p in expand(str(tmp_path / "s-*.tar"))] == names
    assert [p.name for p in expand(str(tmp_path))] == names
    assert [p.name for p in expand(str(tmp_path / "s-002.tar"))] == names[2:3]
    with pytest.raises(ArchipelError, match=r"there is no file .*s-004\.tar \(and 5 more are missing\)"):
        expand(str(tmp_path / "s-{000..009}.tar"))
    with pytest.raises(ArchipelError, match="at most 100000 tars"):
        expand(str(tmp_path / "s-{0..999999999}.tar"))
    with pytest.raises(ArchipelError, match="no file has such a name"):
        expand(str(tmp_path / "t-*.tar"))


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch {}/ran", "pipe:curl https://example.org/a.tar", "https://example.org/{{000..001}}.tar",
        "s3://bucket/a.tar", "gs://bucket/a.tar", "file:{}/a.tar", "a.tar::pipe:touch {}/ran", "PIPE:touch {}/ran",
    ],
)  # fmt: skip
def test_commands_and_addresses_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="a command or a remote address: it is refused"):
        count_items(Clips(source="webdataset", path=path.format(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("../../evil.webp", tarfile.REGTYPE, "a name that leads out of the archive"),
        ("/etc/evil.webp", tarfile.REGTYPE, "a name that leads out of the archive"),
        ("a/../../evil.webp", tarfile.REGTYPE, "a name that leads out of the archive"),
        ("evil.webp", tarfile.SYMTYPE, "a link"),
        ("evil.webp", tarfile.LNKTYPE, "a link"),
        ("evil.webp", tarfile.CHRTYPE, "a device or another special file"),
        ("evil.webp", tarfile.FIFOTYPE, "a device or another special file"),
    ],
)
def test_hostile_members_are_refused(name: str, kind: bytes, words: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("good.webp", b"x"), ("good.txt", b"good")])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ArchipelError, match=words) as caught:
        WebDataset(str(path)).items()
    assert "evil.webp" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_breaks_off_keeps_what_came_before(packed: bool, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    noise = [rng.bytes(20_000) for _ in range(4)]
    members = [m for n, d in enumerate(noise) for m in ((f"{n}.txt", b"caption"), (f"{n}.webp", d))]
    path = write_tar(tmp_path / ("a.tgz" if packed else "a.tar"), members, "w:gz" if packed else "w")
    path.write_bytes(path.read_bytes()[:55_000])
    source = WebDataset(str(path))
    items = source.items()
    whole = [item for item in items if item.error is None]
    assert len(whole) == 2
    assert [source.read(item) for item in whole] == noise[:2]
    assert [item.error for item in items[2:]] == ["truncated: the tar ends inside this sample"]


def test_json_captions_that_cannot_be_used(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b'{"caption": 3}', b'{"caption": "\\udfff"}', b"\xff", b'{"text": "good"}', b"{}"]
    members = [m for n, d in enumerate(bad) for m in ((f"{n}.webp", b"x"), (f"{n}.json", d))]
    items = WebDataset(str(write_tar(tmp_path / "a.tar", members))).items()
    assert [(item.caption, item.error and item.error.partition(":")[0]) for item in items] == [
        *[(None, "undecodable text")] * 5,
        ("good", None),
        (None, None),
    ]


def test_a_member_is_never_read_beyond_the_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"caption"), ("a.webp", b"x" * 300_000)])
    source = WebDataset(str(path))
    item = source.items()[0]
    path.write_bytes(path.read_bytes()[:100_000])  # cut after it was listed
    with pytest.raises(Rejected, match=r"^truncated: "):
        source.read(item)
