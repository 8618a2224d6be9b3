"""Captions -> tokens, mask and pooled vector, by text encoders of transformers: T5, umT5, CLIP, and T5 with CLIP.

| text.encoder | tokens (B, L, D) | pooled (B, P) |
| --- | --- | --- |
| t5, umt5 | last hidden states | their mean over real tokens |
| clip | last hidden states | CLIP's own: the state at the end of the text |
| t5+clip | T5's | CLIP's own, of at most 77 tokens (FLUX, Paris 2.0) |

L is fixed. With ``padding = "zero"`` the encoder does not see the padding and its states are zero, as WanPipeline has it:
a caption means the same whatever L is. With "kept" it sees the padding and the states of the padding stay, as
FluxPipeline, LTXPipeline and CogVideoXPipeline have it. The mask says what is real in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import store
from archipel.config import Text as TextConfig
from archipel.contracts import Conditioning
from archipel.encoders import outside
from archipel.encoders.resolving import text_kind
from archipel.encoders.text import readable, without_loading_bar
from archipel.errors import DamagedError, MissingStageError

_AT_ONCE = 16


class _Part:
    """One encoder with its tokenizer, loaded; ``length``: tokens of a caption (0: as many as the encoder has positions)."""

    def __init__(self, model: Any, tokenizer: Any, length: int, said: str) -> None:
        self.kind, self.width, most = text_kind(model.config.to_dict(), said)
        self.length = min(length or most, most) if most else length
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = tokenizer
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise DamagedError(
                f"{said}: the tokenizer has {len(tokenizer)} pieces, the encoder beside it knows "
                f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
            )

    @classmethod
    def load(cls, folder: Path, suffix: str, length: int) -> _Part:
        """From ``text_encoder{suffix}/`` and ``tokenizer{suffix}/``."""
        import transformers

        where = folder / f"text_encoder{suffix}"
        model: Any = {
            "t5": transformers.T5EncoderModel,
            "umt5": transformers.UMT5EncoderModel,
            "clip": transformers.CLIPTextModel,
        }[text_kind(store.read_json(where / outside.CONFIG), str(where))[0]]
        local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            with without_loading_bar():
                tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder / f"tokenizer{suffix}"), **local)
                loaded, told = model.from_pretrained(
                    str(where), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
                )
        except Exception as error:  # transformers and tokenizers raise whatever their readers raise
            said = (str(error).strip().splitlines() or [""])[0][:200]
            raise DamagedError(
                f"{folder} holds no text encoder that can be opened ({type(error).__name__}: {said})"
            ) from error
        if told["missing_keys"]:  # transformers would leave them at random
            raise DamagedError(
                f"{where} lacks {len(told['missing_keys'])} tensors, such as {sorted(told['missing_keys'])[0]!r}"
            )
        return cls(loaded, tokenizer, length, str(folder / f"tokenizer{suffix}"))

    def lengths(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, special ones included, before anything is cut."""
        return [len(ids) for ids in self.tokenizer(captions, padding=False, truncation=False, verbose=False).input_ids]

    def states(self, captions: list[str], kept: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (B, L, D), mask (B, L) bool, and CLIP's pooled vector (B, P)."""
        given = self.tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        device = next(self.model.parameters()).device
        ids, mask = given.input_ids.to(device), given.attention_mask.to(device)
        found = self.model(input_ids=ids, attention_mask=None if kept else mask)
        # Where the model was moved for this call only, its answer is elsewhere than what it was given.
        states: Tensor = found.last_hidden_state.to(device, torch.float32)
        if not kept:
            states = states * mask[:, :, None]
        pooled: Tensor | None = getattr(found, "pooler_output", None)
        return states, mask.bool(), None if pooled is None else pooled.to(device, torch.float32)


def _length(config: TextConfig, kind: str) -> int:
    """Tokens of a caption for one encoder; CLIP's length is its own beside T5."""
    return 0 if config.encoder == "t5+clip" and kind == "clip" else config.tokens


class TransformersText:
    """``encode(captions)`` -> Conditioning with tokens (B, L, D), mask (B, L), pooled (B, P), float32 on the CPU.

    Longer captions are cut to L tokens, special ones included. An empty caption is its special tokens, not the null text.
    A row does not depend on what else is in the batch (to about 1e-6).
    """

    def __init__(self, config: TextConfig, folder: Path) -> None:
        """``folder``: ``text_encoder/`` and ``tokenizer/`` as *prepare* took them. Raises MissingStageError, DamagedError."""
        if store.read_card(folder, "text") is None:
            raise MissingStageError(f"{folder} holds no text encoder: run `archipel prepare {folder.parent}` first")
        names = [suffix for suffix in ("", "_2") if (folder / f"text_encoder{suffix}").is_dir()]
        parts: dict[str, _Part] = {}
        for suffix in names:
            kind = text_kind(store.read_json(folder / f"text_encoder{suffix}" / outside.CONFIG), str(folder))[0]
            parts[kind] = _Part.load(folder, suffix, _length(config, kind))
        self._join(config, parts, folder)

    @classmethod
    def of(cls, config: TextConfig, loaded: Sequence[tuple[Any, Any]]) -> TransformersText:
        """From encoders that are loaded already, each with its tokenizer. Raises DamagedError."""
        self = cls.__new__(cls)
        parts: dict[str, _Part] = {}
        for model, tokenizer in loaded:
            kind = text_kind(model.config.to_dict(), type(model).__name__)[0]
            parts[kind] = _Part(model, tokenizer, _length(config, kind), type(model).__name__)
        self._join(config, parts, Path("what is loaded"))
        return self

    def _join(self, config: TextConfig, parts: dict[str, _Part], folder: Path) -> None:
        self.name: str = config.encoder
        self.tokens = config.tokens
        self.width, self.pooled_width = config.width, config.pooled_width
        self.padding = config.padding
        if set(parts) != set(config.encoder.split("+")):
            raise DamagedError(
                f"{folder} holds {' and '.join(parts)}, run.toml says {config.encoder!r}: remove it and run "
                f"`archipel prepare {folder.parent}`"
            )
        self._tokens = parts.get("t5") or next(iter(parts.values()))
        self._pooled = parts.get("clip")
        pooled = (self._pooled or self._tokens).width
        if (self._tokens.width, pooled) != (self.width, self.pooled_width):
            raise DamagedError(
                f"{folder} has widths {self._tokens.width} and {pooled}, run.toml says {self.width} and {self.pooled_width}"
            )

    def to(self, device: torch.device | str) -> TransformersText:
        """Compute there; what ``encode`` returns is on the CPU all the same."""
        for part in {id(part): part for part in (self._tokens, self._pooled) if part is not None}.values():
            part.model.to(device)
        return self

    def truncated(self, captions: Sequence[str]) -> list[int]:
        """Rows of the captions that are longer than L tokens and therefore lose their end."""
        lengths = self._tokens.lengths(readable(captions)) if captions else []
        return [row for row, length in enumerate(lengths) if length > self.tokens]

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """See the class. Raises ArchipelError naming a caption that is not valid Unicode."""
        captions = readable(captions)
        if not captions:
            empty = torch.zeros(0, self.tokens, self.width)
            return Conditioning(empty, empty[:, :, 0].bool(), torch.zeros(0, self.pooled_width))
        parts = [self._encode(captions[begin : begin + _AT_ONCE]) for begin in range(0, len(captions), _AT_ONCE)]
        return Conditioning.cat(parts)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Conditioning:
        tokens, mask, pooled = self._tokens.states(captions, self.padding == "kept")
        if self._pooled is not None and self._pooled is not self._tokens:
            pooled = self._pooled.states(captions, kept=True)[2]  # causal: what comes after the text's end is not seen
        if pooled is None:
            real = mask[:, :, None].to(tokens.dtype)
            pooled = (tokens * real).sum(1) / real.sum(1).clamp_min(1)
        return Conditioning(tokens.cpu(), mask.cpu(), pooled.cpu())
