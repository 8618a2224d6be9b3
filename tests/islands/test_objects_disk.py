"""A folder as a store: links, folders that cannot be written, full disks, a mount that goes away; URLs that are refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipel.errors import ArchipelError, DamagedError, Stopped
from archipel.islands.objects import AwayError, Objects, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def opened(folder: Path, patience: float = 5.0) -> Objects:
    return Objects.open(folder, patience=patience)


@pytest.mark.parametrize("where", ["jobs/2/a.json", "jobs/2", "jobs"])
def test_links_are_refused_wherever_they_stand(folder: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    (outside / "2").mkdir(parents=True)
    (outside / "2" / "a.json").write_text("secret of the host")
    (outside / "a.json").write_text("secret of the host")
    link = folder / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to({"jobs/2/a.json": outside / "a.json", "jobs/2": outside / "2", "jobs": outside}[where])
    objects = opened(folder)
    for call in (
        lambda: objects.get("jobs/2/a.json"),
        lambda: objects.put("jobs/2/a.json", b"!"),
        lambda: objects.create("jobs/2/a.json", b"!"),
        lambda: objects.remove(["jobs/2/a.json"]),
        lambda: objects.fetch("jobs/2/a.json", tmp_path / "got", sha256="0" * 64, size=18),
    ):
        with pytest.raises(DamagedError, match="is a link"):
            call()
    assert (outside / "a.json").read_text() == "secret of the host"
    assert not (tmp_path / "got").exists()


def test_a_link_to_nothing_and_a_loop_are_no_endless_wait(folder: Path) -> None:
    (folder / "jobs").mkdir()
    (folder / "jobs" / "a.json").write_bytes(b"1")
    (folder / "jobs" / "to-nothing").symlink_to(folder / "none")
    (folder / "jobs" / "loop").symlink_to(folder / "jobs")
    objects = opened(folder)
    keys = [entry.key for entry in objects.list("jobs")]
    assert "jobs/a.json" in keys and not any("loop" in key for key in keys)


def test_a_claim_killed_in_the_middle_of_writing_is_no_claim(folder: Path) -> None:
    """The disk's client writes aside (`name#1`) and renames: what a killed one leaves is neither listed nor in the way."""
    (folder / "claims").mkdir()
    (folder / "claims" / "00000001.json#1").write_bytes(b"half a cla")
    objects = opened(folder)
    assert objects.list("claims") == []
    assert objects.create("claims/00000001.json", b"whole")
    assert objects.get("claims/00000001.json") == b"whole"


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder with one object that this process, root or not, may read and not write."""
    place = Path(tempfile.mkdtemp(prefix="archipel-test-"))
    (place / "held.json").write_bytes(b"held")
    place.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield place
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_folder_that_may_not_be_written(unwritable: Path) -> None:
    objects = opened(unwritable, patience=600.0)
    assert objects.get("held.json") == b"held"
    assert objects.now() is None
    for call in (lambda: objects.put("a", b"1"), lambda: objects.create("a", b"1"), objects.probe):
        with pytest.raises((StoreError, OSError)) as caught:
            call()
        error = caught.value
        assert "a" in str(error) and (isinstance(error, StoreError) or error.errno in (errno.EACCES, errno.EPERM))


@pytest.mark.system
def test_a_full_disk_and_a_disk_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        objects = opened(disk, patience=600.0)
        objects.put("small", b"1")
        for call in (lambda: objects.put("large", b"1" * (2 << 20)), lambda: objects.create("made", b"1" * (2 << 20))):
            with pytest.raises(OSError) as full:
                call()
            assert full.value.errno == errno.ENOSPC and str(disk) in str(full.value.filename)
        assert [path.name for path in disk.iterdir()] == ["small"], "what did not fit leaves nothing behind"
        objects.put("small", b"2")
        source = tmp_path / "store"
        source.mkdir()
        other = opened(source)
        other.put("model", b"1" * (2 << 20))
        with pytest.raises(OSError) as full:
            other.fetch("model", disk / "down", sha256="0" * 64, size=2 << 20)
        assert full.value.errno == errno.ENOSPC
        assert not (disk / "down").exists()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError) as read_only:
            objects.put("small", b"3")
        assert read_only.value.errno == errno.EROFS
        assert objects.get("small") == b"2"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_mount_that_goes_away_is_waited_for_and_never_taken_for_an_empty_store(folder: Path) -> None:
    objects = opened(folder, patience=60.0)
    objects.put("jobs/2/claims/00000001.json", b"theirs")
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir()  # the empty folder under a mount
    impatient = opened(folder, patience=0.3)
    impatient._folder = objects._folder
    with pytest.raises(AwayError, match="not there any more, or is another one"):
        impatient.create("jobs/2/claims/00000001.json", b"mine")
    assert list(folder.iterdir()) == []
    back = threading.Timer(1.0, lambda: (folder.rmdir(), away.rename(folder)))
    back.start()
    assert objects.create("jobs/2/claims/00000001.json", b"mine") is False
    back.join()


def test_a_wait_ends_when_asked(folder: Path) -> None:
    objects = opened(folder, patience=600.0)
    folder.rmdir()
    objects.give_up = lambda: True
    began = time.monotonic()
    with pytest.raises(Stopped, match="everything is kept"):
        objects.get("a")
    assert time.monotonic() - began < 60


def test_a_file_where_a_folder_should_be(folder: Path) -> None:
    (folder / "jobs").write_bytes(b"a file")
    objects = opened(folder, patience=600.0)
    for call in (lambda: objects.put("jobs/2", b""), lambda: objects.create("jobs/2", b"")):
        with pytest.raises((StoreError, OSError)):
            call()
    with pytest.raises(ArchipelError, match="there is no folder"):
        Objects.open(folder / "jobs")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/x", "carries credentials"),
        ("s3://bucket/x?X-Amz-Signature=abcdef0123", "carries credentials"),
        ("az://container/x?sv=2022&sig=c2lnbmF0dXJl", "carries credentials"),
        ("gs://bucket/x#token=ya29.secret", "carries credentials"),
        ("https://user:hunter2@host/x", "carries credentials"),
        ("https://bucket.s3.amazonaws.com/x", "is no store"),
        ("ftp://bucket/x", "is no store"),
        ("S3:///x", "names no bucket"),
        ("s3://", "names no bucket"),
        ("file://host/x", "three slashes"),
        ("file://relative", "three slashes"),
    ],
)
def test_urls_that_are_refused_do_not_come_back_in_messages(url: str, says: str, no_clouds: None) -> None:
    with pytest.raises(ArchipelError, match=says) as caught:
        Objects.open(url)
    for secret in ("AKIA", "wJalr", "abcdef", "c2lnb", "ya29", "hunter2"):
        assert secret not in str(caught.value)


def test_a_folder_is_named_in_all_the_usual_ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    spaced = folder.parent / "a b"
    spaced.mkdir()
    for name in (str(folder), f"file://{folder}", f"file://{folder}/", "store", "./store", "~/store"):
        Objects.open(name).put("a", name.encode())
        assert (folder / "a").read_bytes() == name.encode()
    Objects.open(f"file://{folder.parent}/a%20b").put("a", b"1")
    assert (spaced / "a").read_bytes() == b"1"
