"""Networks that look at single frames through transformers: CLIP with the LAION aesthetic heads, and DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from archipel.config import Evaluate
from archipel.encoders.features import evenly
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import files
from archipel.evaluation.extractors.aesthetic import Head
from archipel.evaluation.extractors.base import Measured, full_precision, identity
from archipel.evaluation.extractors.specs import Spec

CLIP, AESTHETIC, DINOV2 = "CLIP", "aesthetic", "dinov2"
_IMAGES_AT_ONCE = 32
_TEXTS_AT_ONCE = 64
_DINO_CLASS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def pixel_values(processor: Any, frames: np.ndarray) -> Tensor:
    """uint8 frames (N, H, W, 3) -> what the folder's image processor makes of each, float32 (N, 3, h, w)."""
    made = processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    found: Tensor = made.flatten(0, 1) if made.ndim == 5 else made  # video processors return one video of N frames
    return found.float()


def input_side(processor: Any) -> int:
    """Pixels of the side of what the processor makes, for the protocol."""
    return int(pixel_values(processor, np.zeros((1, 64, 64, 3), np.uint8)).shape[-1])


def _per_frame(
    clips: np.ndarray, frames: int, processor: Any, network: Callable[[Tensor], Tensor], device: str
) -> Tensor:
    """``network`` of ``frames`` evenly spaced frames of every clip: (N, n, D) float32 on the CPU."""
    picked = evenly(clips.shape[1], min(frames, clips.shape[1]))
    chosen = np.asarray(clips)[:, picked]
    images = chosen.reshape(-1, *chosen.shape[2:])
    parts = []
    for begin in range(0, len(images), _IMAGES_AT_ONCE):
        pixels = pixel_values(processor, images[begin : begin + _IMAGES_AT_ONCE]).to(device)
        with torch.no_grad(), full_precision():
            parts.append(network(pixels).float().cpu())
    return torch.cat(parts).reshape(len(clips), len(picked), -1)


class Clip:
    """Scalars ``CLIP`` and, with a head, ``aesthetic``, from one pass of CLIP (Radford et al. 2021).

    ``CLIP`` in [-1, 1]: cosine between caption and frame, mean over ``config.frames`` evenly spaced frames. Captions
    longer than the text encoder's context (77 tokens) are cut. ``aesthetic``: the head's value of the frames' normalised
    embeddings, mean over the same frames (about 1 to 10).
    """

    features: tuple[str, ...] = ()
    least_frames = 1
    needs_captions = True

    def __init__(self, spec: Spec, config: Evaluate, device: str, head: Spec | None = None) -> None:
        folder = files.find_folder(spec)
        files.read_config(spec, folder, ("clip",))
        weights = files.weights_hash(spec, folder)
        self._model = files.load_model(spec, folder, "CLIPModel", device)
        self._processor = files.load_processor(spec, folder)
        self._tokenizer = _tokenizer(spec, folder)
        self._context = int(self._model.config.text_config.max_position_embeddings)
        self._frames, self._device = config.frames, device
        size, settings = input_side(self._processor), files.settings_hash(folder)
        self.identity = {
            CLIP: identity(
                weights=weights,
                layer=f"cosine of image and text embeddings, mean over frames; settings {settings}",
                resize=size,
                frames=config.frames,
                metric=CLIP,
                unit="cosine",
            )
        }
        self._head: Head | None = None
        if head is not None:
            self._head = Head(head, int(self._model.config.projection_dim))
            self.identity[AESTHETIC] = identity(
                weights=f"{self._head.sha256}+{weights}",
                layer=f"{self._head.kind} head on normalised image embeddings, mean over frames; settings {settings}",
                resize=size,
                frames=config.frames,
                metric=AESTHETIC,
                unit="score",
            )
        self.scalars = tuple(self.identity)

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        images = F.normalize(
            _per_frame(clips, self._frames, self._processor, self._image, self._device), dim=-1
        )  # (N, n, P)
        texts = F.normalize(self._texts(list(captions)), dim=-1)  # (N, P)
        scalars = {CLIP: torch.einsum("nfp,np->nf", images, texts).double().mean(1).numpy()}
        if self._head is not None:
            scalars[AESTHETIC] = self._head(images).double().mean(1).numpy()
        return Measured(scalars=scalars)

    def _image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)
        return found

    @torch.no_grad()
    def _texts(self, captions: list[str]) -> Tensor:
        parts = []
        for begin in range(0, len(captions), _TEXTS_AT_ONCE):
            tokens = self._tokenizer(
                captions[begin : begin + _TEXTS_AT_ONCE],
                padding=True,
                truncation=True,
                max_length=self._context,
                return_tensors="pt",
            ).to(self._device)
            with full_precision():
                hidden = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                parts.append(self._model.text_projection(hidden.pooler_output).float().cpu())
        return torch.cat(parts)


def _tokenizer(spec: Spec, folder: Any) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ArchipelError(
            f"{spec.name}={spec.where}: {folder} has neither tokenizer.json nor vocab.json and merges.txt"
        )
    try:
        with files.quiet():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ArchipelError(f"{spec.name}={spec.where}: its tokenizer cannot be loaded: {error}") from error


class DinoV2:
    """Features ``dinov2`` (N, D): the class token after the last norm, mean over ``config.frames`` frames
    (Oquab et al. 2023; as in FD-DINOv2 of Stein et al. 2023, for clips)."""

    features: tuple[str, ...] = (DINOV2,)
    scalars: tuple[str, ...] = ()
    least_frames = 1
    needs_captions = False

    def __init__(self, spec: Spec, config: Evaluate, device: str) -> None:
        folder = files.find_folder(spec)
        kind = files.read_config(spec, folder, tuple(_DINO_CLASS))["model_type"]
        weights = files.weights_hash(spec, folder)
        self._model = files.load_model(spec, folder, _DINO_CLASS[kind], device)
        self._processor = files.load_processor(spec, folder)
        self._frames, self._device = config.frames, device
        self.identity = {
            DINOV2: identity(
                weights=weights,
                layer=f"class token, mean over frames; settings {files.settings_hash(folder)}",
                resize=input_side(self._processor),
                frames=config.frames,
                metric="FD-dinov2",
            )
        }

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        tokens = _per_frame(clips, self._frames, self._processor, self._image, self._device)
        return Measured({DINOV2: tokens.mean(1).numpy()})

    def _image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self._model(pixel_values=pixels).pooler_output
        return found
