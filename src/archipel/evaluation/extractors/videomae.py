"""VideoMAE (Tong et al. 2022): features of whole clips that depend more on motion than I3D's (Ge et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from archipel.encoders.features import evenly
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import files
from archipel.evaluation.extractors.base import Measured, full_precision, identity
from archipel.evaluation.extractors.images import input_side, pixel_values
from archipel.evaluation.extractors.specs import Spec

NAME = "videomae"
_CLASSIFIER = "VideoMAEForVideoClassification"
_CLIPS_AT_ONCE = 4


class VideoMAE:
    """Features ``videomae`` (N, D): mean over tokens, through the final norm where the model has one.

    Every clip becomes as many frames as the network was trained on (16): the middle frames of equal spans of the clip, so
    that shorter clips are slowed down by showing frames more than once. Other code differs here (cd-fvd feeds [0, 1]
    pixels without subtracting a mean, and other weights): FVD-VideoMAE is comparable under one protocol only.
    """

    features: tuple[str, ...] = (NAME,)
    scalars: tuple[str, ...] = ()
    least_frames = 1
    needs_captions = False

    def __init__(self, spec: Spec, device: str) -> None:
        folder = files.find_folder(spec)
        config = files.read_config(spec, folder, ("videomae",))
        weights = files.weights_hash(spec, folder)
        is_classifier = _CLASSIFIER in (config.get("architectures") or [])
        model = files.load_model(spec, folder, _CLASSIFIER if is_classifier else "VideoMAEModel", device)
        self._encoder = model.videomae if is_classifier else model
        self._norm = model.fc_norm if is_classifier else None
        self._processor = files.load_processor(spec, folder)
        self._frames, self._device = int(model.config.num_frames), device
        side, wanted = input_side(self._processor), int(model.config.image_size)
        if side != wanted:
            raise ArchipelError(
                f"{spec.name}={spec.where}: preprocessor_config.json makes images of {side} pixels, config.json expects {wanted}: "
                "they are not of one model"
            )
        norm = " and its final norm" if self._norm is not None else ""
        self.identity = {
            NAME: identity(
                weights=weights,
                layer=f"mean over tokens{norm}; frames repeated where a clip has fewer; "
                f"settings {files.settings_hash(folder)}",
                resize=wanted,
                frames=self._frames,
                metric="FVD-VideoMAE",
            )
        }

    @torch.no_grad()
    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        picked = evenly(clips.shape[1], self._frames)
        parts = []
        for begin in range(0, len(clips), _CLIPS_AT_ONCE):
            batch = np.asarray(clips[begin : begin + _CLIPS_AT_ONCE])[:, picked]  # (B, T, H, W, 3)
            pixels = pixel_values(self._processor, batch.reshape(-1, *batch.shape[2:])).to(self._device)
            with full_precision():
                tokens = self._encoder(pixels.reshape(len(batch), self._frames, *pixels.shape[1:])).last_hidden_state
                pooled = tokens.mean(1) if self._norm is None else self._norm(tokens.mean(1))
            parts.append(pooled.float().cpu().numpy())
        width = int(self._encoder.config.hidden_size)
        return Measured({NAME: np.concatenate([np.empty((0, width), np.float32), *parts])})
