"""Experts that are adapters over one base: out as the base once and a few megabytes each, in as a bank of them.

transformer/                             the base as this run uses it: diffusers' class and names
expert_0/pytorch_lora_weights.safetensors    one adapter, as ``load_lora_weights`` of a pipeline reads it, and config.json
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from archipel import store
from archipel.ensemble.parts import Source
from archipel.errors import DamagedError, MissingStageError

LORA = "pytorch_lora_weights.safetensors"
BASE = "transformer"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def is_adapted(facts: Mapping[str, Any]) -> bool:
    """Whether an export's experts are adapters."""
    experts = facts.get("experts")
    return isinstance(experts, Mapping) and any("lora" in one for one in experts.values())


# --- out ---------------------------------------------------------------------------------------------------------------


def write_base(source: Source, target: Path) -> None:
    """The base of a run's experts, as they use it (what reads given frames included), saved by diffusers."""
    from archipel.training import bases

    network, _ = bases.load(source.run.config, source.base())
    network.network.save_pretrained(str(target), safe_serialization=True)


def write_adapter(folder: Path, target: Path) -> dict[str, Any]:
    """A trained adapter under diffusers' name, held to its card, which is returned."""
    card = store.read_card(folder)
    if card is None:
        raise MissingStageError(f"{folder} is not finished")
    target.mkdir(parents=True)
    shutil.copyfile(folder / _CONFIG, target / _CONFIG)
    shutil.copyfile(folder / _WEIGHTS, target / LORA)
    if store.sha256_file(target / LORA) != card["files"].get(_WEIGHTS, {}).get("sha256"):
        raise DamagedError(f"{folder / _WEIGHTS} is not what its card says: run `archipel verify`, or try again")
    return card


def write_merged(source: Source, folder: Path, target: Path) -> dict[str, Any]:
    """Base and adapter as one whole network, saved by diffusers; the adapter's card."""
    from archipel.backbones import lora
    from archipel.training import bases

    network, sha256 = bases.load(source.run.config, source.base())
    _, tensors = lora.read(folder, sha256)
    made = network.network
    made.load_state_dict(lora.merged(made.state_dict(), tensors), assign=True)
    made.save_pretrained(str(target), safe_serialization=True)
    card = store.read_card(folder)
    assert card is not None  # it has just been read
    return card


# --- in ----------------------------------------------------------------------------------------------------------------


class Adapters:
    """The adapters of a loaded export on its base: ``velocities[name]`` is an expert, ``tensors[name]`` its file.

    Raises DamagedError where a file is not the adapter that ``facts`` (the export's entry "archipel") describe.
    """

    def __init__(self, network: Any, facts: Mapping[str, Any], folder: Path) -> None:
        from archipel.backbones import lora
        from archipel.exchange.adapters import denoiser

        named = {**facts["experts"], **({"monolith": facts["monolith"]} if "monolith" in facts else {})}
        plain = {key: value for key, value in next(iter(named.values())).items() if key != "lora"}
        bank = lora.Bank(denoiser(network, plain), "")
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.velocities: dict[str, Any] = {}
        for name, about in named.items():
            path = folder / (f"expert_{name}" if name.isdigit() else name) / LORA
            self.tensors[name] = _read(path, network, about)
            self.velocities[name] = bank.add(dict(about), self.tensors[name], path)

    def save(self, folder: Path) -> None:
        """All adapters, each in its own folder."""
        for name, tensors in self.tensors.items():
            path = folder / (f"expert_{name}" if name.isdigit() else name) / LORA
            arrays = {key: value.detach().float().cpu().numpy() for key, value in tensors.items()}
            store.write_tensors(path, arrays, metadata={"format": "pt"})


def _read(path: Path, network: Any, about: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from archipel.backbones import adapters, base

    try:
        part = about["lora"]
        adapter = adapters.Adapter(int(part["rank"]), float(part["alpha"]), str(part["targets"]))
        wanted = adapters.shapes(base.diffusers_config(network), adapter)
        tensors: dict[str, Tensor] = load_file(str(path))
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is no adapter that can be used ({error})") from error
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DamagedError(f"{path}: tensor {odd[0]!r} is {found.get(odd[0])}, the adapter has {wanted.get(odd[0])}")
    return tensors


def without(network: Any) -> Any:
    """The base alone, as a model of its own on the same memory: what is saved of it."""
    import torch

    state = {
        name.replace(".base_layer.", "."): value for name, value in network.state_dict().items() if ".lora_" not in name
    }
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        plain = type(network)(**config)
    plain.load_state_dict(state, assign=True)
    return plain
