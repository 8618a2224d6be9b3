"""The parts beside the networks, as diffusers and transformers write them: codec, text encoder, scheduler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from archipel import store
from archipel.config import RunConfig
from archipel.ensemble.parts import Source
from archipel.errors import ArchipelError

Entry = list[str]
"""[library, class]: a component in model_index.json."""


def write_codec(folder: Path, target: Path, config: RunConfig) -> Entry:
    """The run's codec as a pipeline's ``vae``. Raises DamagedError, MissingStageError."""
    from archipel.encoders.codecs import PatchPCA, Pixels, load_codec
    from archipel.exchange.parts import BlockCodec

    codec = load_codec(folder)
    if isinstance(codec, PatchPCA | Pixels):
        BlockCodec.of(codec).save_pretrained(str(target), safe_serialization=True)
        return [BlockCodec.__module__, BlockCodec.__name__]
    raise ArchipelError(f"codec.kind = {config.codec.kind!r} cannot be exported yet")


def write_text(source: Source, made: Path, config: RunConfig) -> dict[str, Entry]:
    """The run's text encoder: ``text_encoder/``, ``tokenizer/`` (and both with _2); returns their entries."""
    if config.text.encoder == "minilm":
        return _minilm(made, config.text.tokens)
    raise ArchipelError(f"text.encoder = {config.text.encoder!r} cannot be exported yet")


def _minilm(made: Path, tokens: int) -> dict[str, Entry]:
    from transformers import PreTrainedTokenizerFast

    from archipel.encoders.weights import weights_file

    folder = weights_file("minilm").parent
    (made / "text_encoder").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, made / "text_encoder" / name)
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=tokens, **marks)
    tokenizer.save_pretrained(str(made / "tokenizer"))
    return {"text_encoder": ["transformers", "BertModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}


def write_scheduler(target: Path, config: RunConfig) -> Entry:
    """The run's own sampling times: diffusers' Euler steps over them are Archipel's."""
    import diffusers

    kind = "FlowMatchEulerDiscreteScheduler"
    settings = {"num_train_timesteps": 1000, "shift": config.sample.shift, "use_dynamic_shifting": False}
    store.write_json(
        target / "scheduler_config.json", {"_class_name": kind, "_diffusers_version": diffusers.__version__, **settings}
    )
    return ["diffusers", kind]
