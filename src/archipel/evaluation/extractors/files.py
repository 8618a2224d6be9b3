"""Finding, hashing and reading weights that people bring: local paths and hub ids, safetensors and settings only.

Nothing here runs code of a repository: ``trust_remote_code=False`` and ``use_safetensors=True`` throughout.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from archipel import store
from archipel.encoders.features import unchanged_globals
from archipel.errors import ArchipelError, DamagedError
from archipel.evaluation.extractors.specs import Spec

_HUB_FOLDER = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+)")
_WANTED = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find_folder(spec: Spec) -> Path:
    """The folder of a model saved by transformers: a local one, or a hub id's, fetched by the hub's own library.

    Raises ArchipelError naming what is missing and where it was looked for.
    """
    path = Path(spec.where).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ArchipelError(f"{spec.name}={spec.where} is a file: give the folder that holds config.json")
    found = _HUB_FOLDER.fullmatch(spec.where)
    if not found or spec.where.startswith((".", "~")):
        raise ArchipelError(f"{spec.name}={spec.where}: there is no such folder")

    def fetch(hub: Any) -> str:
        return str(hub.snapshot_download(found[1], revision=found[2], allow_patterns=_WANTED))

    return Path(_from_hub(spec, "folder", fetch))


def find_file(spec: Spec) -> Path:
    """A single file: local, or ``ORG/NAME/FILE`` of the hub. Raises ArchipelError as ``find_folder`` does."""
    path = Path(spec.where).expanduser()
    if path.is_file():
        return path
    if path.exists():
        raise ArchipelError(f"{spec.name}={spec.where} is not a file: give the file itself")
    found = _HUB_FILE.fullmatch(spec.where)
    if not found or spec.where.startswith((".", "~")) or ".." in found[2].split("/"):
        raise ArchipelError(f"{spec.name}={spec.where}: there is no such file")

    def fetch(hub: Any) -> str:
        return str(hub.hf_hub_download(found[1], found[2]))

    return Path(_from_hub(spec, "file", fetch))


def _from_hub(spec: Spec, kind: str, fetch: Callable[[Any], str]) -> str:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with quiet():
            return fetch(huggingface_hub)
    except Exception as error:  # the hub's library raises whatever its HTTP stack raises
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ArchipelError(
            f"{spec.name}={spec.where} is no {kind} here, and the hub did not give it ({type(error).__name__}: {said}). "
            f"Without a network, copy it over by hand and give its local path: {spec.name}=/path/to/{kind}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The hub's and transformers' own bars and load reports off, and back as they were."""
    from huggingface_hub import utils as hub_utils
    from transformers.utils import logging as library_logging

    logging: Any = library_logging
    hub: Any = hub_utils
    bar, level, hub_off = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
        if not hub_off:
            hub.enable_progress_bars()


# --- folders saved by transformers ------------------------------------------------------------------------------------


def read_config(spec: Spec, folder: Path, types: tuple[str, ...]) -> dict[str, Any]:
    """``config.json``. Raises ArchipelError where it is missing or says that the model is of another kind: a score
    carries its network's name, and another network's numbers under that name would be false."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArchipelError(f"{spec.name}={spec.where}: {path} is missing: give a folder saved by transformers")
    config = store.read_json(path)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in types:
        raise ArchipelError(f"{path} describes a model of type {kind!r}; {spec.name} needs {' or '.join(types)}")
    return dict(config)


def weights_hash(spec: Spec, folder: Path) -> str:
    """sha256 of ``model.safetensors``; of the list of (name, sha256) where the weights lie in several files.

    Raises ArchipelError where there are no safetensors, or where the hash is not the one given in the spec.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        digest = store.sha256_file(single)
    elif index.is_file():
        names = sorted({str(name) for name in store.read_json(index).get("weight_map", {}).values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise DamagedError(f"{index} names {name!r}, which is not a file of {folder}")
        digest = store.sha256_json({name: store.sha256_file(folder / name) for name in names})
    else:
        raise ArchipelError(
            f"{spec.name}={spec.where}: {folder} has no {_SINGLE}. Weights in pickle files (pytorch_model.bin) are not "
            "read, because loading a pickle can run code: save the model again with save_pretrained"
        )
    require_hash(spec, digest)
    return digest


def require_hash(spec: Spec, digest: str) -> None:
    """Raises DamagedError where the spec names another sha256 than ``digest``."""
    if spec.sha256 and spec.sha256 != digest:
        raise DamagedError(
            f"{spec.name}={spec.where}: the weights' sha256 is {digest}, but {spec.sha256} was given: this is another file "
            "than the one you mean. Fetch it again, or correct the sha256 after you have checked where the file is from"
        )


def settings_hash(folder: Path) -> str:
    """The first 12 digits of the sha256 over configuration, preprocessing and tokenizer files."""
    present = {name: store.sha256_file(folder / name) for name in _SETTINGS if (folder / name).is_file()}
    return store.sha256_json(present)[:12]


def load_model(spec: Spec, folder: Path, class_name: str, device: str) -> Any:
    """A transformers model in float32, frozen, on ``device``. Raises ArchipelError where weights are missing from the
    file (transformers would fill them with random numbers) or do not fit."""
    import torch
    import transformers

    try:
        with quiet(), unchanged_globals():
            model, report = getattr(transformers, class_name).from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except Exception as error:  # damaged headers, shapes that do not fit, keys the library does not know
        raise DamagedError(
            f"{spec.name}={spec.where}: {class_name} cannot be loaded from {folder}: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DamagedError(
            f"{spec.name}={spec.where}: {folder} lacks {len(missing)} weights of {class_name}, {missing[0]} for one: "
            "this is not the whole model"
        )
    return model.eval().requires_grad_(False).to(device)


def load_processor(spec: Spec, folder: Path) -> Any:
    """The image processor of ``preprocessor_config.json``, in its Pillow form.

    The library takes another implementation, with other numbers, wherever torchvision happens to be installed.
    """
    import transformers

    library: Any = transformers

    pillow = {"backend": "pil"} if int(library.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    if not (folder / "preprocessor_config.json").is_file():
        raise ArchipelError(
            f"{spec.name}={spec.where}: {folder / 'preprocessor_config.json'} is missing, which says how images are resized "
            "and normalised for this network: copy it from where the weights are from"
        )
    try:
        with quiet():
            return library.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **pillow
            )
    except Exception as error:
        raise DamagedError(
            f"{spec.name}={spec.where}: {folder / 'preprocessor_config.json'} cannot be used: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
