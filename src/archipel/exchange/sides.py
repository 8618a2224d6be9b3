"""The parts beside the networks, as diffusers and transformers write them: codec, text encoder, scheduler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from archipel import store
from archipel.config import RunConfig
from archipel.encoders import outside
from archipel.ensemble.parts import Source
from archipel.errors import DamagedError

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENCODERS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
Entry = list[str]
"""[library, class]: a component in model_index.json."""


def write_codec(folder: Path, target: Path) -> Entry:
    """The run's codec in ``folder`` as a pipeline's ``vae``. Raises DamagedError, MissingStageError."""
    from archipel.encoders.codecs import PatchPCA, Pixels, load_codec
    from archipel.exchange.parts import BlockCodec

    codec = load_codec(folder)
    if isinstance(codec, PatchPCA | Pixels):
        BlockCodec.of(codec).save_pretrained(str(target), safe_serialization=True)
        return [BlockCodec.__module__, BlockCodec.__name__]
    target.mkdir()
    kind = copy_json(folder / outside.CONFIG, target / outside.CONFIG)["_class_name"]
    shutil.copyfile(folder / outside.WEIGHTS, target / DIFFUSERS_WEIGHTS)
    return ["diffusers", str(kind)]


def write_text(source: Source, made: Path) -> dict[str, Entry]:
    """The run's text encoder: ``text_encoder/``, ``tokenizer/`` (and both with _2); returns their entries."""
    config = source.run.config.text
    return _from_outside(source.text(), made) if config.path else _minilm(made, config.tokens)


def _from_outside(folder: Path, made: Path) -> dict[str, Entry]:
    """Text encoders as *prepare* took them, held to their card."""
    from transformers import AutoTokenizer

    from archipel.encoders.resolving import text_kind

    problems = store.check_card(folder)
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: remove {folder} and run `archipel prepare` again")
    index: dict[str, Entry] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        (made / place.name).mkdir()
        for path in sorted(place.iterdir()):
            copy = copy_json if path.suffix == ".json" else shutil.copyfile
            copy(path, made / place.name / path.name)
        if place.name.startswith("text_encoder"):
            kind = text_kind(store.read_json(place / outside.CONFIG), str(place))[0]
            index[place.name] = ["transformers", _ENCODERS[kind]]
        else:
            load: Any = AutoTokenizer.from_pretrained
            found = type(load(str(place), trust_remote_code=False, local_files_only=True)).__name__
            # What transformers 5 calls it is not there in 4.
            index[place.name] = ["transformers", "PreTrainedTokenizerFast" if found == "TokenizersBackend" else found]
    return index


def copy_json(source: Path, target: Path) -> Any:
    """A JSON file without the path that it was once loaded from; returns its content."""
    value = store.read_json(source)
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if key not in ("_name_or_path", "name_or_path")}
    store.write_json(target, value)
    return value


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
