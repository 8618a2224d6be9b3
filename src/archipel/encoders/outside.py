"""Parts of a run that people bring: autoencoder, text encoders, weights of a transformer, from a folder or a hub id.

``find`` says where a part lies, ``take`` brings its files into the run: linked where the disk allows it, else copied, so
that nothing reads the outside path afterwards. Only what is known to be harmless is taken: JSON, tokenizers' text and
vocabulary files, and safetensors. Pickles are refused, code is never run, and links out of the folder are not followed.

Nothing here imports torch, diffusers or transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError, ConfigError, DamagedError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PIPELINE = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' own names, in this order
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.-]+(?:/[\w.-]+)*))?")
_TOKENIZER = (".json", ".txt", ".model")  # vocabularies; .model is SentencePiece's, a protocol buffer
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # names that can be keys of a bucket
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_VARIANTS = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.int8.*", "*.fp8.*"]
_CHUNK = 1 << 22
_MAX_HEADER = 100 << 20  # the safetensors reference implementation's own bound
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Place:
    """A part on this disk. ``said``: as it was asked for, for messages; ``root``: links of ``folder`` may lead into it."""

    said: str
    folder: Path
    root: Path

    def file(self, name: str) -> Path | None:
        """A file of the folder, its links followed; None where there is none. Raises ArchipelError where one leads out."""
        path = self.folder / name
        if not path.exists():
            return None
        real = path.resolve()
        if not real.is_relative_to(self.root):
            raise ArchipelError(f"{path} is a link that leads out of {self.root}: it is not followed")
        return real if real.is_file() else None


# --- where a part lies -------------------------------------------------------------------------------------------------


def is_hub_id(source: str) -> bool:
    """Whether ``source`` names nothing on this disk and could be ``ORG/NAME``, ``@REVISION`` and ``:SUBFOLDER`` behind it."""
    return not exists(source) and not source.startswith(("/", ".", "~")) and bool(
        _HUB_ID.fullmatch(source)
    )  # fmt: skip


def exists(source: str) -> bool:
    return Path(source).expanduser().exists()


def settled(source: str, place: Place) -> str:
    """``source`` as ``run.toml`` has it: a folder made absolute, so that any working directory will do; a hub id with the commit
    that ``place`` was found in, so that what is read at `init` is what *prepare* takes."""
    if not is_hub_id(source):
        return os.path.abspath(Path(source).expanduser())  # noqa: PTH100 - keeps links
    found = _HUB_ID.fullmatch(source)
    assert found is not None
    name, revision, sub = found.groups()
    parts = place.folder.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else revision
    return f"{name}@{commit}" + (f":{sub}" if sub else "")


def find(source: str, parts: Sequence[str], what: str, *, weights: bool = False) -> list[Place]:
    """Where ``parts`` (``vae``; ``text_encoder`` and ``tokenizer``; ...) of ``source`` lie: those that are there, in order.

    ``source`` is a pipeline's folder, which has one folder per part, or the folder of the first part itself, or a hub id,
    of which only configurations are fetched, or with ``weights`` all that ``take`` would take. ``what`` names it in errors.
    Raises ConfigError where there is no such folder, or nothing in it that diffusers or transformers wrote.
    """
    if is_hub_id(source):
        base, root = _fetch(source, parts, what, weights)
    else:
        base = Path(source).expanduser()
        if not base.exists():
            raise ConfigError(f"{what} {source!r}: there is no such folder, and it is no hub id (ORG/NAME) either")
        if not base.is_dir():
            raise ConfigError(f"{what} {source!r} is a file: give the folder that holds {CONFIG}")
        root = _root(base)
    found = [Place(f"{source} ({part})", base / part, root) for part in parts if (base / part).is_dir()]
    if found and found[0].folder.name == parts[0]:
        return found
    if (base / CONFIG).is_file():
        return [Place(source, base, root)]
    if (base / PIPELINE).is_file():
        raise ConfigError(f"{what} {source!r} is a pipeline of diffusers that has no {parts[0]}: give another folder")
    raise ConfigError(
        f"{what} {source!r} is no checkpoint of diffusers or transformers: it holds neither {CONFIG} nor {parts[0]}/{CONFIG}"
    )


def _root(base: Path) -> Path:
    """What links may lead into: the folder, or the hub's cache of one repository, whose snapshots are links to its blobs."""
    real = base.resolve()
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return folder.parent.parent
    return real


