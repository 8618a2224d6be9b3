"""What a killed upload leaves in a folder is found and removed, and nothing else is."""

from __future__ import annotations

import os

from archipel.islands import gc, keys
from archipel.islands.bucket import Bucket
from archipel.progress import StopFlag


def test_torn_uploads_of_a_folder_go_after_the_grace_time(bucket: Bucket) -> None:
    root = bucket.objects.root
    assert root is not None
    folder = root / keys.checkpoint("0", 1, 5)
    folder.mkdir(parents=True)
    old, young, link = folder / "state.safetensors#1", folder / "state.safetensors#2", folder / "state.safetensors#3"
    for path in (old, young):
        path.write_bytes(b"x" * 1000)
    os.utime(old, (1.0, 1.0))
    link.symlink_to("/etc/hostname")
    found = gc.find(bucket, grace=60.0)
    assert [entry.key for entry in found.torn] == [f"{keys.checkpoint('0', 1, 5)}/state.safetensors#1"]
    assert found.size == 1000 and found.young == 1 and not found.entries
    with StopFlag() as stop:
        gc.collect(bucket, found, stop)
    assert not old.exists() and young.exists() and link.is_symlink()
