"""cd-fvd without torchvision, which it imports and its statistics and Frechet code never use."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import scipy.linalg

_STAND_INS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.datasets",
    "torchvision.datasets.video_utils",
)


@contextlib.contextmanager
def cdfvd() -> Iterator[Any]:
    """The module ``cdfvd.fvd``; all that importing it did to ``sys.modules`` is undone afterwards."""
    before = dict(sys.modules)
    sqrtm = scipy.linalg.sqrtm
    try:
        for name in _STAND_INS:
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
        sys.modules["torchvision.datasets.video_utils"].VideoClips = object  # type: ignore[attr-defined]
        for name in [name for name in sys.modules if name.partition(".")[0] == "cdfvd"]:
            del sys.modules[name]
        if "disp" not in inspect.signature(sqrtm).parameters:  # gone with SciPy 1.18; cd-fvd passes disp=False
            scipy.linalg.sqrtm = lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield importlib.import_module("cdfvd.fvd")
    finally:
        scipy.linalg.sqrtm = sqrtm
        for name in [*_STAND_INS, *(name for name in sys.modules if name.partition(".")[0] == "cdfvd")]:
            sys.modules.pop(name, None)
        sys.modules.update(before)