def _fetch(source: str, parts: Sequence[str], what: str, weights: bool) -> tuple[Path, Path]:
    found = _HUB_ID.fullmatch(source)
    assert found is not None  # is_hub_id has just said so
    name, revision, sub = found.groups()
    prefix = f"{sub}/" if sub else ""

    def fetch(patterns: list[str]) -> Path:
        return _snapshot(source, what, name, revision, patterns)

    base = fetch([f"{prefix}{PIPELINE}", f"{prefix}{CONFIG}", *(f"{prefix}{part}/*.json" for part in parts)])
    if weights:
        pipeline = (base / prefix / PIPELINE).is_file() or not (base / prefix / CONFIG).is_file()
        inner = [f"{prefix}{part}/" for part in parts] if pipeline else [prefix]
        names = ["*.json", "*.txt", "*.model", *(f"{stem}*.safetensors" for stem in STEMS)]
        base = fetch([f"{folder}{name}" for folder in inner for name in names])
    return base / prefix, base.parent.parent.resolve()


def _snapshot(source: str, what: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_VARIANTS
        )
    except Exception as error:  # the hub's library raises whatever its HTTP stack raises
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ArchipelError(
            f"{what} {source!r} is no folder here, and the hub did not give it ({type(error).__name__}: {said}). "
            "Without a network, copy it over by hand and give the folder"
        ) from error
    return Path(found)


# --- what a part holds -------------------------------------------------------------------------------------------------


def read_config(place: Place, what: str, name: str = CONFIG) -> dict[str, Any]:
    """A part's ``config.json``. Raises ConfigError where it is missing, is no object, or asks for code of its own."""
    path = place.file(name)
    if path is None:
        raise ConfigError(f"{what} {place.said!r}: {place.folder / name} is missing: it is no checkpoint")
    if path.stat().st_size > _MAX_JSON:
        raise ConfigError(f"{what} {place.said!r}: {place.folder / name} has more than {_MAX_JSON >> 20} MB")
    try:
        config = store.read_json(path)
    except RecursionError as error:
        raise ConfigError(f"{what} {place.said!r}: {place.folder / name} is nested too deeply to be read") from error
    except DamagedError as error:
        raise ConfigError(f"{what} {place.said!r}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{what} {place.said!r}: {place.folder / name} is no JSON object")
    if "auto_map" in config:
        raise ConfigError(
            f"{what} {place.said!r}: {place.folder / name} asks for code of its own (auto_map), which Archipel never runs"
        )
    return config


def weight_files(place: Place, what: str) -> list[Path]:
    """The safetensors of a part, in order: one file, or the shards that its index names. Raises ConfigError where there are
    none, naming pickles that are there instead, DamagedError where the index is wrong."""
    for stem in STEMS:
        single, index = place.file(f"{stem}.safetensors"), place.file(f"{stem}.safetensors.index.json")
        if index is not None:
            return _shards(place, index)
        if single is not None:
            return [single]
    pickles = sorted(path.name for path in place.folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ConfigError(
            f"{what} {place.said!r} has its weights as a pickle ({pickles[0]}), which can run code and is never opened: "
            "save it again as safetensors"
        )
    variants = sorted(path.name for path in place.folder.glob("*.safetensors"))
    raise ConfigError(
        f"{what} {place.said!r} holds no weights: expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}"
        + (f", found {variants[0]}" if variants else "")
    )


def _shards(place: Place, index: Path) -> list[Path]:
    listed = store.read_json(index)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise DamagedError(f"{index} has no weight_map of tensors to files")
    files = []
    for name in sorted(set(names.values())):
        path = place.file(name) if Path(name).name == name and name.endswith(".safetensors") else None
        if path is None:
            raise DamagedError(f"{index} names {name!r}, which is not beside it")
        files.append(path)
    return files


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of safetensors files. Raises DamagedError where a file is torn."""
    return {
        name: tuple(entry["shape"]) for path in files for name, entry in _header(path)[0].items() if name != "__metadata__"
    }  # fmt: skip


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins; offsets are held to the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise DamagedError(f"{path} is not a whole safetensors file (header of {length} bytes in {size})")
        try:
            header = json.loads(file.read(length))
            ends = []
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = (int(n) for n in entry["data_offsets"])
                    if not 0 <= begin <= end or not isinstance(entry["dtype"], str):
                        raise ValueError(name)
                    entry["shape"] = [int(n) for n in entry["shape"]]
                    ends.append(end)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path} has an unreadable safetensors header ({error!r})") from error
    if max(ends, default=0) > size - 8 - length:
        raise DamagedError(f"{path} is cut off: its header promises {max(ends)} bytes of tensors")
    return header, 8 + length


def one_file(files: Sequence[Path]) -> Iterator[bytes]:
    """The bytes of one safetensors file with all tensors of ``files``: a single one as it is, shards joined in the order of
    their tensors' names. Memory is one chunk, whatever the size. Raises DamagedError where two have a tensor of one name."""
    if len(files) == 1:
        yield from _pieces(files[0], 0, files[0].stat().st_size)
        return
    parts: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        header, data = _header(path)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in parts:
                raise DamagedError(f"{path} and {parts[name][0]} both have a tensor {name!r}")
            parts[name] = (path, data, entry)
    joined: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # By the widths of their numbers, then by name: every tensor begins at a multiple of its own width, as readers like it.
    order = sorted(parts, key=lambda name: (-_width(parts[name][2]["dtype"]), name))
    offset = 0
    for name in order:
        entry = parts[name][2]
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        joined[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, offset + length]}
        offset += length
    head = json.dumps(joined, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in order:
        path, data, entry = parts[name]
        yield from _pieces(path, data + entry["data_offsets"][0], data + entry["data_offsets"][1])


def _width(dtype: str) -> int:
    bits = re.search(r"(\d+)", dtype)
    return int(bits[1]) if bits else 8


def _pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(_CHUNK, end - begin))
            if not piece:
                raise DamagedError(f"{path} ended while it was read")
            begin += len(piece)
            yield piece


