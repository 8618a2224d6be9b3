"""FVD's own network: I3D (Carreira and Zisserman 2017) trained on Kinetics-400, as the TorchScript file of StyleGAN-V."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from archipel import store
from archipel.errors import ArchipelError, DamagedError
from archipel.evaluation.extractors.base import FRAMES_AT_ONCE, Measured, full_precision, identity
from archipel.evaluation.extractors.files import find_file, require_hash
from archipel.evaluation.extractors.specs import Spec

NAME, WIDTH = "i3d", 400
# Time is halved (rounded up) three times, then averaged over windows of 2: 9 -> 5 -> 3 -> 2 is the shortest that is left
# with a window; 8 -> 4 -> 2 -> 1 is not.
LEAST_FRAMES = 9
_JIT: Any = torch.jit


class I3D:
    """Features ``i3d`` (N, 400): the logits that FVD (Unterthiner et al. 2018) is computed from.

    The file is called as it is everywhere, ``model(x, rescale=True, resize=True, return_features=True)`` with x float
    (B, 3, F, H, W) in 0..255: it resizes to 224x224 and scales to [-1, 1] itself.
    """

    features: tuple[str, ...] = (NAME,)
    scalars: tuple[str, ...] = ()
    least_frames = LEAST_FRAMES
    needs_captions = False

    def __init__(self, spec: Spec, device: str, *, allow_torchscript: bool) -> None:
        self._spec, self._device = spec, device
        self._model = _load(spec, device, allow_torchscript)
        layer = "logits, all frames, resized by the file itself"
        self.identity = {NAME: identity(weights=spec.sha256, layer=layer, resize=224, frames=0, metric="FVD")}

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        per_batch = max(1, FRAMES_AT_ONCE // clips.shape[1])
        parts = [np.empty((0, WIDTH), np.float32)]
        for begin in range(0, len(clips), per_batch):
            batch = torch.from_numpy(np.array(clips[begin : begin + per_batch])).to(self._device)
            parts.append(self._features(batch.permute(0, 4, 1, 2, 3).float().contiguous()))  # (B, 3, F, H, W)
        return Measured({NAME: np.concatenate(parts)})

    def _features(self, videos: torch.Tensor) -> np.ndarray:
        try:
            # Unoptimised: the first calls are otherwise computed in another way than later ones.
            with torch.no_grad(), full_precision(), _JIT.optimized_execution(False):
                found = self._model(videos, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            raise ArchipelError(
                f"i3d={self._spec.where} failed on videos of shape {tuple(videos.shape)} (batch, 3, frames, height, width): "
                f"{str(error).strip().splitlines()[-1][:300]}. Is it the usual i3d_torchscript.pt?"
            ) from error
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != (len(videos), WIDTH):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ArchipelError(
                f"i3d={self._spec.where} returned {shape} for {len(videos)} videos, expected ({len(videos)}, {WIDTH}): "
                "this is not the I3D that FVD is computed with"
            )
        return found.float().cpu().numpy()


def _load(spec: Spec, device: str, allow_torchscript: bool) -> Any:
    why = "a TorchScript file is a program, which runs with your rights as soon as it is loaded"
    if not spec.sha256:
        raise ArchipelError(
            f"i3d={spec.where} names no sha256, and {why}. Get the file's sha256 from whom you trust (`sha256sum FILE` prints "
            f"that of the file you have) and write i3d={spec.where}@sha256:HEX"
        )
    if not allow_torchscript:
        raise ArchipelError(
            f"i3d={spec.where} is a TorchScript file, and {why}. If you trust the file with this sha256, "
            "add --allow-torchscript (allow_torchscript=True in Python)"
        )
    path = find_file(spec)
    content = path.read_bytes()  # once: what is hashed is what is loaded
    require_hash(spec, store.sha256_bytes(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _JIT.load(io.BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise DamagedError(
            f"{path} is not a TorchScript file that this torch ({torch.__version__}) can load: "
            f"{(str(error).strip().splitlines() or [''])[0][:300]}"
        ) from error
