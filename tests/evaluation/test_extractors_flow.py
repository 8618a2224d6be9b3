"""What judges are called, the packaged ones, and optical flow against shifts that are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from archipel.config import Evaluate
from archipel.encoders.features import NAMES, extract
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import Judges
from archipel.evaluation.extractors.flow import optical_flow

JUDGE = Evaluate(frames=4, image_size=64)


def shifted(dx: float, dy: float = 0.0, size: int = 64, frames: int = 6, seed: int = 0) -> np.ndarray:
    """uint8 (frames, size, size, 3): a window that walks over a smooth random texture by (dx, dy) px per frame."""
    noise = np.random.default_rng(seed).normal(size=(size + 80, size + 80)).astype(np.float32)
    texture = cv2.GaussianBlur(noise, (0, 0), 2.0)
    texture = (texture - texture.min()) / (texture.max() - texture.min()) * 255
    seen = []
    for frame in range(frames):
        move = np.array([[1, 0, -20 - dx * frame], [0, 1, -20 - dy * frame]], np.float32)
        grey = cv2.warpAffine(texture, move, (size, size), flags=cv2.INTER_CUBIC)
        seen.append(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
    return np.stack(seen)


@pytest.mark.parametrize(("dx", "dy"), [(0.5, 0.0), (1.5, 0.0), (0.0, 1.5), (3.0, 0.0), (-1.2, 1.6)])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_flow_measures_a_known_shift_in_pixels_per_frame(dx: float, dy: float, size: int) -> None:
    assert optical_flow(shifted(dx, dy, size)[None])[0] == pytest.approx(np.hypot(dx, dy), rel=0.01)


def test_flow_of_still_clips_single_frames_and_flat_ones_is_zero() -> None:
    assert optical_flow(shifted(0.0)[None])[0] < 1e-3
    assert optical_flow(shifted(1.5, frames=1)[None])[0] == 0
    assert optical_flow(np.full((1, 4, 32, 32, 3), 200, np.uint8))[0] < 1e-3


def test_flow_is_of_each_clip_alone_and_leaves_opencvs_threads_as_they_were() -> None:
    clips = np.stack([shifted(speed, seed=number) for number, speed in enumerate((0.0, 1.0, 2.0))])
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        whole = optical_flow(clips)
        assert cv2.getNumThreads() == 2
        cv2.setNumThreads(1)
        assert np.array_equal(whole, [optical_flow(clip[None])[0] for clip in clips])
    finally:
        cv2.setNumThreads(before)
    assert np.argsort(whole).tolist() == [0, 1, 2]
    assert np.allclose(optical_flow(clips[:, ::-1]), whole, rtol=0.03, atol=1e-3)  # backwards is as fast


def test_flow_of_frames_that_are_not_square_or_tiny() -> None:
    wide = shifted(1.5, size=96)[:, :48]
    assert optical_flow(wide[None])[0] == pytest.approx(1.5, rel=0.03)
    assert optical_flow(shifted(1.0, size=16)[None])[0] == pytest.approx(1.0, rel=0.1)
    with pytest.raises(ArchipelError, match="at least 16x16 pixels, not 8x8"):
        optical_flow(np.zeros((1, 4, 8, 8, 3), np.uint8))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ArchipelError, match=r"archipel\[eval\]"):
        Judges.open(["flow"], JUDGE)


def test_packaged_judges_give_the_features_of_evaluate() -> None:
    clips = np.stack([shifted(speed, size=32, frames=8, seed=3) for speed in np.linspace(0, 2, 17)])
    judges = Judges.open((), JUDGE)
    assert judges.features == list(NAMES) and judges.scalars == ["flow"] and not judges.needs_captions
    found = judges.measure(clips)
    for name, values in extract(NAMES, clips, JUDGE).items():
        assert found.features[name].dtype == np.float32 and np.array_equal(found.features[name], values.numpy())
    assert found.scalars["flow"].dtype == np.float64 and np.array_equal(found.scalars["flow"], optical_flow(clips))
    assert list(judges.identity) == [*NAMES, "flow"] and json.loads(json.dumps(judges.identity)) == judges.identity
    keys = {"weights", "layer", "resize", "frames", "code", "metric"}
    assert all(keys <= set(facts) for facts in judges.identity.values())
    assert judges.identity["flow"]["unit"] == "px/frame"
    assert not any(facts["metric"] in ("FVD", "CLIP") for facts in judges.identity.values())


def test_names_keep_their_order_and_one_network_is_not_all() -> None:
    judges = Judges.open(["transnet", "flow", "efficientnet-motion"], JUDGE)
    assert judges.features == ["transnet", "efficientnet-motion"]
    assert set(judges.measure(shifted(1.0, size=32)[None]).features) == {"transnet", "efficientnet-motion"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("efficientnet-apearance", "did you mean efficientnet-appearance"),
        ("I3D", "did you mean i3d|There are"),
        ("videomea=/x", "did you mean videomae"),
        ("zzz", r"'zzz' is not an extractor\. There are .*dinov2"),
        ("", "is not an extractor"),
        ("flow=/x", "takes no path"),
        ("clip", "write clip=FOLDER"),
        ("clip=", "write clip=FOLDER"),
        ("dinov2=https://example.org/x", "addresses are refused"),
        ("i3d=/x.pt@sha256:12ab", "64 hex digits"),
        ("dinov2=./none", "no such folder"),
    ],
)
def test_specs_that_are_refused(spec: str, said: str) -> None:
    with pytest.raises(ArchipelError, match=said):
        Judges.open([spec], JUDGE)


def test_a_name_twice_and_clips_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="flow is given twice"):
        Judges.open(["flow", "transnet", "flow"], JUDGE)
    judges = Judges.open(["flow"], JUDGE)
    for wrong in (
        np.zeros((1, 4, 32, 32, 3), np.float32),
        np.zeros((4, 32, 32, 3), np.uint8),
        np.zeros((0, 4, 32, 32, 3), np.uint8),
    ):
        with pytest.raises(ArchipelError, match="clips must be uint8"):
            judges.measure(wrong)
    with pytest.raises(ArchipelError, match="as many captions, not 1"):
        judges.measure(np.zeros((2, 4, 32, 32, 3), np.uint8), ["one"])
