"""What nodes run in the tests: found by name, as the stages' own functions are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from archipel.errors import ArchipelError
from archipel.spread import Arrays


def multiply(root: Path, given: Arrays) -> Arrays:
    factor = int((root / "sub" / "factor").read_text())
    return {**given, "number": given["number"] * factor, "threads": np.array([int(os.environ["OMP_NUM_THREADS"])])}


def refuse(root: Path, given: Arrays) -> Arrays:
    if given["number"][0] == 7:
        raise ArchipelError("clip 7 is damaged")
    return given


def divide(root: Path, given: Arrays) -> Arrays:
    return {"number": np.array([1 // int(given["number"][0])])}
