"""An export as it is found, before anything of it is loaded: what it may hold, and nothing that would be run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError, DamagedError

INDEX = "model_index.json"
PIPELINE = "ArchipelPipeline"
PARTS = "archipel.exchange.parts"
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md")  # of a hub repository; what is code stays there
# component -> library and names (a regular expression) of the classes that it may be: no pipeline within a pipeline.
_TRANSFORMER = ("diffusers", r"(Flux|Wan|LTXVideo|HunyuanVideo|CogVideoX)Transformer(2D|3D)Model")
_ALLOWED: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (r"expert_[0-9]{1,3}|monolith|transformer|router", (_TRANSFORMER,)),
    (r"vae", ((PARTS, r"BlockCodec"), ("diffusers", r"Autoencoder\w+"))),
    (r"text_encoder(_2)?", (("transformers", r"BertModel|T5EncoderModel|UMT5EncoderModel|CLIPTextModel"),)),
    (r"tokenizer(_2)?", (("transformers", r"\w*Tokenizer\w*"),)),
    (r"scheduler", (("diffusers", r"\w+Scheduler"),)),
)
_CODE = (".py", ".pyc", ".so", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
_EXPERT = re.compile(r"expert_([0-9]{1,3})")


def open_export(where: str | Path, options: dict[str, Any]) -> tuple[Path, tuple[str, ...]]:
    """The export's folder on this disk, and the names of its experts ("expert_0", ...), by number.

    ``options``: what else ``from_pretrained`` was given; those that pick a version of a hub repository are used there.
    Raises ArchipelError where it is no export, or asks for code, DamagedError where it holds some.
    """
    for key in ("custom_pipeline", "trust_remote_code"):
        if options.pop(key, None):
            raise ArchipelError(f"{key} is not for ArchipelPipeline: nothing from a folder is ever run")
    if options.pop("use_safetensors", True) is False:
        raise ArchipelError("use_safetensors=False is not for ArchipelPipeline: pickles are never read")
    folder = Path(where)
    if not folder.is_dir():
        folder = _from_hub(str(where), options)
    return folder, check_index(folder)


def check_index(folder: Path) -> tuple[str, ...]:
    """Names of the experts in an export's model_index.json, held to what a pipeline of ours may consist of."""
    path = folder / INDEX
    if not path.is_file():
        raise ArchipelError(f"{folder} holds no {INDEX}: `archipel export RUN {folder}` writes such a folder")
    index = store.read_json(path)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != PIPELINE:
        raise ArchipelError(
            f"{path}: _class_name is {str(kind)[:80]!r}, not {PIPELINE}: open it with the pipeline that it names"
        )
    for name, entry in index.items():
        if isinstance(entry, list) and entry != [None, None] and not _allowed(name, entry):
            raise DamagedError(
                f"{path}: {name[:80]!r} is {str(entry)[:80]}, which no export of Archipel has: nothing of it was loaded"
            )
    for found in folder.rglob("*"):
        if found.suffix in _CODE:
            raise DamagedError(f"{found} is code or a pickle, which no export has: take it away if you trust the rest")
    here = [
        m for name, entry in index.items() if (m := _EXPERT.fullmatch(name)) and isinstance(entry, list) and entry[0]
    ]
    return tuple(match[0] for match in sorted(here, key=lambda match: int(match[1])))


def _allowed(name: str, entry: list[Any]) -> bool:
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        return False
    library, kind = entry
    return any(
        library == one and re.fullmatch(classes, kind)
        for names, kinds in _ALLOWED
        if re.fullmatch(names, name)
        for one, classes in kinds
    )


def _from_hub(where: str, options: dict[str, Any]) -> Path:
    if os.sep * 2 in where or where.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise ArchipelError(f"there is no folder {where}, and it is no hub id either (name/repository)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    keys = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    chosen = {key: options.pop(key) for key in keys if key in options}
    chosen.pop("proxies", None)
    try:
        return Path(snapshot_download(where, allow_patterns=list(WANTED), **chosen))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArchipelError(f"there is no folder {where}, and it could not be had from the hub ({error})") from error
