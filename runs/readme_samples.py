"""Sheets of generated clips for the README: the first prompts of a finished run, never chosen by eye.

    python runs/readme_samples.py RUN docs/samples/long

Writes <prefix>-seen.webp (training captions, new noise) and <prefix>-test.webp (captions of unseen content groups), the
archipelago's clips above the monolith's, and prints the captions in order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from archipel import store
from archipel.ensemble.video import write
from archipel.run import MONOLITH, Run

COLUMNS = 10
SIDE = 64
GAP = 4


def row_of(clips: np.ndarray) -> np.ndarray:
    """Clips uint8 (N, F, H, W, 3) side by side: (F, SIDE, N * (SIDE + GAP) - GAP, 3) on white."""
    n, frames = clips.shape[:2]
    sheet = np.full((frames, SIDE, n * (SIDE + GAP) - GAP, 3), 255, np.uint8)
    for column, clip in enumerate(clips):
        for frame, picture in enumerate(clip):
            large = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            left = column * (SIDE + GAP)
            sheet[frame, :, left : left + SIDE] = np.asarray(large)
    return sheet


def sheet(run: Run, split: str) -> tuple[np.ndarray, list[str]]:
    """The primary strategy's first clips of ``samples/<split>`` above the monolith's, and their captions."""
    folder = run.samples(split)
    captions = [prompt["caption"] for prompt in store.read_json(folder / "prompts.json")][:COLUMNS]
    arms = (run.config.sample.strategy, MONOLITH)
    rows = [row_of(store.map_tensors(folder / f"{arm}.safetensors")["clips"][: len(captions)]) for arm in arms]
    space = np.full((rows[0].shape[0], GAP, rows[0].shape[2], 3), 255, np.uint8)
    return np.concatenate([rows[0], space, rows[1]], axis=1), captions


def main(root: str, prefix: str) -> None:
    run = Run.open(root)
    for name, split in (("seen", "train"), ("test", run.config.evaluate.split)):
        made, captions = sheet(run, split)
        path = Path(f"{prefix}-{name}.webp")
        write(path, made, run.config.clips.fps, lossless=False)
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB): {', '.join(captions)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