def sha256_of(files: Sequence[Path]) -> str:
    """sha256 of ``one_file``: the same before weights are taken and after."""
    digest = hashlib.sha256()
    for piece in one_file(files):
        digest.update(piece)
    return digest.hexdigest()


# --- taking ------------------------------------------------------------------------------------------------------------


def take(source: str, parts: Sequence[str], target: Path, what: str, *, sha256: str = "") -> list[str]:
    """Bring one model (``config.json`` and all its weights as ``model.safetensors``) into the folder ``target``.

    ``parts``: what it is called in a pipeline, such as ("vae",) or ("transformer",); ``what``: the key or option that
    ``source`` comes from, for messages. Returns the names of the two files; the caller writes the card over them.
    Raises ArchipelError where ``sha256`` is given and the weights are not those, and as ``find`` does.
    """
    (place, *_) = find(source, parts, what, weights=True)
    read_config(place, what)
    config, files = place.file(CONFIG), weight_files(place, what)
    assert config is not None
    _header(files[0])
    found = sha256_of(files) if sha256 else ""
    if found != sha256:
        raise ArchipelError(
            f"{what} {source!r} is not what the run was made for: its weights have sha256 {found[:12]}, run.toml says "
            f"{sha256[:12]}: restore them, or make a new run with them"
        )
    target.mkdir(parents=True, exist_ok=True)
    bring([config], target / CONFIG)
    bring(files, target / WEIGHTS)
    return [CONFIG, WEIGHTS]


def take_text(places: Mapping[str, Place], target: Path, what: str) -> list[str]:
    """Bring text encoders and tokenizers into ``target``, each under its name there (``text_encoder``, ``tokenizer``, ...):
    encoders as ``take`` does, tokenizers' JSON, text and vocabulary files. Returns relative names, for the card."""
    taken = []
    for name, place in places.items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        if name.startswith("text_encoder"):
            config = place.file(CONFIG)
            assert config is not None  # read_config has seen it
            wanted: dict[str, list[Path]] = {CONFIG: [config], WEIGHTS: weight_files(place, what)}
        else:
            wanted = {path.name: [path] for path in tokenizer_files(place, what)}
        for file, sources in wanted.items():
            bring(sources, folder / file)
            taken.append(f"{name}/{file}")
    return taken


def tokenizer_files(place: Place, what: str) -> list[Path]:
    """A tokenizer's own files. Raises ConfigError where there are none, or code of its own is asked for."""
    names = sorted(
        path.name
        for path in place.folder.iterdir()
        if path.suffix in _TOKENIZER and path.is_file() and _PLAIN.fullmatch(path.name)
    )
    files = [place.folder / name for name in names if ".index." not in name]
    if not any(re.fullmatch(r"tokenizer\.json|vocab\.(json|txt)|.*\.model", name) for name in names):
        raise ConfigError(f"{what} {place.said!r}: {place.folder} holds no tokenizer")
    if "tokenizer_config.json" in names:
        read_config(place, what, "tokenizer_config.json")
    for path in files:
        place.file(path.name)
    return files


def bring(sources: Sequence[Path], target: Path) -> None:
    """Link one file where the disk allows it, else copy; join several (see ``one_file``). Aside and renamed."""
    real = [path.resolve() for path in sources]
    if len(real) == 1 and _linked(real[0], target):
        return
    with store.aside(target) as temporary, open(temporary, "wb") as file:
        if len(real) == 1:
            with open(real[0], "rb") as source:
                shutil.copyfileobj(source, file, _CHUNK)
        else:
            for piece in one_file(real):
                file.write(piece)


def _linked(source: Path, target: Path) -> bool:
    """Whether ``target`` is now a hard link to ``source``, put there in one step."""
    with contextlib.suppress(OSError):
        if target.exists() and target.samefile(source):
            return True
    name = tempfile.mktemp(prefix=f".{target.stem}.", suffix=f".tmp{target.suffix}", dir=target.parent)
    try:
        os.link(source, name)
    except OSError:  # another disk, a file system without links, somebody else's file
        return False
    try:
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return True
