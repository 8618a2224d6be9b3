"""Which adapter belongs to which diffusers class; building and loading a network of any of them.

A network is described by the configuration that diffusers writes: ``_class_name`` and constructor arguments.
``networks`` makes it from ``run.toml``; a folder has it in ``config.json``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones import base, networks
from archipel.config import RunConfig
from archipel.errors import DamagedError

_ADAPTERS = {
    "FluxTransformer2DModel": "archipel.backbones.flux:FluxDenoiser",
    "WanTransformer3DModel": "archipel.backbones.wan:WanDenoiser",
    "LTXVideoTransformer3DModel": "archipel.backbones.ltx:LTXDenoiser",
    "HunyuanVideoTransformer3DModel": "archipel.backbones.hunyuan:HunyuanDenoiser",
    "CogVideoXTransformer3DModel": "archipel.backbones.cogvideox:CogVideoXDenoiser",
}
_MAX_LAYERS = 1000  # a stranger's config.json must not make us build forever
_MAX_BUFFERS = 1 << 28  # numbers in tables that no file holds (RoPE): far more than any real network has


def adapter(name: Any, where: Path | str = "config.json") -> type[base.Denoiser]:
    """The adapter of a diffusers class. Raises DamagedError, naming ``where`` and what there is, for any other."""
    if name not in _ADAPTERS:
        raise DamagedError(f"{where}: _class_name is {name!r}, not one of {', '.join(_ADAPTERS)}")
    module, kind = _ADAPTERS[name].split(":")
    found: type[base.Denoiser] = getattr(import_module(module), kind)
    return found


# --- networks ----------------------------------------------------------------------------------------------------------


def _construct(config: dict[str, Any], where: Path | str) -> Any:
    """diffusers' model of a configuration, on the default device. Raises DamagedError for one that describes none."""
    import diffusers

    name = adapter(config.get("_class_name"), where).CLASS
    for key, value in config.items():
        limited = key.startswith("num_") and key.endswith("layers")
        if limited and not (type(value) is int and 0 <= value <= _MAX_LAYERS):
            raise DamagedError(f"{where}: {key} is {value!r}, expected 0 to {_MAX_LAYERS}")
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        return getattr(diffusers, name)(**known)
    except Exception as error:  # a stranger's values: whatever diffusers stumbles over
        raise DamagedError(f"{where} does not describe a {name} ({type(error).__name__}: {error})") from error


def meta_network(config: dict[str, Any], where: Path | str = "config.json") -> Any:
    """The network of a configuration without memory: shapes only. Raises DamagedError, see ``_construct``."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return _construct(config, where)


def meta_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the weights of a configuration."""
    return {name: tuple(value.shape) for name, value in meta_network(config).state_dict().items()}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """What this thread builds gets its tables (buffers) in memory, its parameters without."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    own = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or threading.get_ident() != own:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()


def build_network(
    config: dict[str, Any],
    tensors: dict[str, Tensor] | None = None,
    where: Path | str = "config.json",
    weights: Path | str = base.WEIGHTS,
) -> Any:
    """The network of a configuration: fresh, from torch's random state, or filled with ``tensors`` (frozen, eval mode).

    Given tensors, it is built without memory and compared with them by name and shape first: a configuration that does
    not fit its weights, a stranger's one of absurd size included, raises DamagedError (naming ``where`` and
    ``weights``) before anything is allocated. The tensors are taken over, not copied.
    """
    if tensors is None:
        return _construct(config, where)
    network = meta_network(config, where)
    check_shapes({name: tuple(value.shape) for name, value in tensors.items()}, network, where, weights)
    if not _complete(network):
        tables = sum(table.numel() for table in network.buffers())
        if tables > _MAX_BUFFERS:
            raise DamagedError(f"{where} asks for tables of {tables} numbers: at most {_MAX_BUFFERS} are believed")
        with _parameters_on_meta():
            network = _construct(config, where)
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()


def check_shapes(
    found: dict[str, tuple[int, ...]], network: nn.Module, where: Path | str, weights: Path | str = base.WEIGHTS
) -> None:
    """Hold names and shapes to those of a network (on any device). Raises DamagedError naming the first that differs."""
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DamagedError(
            f"{weights} does not fit {where}: {len(odd)} tensors differ, first {odd[0]!r}: "
            f"the configuration wants {wanted.get(odd[0])}, the file has {found.get(odd[0])}"
        )


def _complete(network: nn.Module) -> bool:
    """Whether the state dict holds all that the network has (no table that only the constructor makes)."""
    state = network.state_dict()
    return all(name in state for name, _ in network.named_buffers())


# --- experts -----------------------------------------------------------------------------------------------------------


def build_expert(config: RunConfig, *, seed: int, clusters: int = 0) -> base.Denoiser:
    """A fresh expert (or monolith) on the CPU: a function of the configuration and ``seed``; its output is zero.

    ``clusters``: K for a network that is told the cluster; what reads it starts at zero, and all else is as without. So
    does what reads given frames (``expert.tasks``). The global random state is left as it was.
    """
    plain = networks.expert_network(config, image=False)
    kind = adapter(plain["_class_name"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU one only
        network = build_network(plain)
        base.zero_start(network, kind.ZEROED)
        told = networks.expert_network(config, clusters=clusters)
        if told != plain:
            state = widened(network.state_dict(), plain, told)
            network = build_network(told)
            network.load_state_dict(state)
    return kind(network, networks.expert_facts(config, clusters))


def widened(state: dict[str, Tensor], plain: dict[str, Any], told: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of the network ``plain`` for ``told``, which reads given frames or the cluster as well: what reads them is zero.

    Weights that know them already stay as they are; others, too, for whoever compares shapes to name.
    """
    kind, before, after = adapter(told["_class_name"]), meta_shapes(plain), meta_shapes(told)
    for name in filter(None, (kind.INPUT, kind.POOLED)):
        if name in state and tuple(state[name].shape) == before[name] != after[name]:
            state = base.widened(state, name, after[name][1])
    return state


def load_denoiser(folder: Path) -> base.Denoiser:
    """A trained expert or monolith on the CPU, in eval mode. Raises MissingStageError, DamagedError."""
    facts, config, tensors = base.read_folder(folder, f"train RUN {folder.name}")
    kind = adapter(config.get("_class_name"), folder / base.CONFIG)
    check_facts(facts, config, folder / "card.json")
    return kind(build_network(config, tensors, folder / base.CONFIG, folder / base.WEIGHTS), facts).eval()


def check_facts(facts: dict[str, Any], config: dict[str, Any], where: Path | str) -> None:
    """Whether a card's ``network`` describes an expert of this configuration. Raises DamagedError, naming ``where``."""
    prediction, text = facts.get("prediction"), facts.get("text_shape")
    if facts.get("role") != "expert" or prediction not in adapter(config.get("_class_name")).PREDICTIONS:
        raise DamagedError(f"{where}: network = {facts!r} does not describe an expert")
    clusters, patch = facts.get("clusters", 0), facts.get("patch", 1)
    told = type(clusters) is int and clusters > 0 if facts.get("condition", "none") == "cluster" else clusters == 0
    if not told or (clusters and text and config.get("pooled_projection_dim") != text[-1] + clusters):
        raise DamagedError(f"{where}: condition and clusters of network = {facts!r} do not fit its weights")
    switches = all(isinstance(facts.get(key, False), bool) for key in ("image", "mask_text"))
    if not switches or type(patch) is not int or patch < 1:
        raise DamagedError(f"{where}: patch, image and mask_text of network = {facts!r} are a number and two switches")
