"""Captions -> tokens, mask and pooled vector, by the packaged MiniLM (all-MiniLM-L6-v2, 384 wide, 6 layers).

The pooled vector is the sentence embedding of Reimers and Gurevych (Sentence-BERT, 2019) as that model was trained:
mean of the last hidden states over real tokens, divided by its length. Tokens and pooled vectors are then scaled to
about unit variance: a unit vector of 384 numbers is so small beside the time embedding that a short training ignores it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archipel.config import Text as TextConfig
from archipel.contracts import Conditioning
from archipel.encoders.weights import weights_file
from archipel.errors import ArchipelError, MissingStageError

if TYPE_CHECKING:
    from archipel.encoders.transformers_text import TransformersText

_AT_ONCE = 64
TOKEN_SCALE = 2.5  # one over the standard deviation of MiniLM's last hidden states, measured on emoji names
POOLED_SCALE = 384**0.5  # a unit vector of 384 numbers -> unit variance


class MiniLM:
    """``encode(captions)`` -> Conditioning with tokens (B, L, 384), mask (B, L), pooled (B, 384), all on the CPU.

    L is fixed: longer captions are cut to L tokens, the two special ones included; shorter ones are padded, and their
    padding is masked and zero. An empty caption is a caption of the two special tokens, not the null text.
    A row does not depend on what else is in the batch (to about 1e-6).
    """

    name = "minilm"
    width = 384
    pooled_width = 384

    def __init__(self, tokens: int, model: Any = None, tokenizer: str = "") -> None:
        """``model``, ``tokenizer`` (the text of a tokenizer.json): this model, loaded already, instead of the packaged files."""
        # Loaded here and not through the package's own function, which would bring in sentence-transformers.
        from tokenizers import Tokenizer
        from transformers import AutoModel

        self.tokens = tokens
        if model is None:
            folder = weights_file("minilm").parent
            tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
            with without_loading_bar():
                model = AutoModel.from_pretrained(
                    str(folder),
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    dtype=torch.float32,
                ).eval()
        self.model = model
        # tokenizer.json pads to 128 and cuts at 128 by itself: both are taken off first.
        self._whole = Tokenizer.from_str(tokenizer)
        self._whole.no_padding()
        self._whole.no_truncation()
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.enable_padding(length=tokens)
        self._tokenizer.enable_truncation(max_length=tokens)

    def truncated(self, captions: Sequence[str]) -> list[int]:
        """Rows of the captions that are longer than L tokens and therefore lose their end."""
        lengths = [len(encoding.ids) for encoding in self._whole.encode_batch(readable(captions))] if captions else []
        return [row for row, length in enumerate(lengths) if length > self.tokens]

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """See the class. Raises ArchipelError naming a caption that is not valid Unicode."""
        captions = readable(captions)
        if not captions:
            empty = torch.zeros(0, self.tokens, self.width)
            return Conditioning(empty, empty[:, :, 0].bool(), empty[:, 0])
        parts = [self._encode(captions[begin : begin + _AT_ONCE]) for begin in range(0, len(captions), _AT_ONCE)]
        return Conditioning.cat(parts)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Conditioning:
        encodings = self._tokenizer.encode_batch(captions)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        on = self.model.device
        hidden: Tensor = self.model(input_ids=ids.to(on), attention_mask=mask.to(on)).last_hidden_state.float().cpu()
        tokens = hidden * mask[:, :, None]
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        pooled = torch.nn.functional.normalize(mean, dim=1) * POOLED_SCALE
        return Conditioning(tokens * TOKEN_SCALE, mask.bool(), pooled)


def readable(captions: Sequence[str]) -> list[str]:
    """Refuse halves of characters (bytes of a shell or file that were no UTF-8), which the tokenizer cannot take."""
    for number, caption in enumerate(captions):
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ArchipelError(
                f"caption {number} is not valid text at character {error.start}: {caption[:60]!r}"
            ) from error
    return list(captions)


def open_text(config: TextConfig, folder: Path | None = None) -> MiniLM | TransformersText:
    """The text encoder that ``run.toml`` asks for: the packaged MiniLM with ``config.tokens`` tokens a caption, or what
    *prepare* took into ``folder`` (``RUN/text``). Raises MissingStageError where there is nothing yet."""
    if config.encoder == "minilm":
        return MiniLM(config.tokens)
    from archipel.encoders.transformers_text import TransformersText

    if folder is None:
        raise MissingStageError(f"text.encoder = {config.encoder!r} lies in the run's text/: open it with its folder")
    return TransformersText(config, folder)


@contextlib.contextmanager
def without_loading_bar() -> Iterator[None]:
    """transformers draws a bar of its own over ours while it loads, and says what it leaves out; it comes back as it was."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    before, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of tensors that are of no use here
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if before:
            logging.enable_progress_bar()
