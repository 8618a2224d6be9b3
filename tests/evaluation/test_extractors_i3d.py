"""FVD's TorchScript file: never loaded by accident, called as everywhere, and fed as cd-fvd feeds its own I3D."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archipel import store
from archipel.config import Evaluate
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import Judges

JUDGE = Evaluate()


class Tiny(nn.Module):
    """The call of i3d_torchscript.pt: resizes and rescales on request, 400 numbers per video."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 8, 8), stride=(1, 8, 8))
        self.out = nn.Linear(4, width)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        B, C, T, H, W = x.shape
        if resize:
            images = F.interpolate(
                x.transpose(1, 2).reshape(B * T, C, H, W), size=(224, 224), mode="bilinear", align_corners=False
            )
            x = images.reshape(B, T, C, 224, 224).transpose(1, 2)
        if rescale:
            x = 2.0 * x / 255.0 - 1
        values: Tensor = self.out(torch.relu(self.conv(x)).mean((2, 3, 4)))
        if not return_features:
            values = values.softmax(1)
        return values


class Wrapped(nn.Module):
    """A network that takes scaled videos of 224x224, behind the same call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        B, C, T, H, W = x.shape
        if resize:
            images = F.interpolate(
                x.transpose(1, 2).reshape(B * T, C, H, W), size=(224, 224), mode="bilinear", align_corners=False
            )
            x = images.reshape(B, T, C, 224, 224).transpose(1, 2)
        if rescale:
            x = 2.0 * x / 255.0 - 1
        found: Tensor = self.network(x)
        return found


def save(path: Path, width: int = 400) -> str:
    """A TorchScript file at ``path``; its sha256."""
    torch.manual_seed(0)
    torch.jit.script(Tiny(width).eval()).save(str(path))
    return store.sha256_file(path)


def some_clips(n: int, frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (n, frames, 20, 28, 3), dtype=np.uint8)


def open_i3d(path: Path, digest: str) -> Judges:
    return Judges.open([f"i3d={path}@sha256:{digest}"], JUDGE, allow_torchscript=True, device="cpu")


@torch.no_grad()
def test_features_are_the_files_own_of_bytes_in_0_to_255(tmp_path: Path) -> None:
    digest = save(tmp_path / "i3d.pt")
    judges = open_i3d(tmp_path / "i3d.pt", digest)
    clips = some_clips(9, 10)  # two batches
    found = judges.measure(clips).features["i3d"]
    torch.manual_seed(0)
    network = Tiny(400).eval()
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float()
    assert found.shape == (9, 400) and found.dtype == np.float32
    assert np.allclose(found, network(videos, True, True, True), atol=1e-6)
    assert np.array_equal(found, judges.measure(clips).features["i3d"])  # the first call is as every other
    facts = judges.identity["i3d"]
    assert facts["metric"] == "FVD" and facts["weights"] == digest and facts["resize"] == 224


def test_a_torchscript_file_is_loaded_only_when_allowed_and_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "i3d.pt"
    digest = save(path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded before it was checked")

    monkeypatch.setattr(torch.jit, "load", never)
    with pytest.raises(ArchipelError, match=r"add --allow-torchscript"):
        Judges.open([f"i3d={path}@sha256:{digest}"], JUDGE)
    with pytest.raises(ArchipelError, match=r"names no sha256, and a TorchScript file is a program.*@sha256:HEX"):
        Judges.open([f"i3d={path}"], JUDGE, allow_torchscript=True)
    with pytest.raises(ArchipelError, match=f"sha256 is {digest}, but {'0' * 64} was given"):
        open_i3d(path, "0" * 64)
    with pytest.raises(ArchipelError, match="there is no such file"):
        open_i3d(tmp_path / "none.pt", digest)


def test_files_that_are_no_i3d(tmp_path: Path) -> None:
    path = tmp_path / "torn.pt"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ArchipelError, match="is not a TorchScript file"):
        open_i3d(path, store.sha256_file(path))
    judges = open_i3d(tmp_path / "narrow.pt", save(tmp_path / "narrow.pt", width=10))
    with pytest.raises(ArchipelError, match=r"returned \(2, 10\) for 2 videos, expected \(2, 400\)"):
        judges.measure(some_clips(2, 9))


def test_too_few_frames_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    judges = open_i3d(tmp_path / "i3d.pt", save(tmp_path / "i3d.pt"))
    with pytest.raises(ArchipelError, match=r"at least 9 frames, these have 8: raise clips\.frames"):
        judges.measure(some_clips(1, 8))
    with pytest.raises(ArchipelError, match="at least 9 frames"):
        judges.require_frames(8)
    judges.require_frames(9)


@pytest.fixture
def cdfvd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # what importing bench says to the environment is undone
    from bench import peers

    with peers.cdfvd():
        yield


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fed_as_cdfvd_feeds_its_own_i3d(cdfvd: None, tmp_path: Path) -> None:
    """cd-fvd's architecture with random weights as a TorchScript file: the numbers of cd-fvd's preprocessing and network."""
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    torch.manual_seed(0)
    network = InceptionI3d(400, in_channels=3).eval()
    with pytest.raises(RuntimeError, match="smaller than kernel"):  # why 9 frames are the least
        network(torch.zeros(1, 3, 8, 224, 224))
    clips = some_clips(1, 9)
    videos = preprocess_i3d(clips)
    traced = torch.jit.trace(network, torch.zeros_like(videos), check_trace=False)
    path = tmp_path / "i3d.pt"
    torch.jit.script(Wrapped(traced)).save(str(path))
    found = open_i3d(path, store.sha256_file(path)).measure(clips).features["i3d"]
    wanted = network(videos)
    assert float(wanted.std()) > 0
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
