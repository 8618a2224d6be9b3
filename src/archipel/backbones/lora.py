"""Experts that are low-rank adapters over one frozen base (peft): attached to train, saved alone, loaded beside others.

Adapters start at B = 0, so that the start is the base (Hu et al., LoRA, arXiv 2106.09685, section 4.1). Files have diffusers'
own names with s B for B (see ``adapters``): ``transformer.load_lora_adapter`` and ``pipe.load_lora_weights`` read them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archipel.backbones import adapters, base
from archipel.backbones.adapters import NAME, PREFIX, Adapter
from archipel.contracts import Conditioning
from archipel.errors import ArchipelError, DamagedError


def attach(denoiser: base.Denoiser, adapter: Adapter, sha256: str, seed: int) -> None:
    """Freeze a denoiser and put a fresh adapter on it, a function of ``seed``: its output stays what it was.

    ``sha256``: of the base's weights, for the card. The global random state is left as it was.
    Raises ArchipelError where peft is not installed.
    """
    network = denoiser.network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU one only
        _inject(network, adapter.rank, adapter.alpha, _targets(network, adapter.targets), NAME)
    for name, p in network.named_parameters():
        p.requires_grad_(".lora_" in name)
    denoiser.facts["lora"] = adapter.facts(sha256)


def _inject(network: Any, rank: int, alpha: float, targets: list[str], name: str) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ArchipelError(
            "experts that are adapters (expert.lora_rank) need the package peft: install archipel[lora]"
        ) from error
    about: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "lora_dropout": 0.0}
    with _quiet():
        network.add_adapter(LoraConfig(**about), name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings that a network has more than one adapter, and that another one is active then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def _targets(network: Any, targets: str) -> list[str]:
    config = base.diffusers_config(network)
    return [one.name for one in adapters.chosen(config, targets)]


@torch.no_grad()
def halve(backbone: base.Backbone) -> None:
    """Keep the frozen linear layers of an adapted network's blocks in bfloat16: for training under bfloat16 autocast, which
    would make the same numbers of them in every forward. Half of the base's memory; other networks are left alone."""
    if not is_adapted(backbone.facts):
        return
    for block in backbone.blocks():
        for module in block.modules():
            if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
                module.to(torch.bfloat16)


# --- saving ----------------------------------------------------------------------------------------------------------


def is_adapted(facts: Mapping[str, Any]) -> bool:
    """Whether a network's facts are those of an adapter."""
    return "lora" in facts


def parameters(backbone: base.Backbone) -> dict[str, Tensor]:
    """What is saved of a backbone, by the names in the file: all its tensors, or those of its adapter (as they are; see
    ``to_file``)."""
    if not is_adapted(backbone.facts):
        return dict(backbone.network.state_dict())
    state = backbone.network.state_dict()
    names = [*adapters.shapes(base.diffusers_config(backbone.network), _adapter(backbone.facts))]
    return {name: state[adapters.inside(name)] for name in names}


def to_file(facts: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter's arrays as its file has them: B with its scale. Others are left as they are."""
    if not is_adapted(facts):
        return dict(state)
    scale = np.float32(_adapter(facts).scale)
    return {name: array * scale if ".lora_B." in name else array for name, array in state.items()}


def _adapter(facts: Mapping[str, Any]) -> Adapter:
    about = facts["lora"]
    return Adapter(int(about["rank"]), float(about["alpha"]), str(about["targets"]))


# --- loading ---------------------------------------------------------------------------------------------------------


def read(folder: Path, sha256: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of the adapter in ``folder``, held to its card; ``sha256``: of the base that is at hand.

    Raises MissingStageError, DamagedError where it is no adapter, one of another base, or not of its own configuration.
    """
    facts, config, tensors = base.read_folder(folder, f"train RUN {folder.name}")
    try:
        adapter, of = _adapter(facts), facts["lora"]["base"]
        wanted = adapters.shapes(config, adapter)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{folder / 'card.json'}: network = {facts!r} does not describe an adapter") from error
    if of != sha256:
        raise DamagedError(
            f"{folder} is an adapter of the base {str(of)[:12]}, the base of this run is {sha256[:12]}: it was trained on "
            "other weights; train it again"
        )
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DamagedError(
            f"{folder / base.WEIGHTS} does not fit its card: {len(odd)} tensors differ, first {odd[0]!r}: the adapter has "
            f"{wanted.get(odd[0])}, the file {found.get(odd[0])}"
        )
    return facts, tensors


def load(folder: Path, denoiser: base.Denoiser, sha256: str) -> base.Denoiser:
    """The adapter in ``folder`` on a base of its own, which becomes that expert; in eval mode. Errors as ``read``."""
    facts, tensors = read(folder, sha256)
    _add(denoiser.network, facts, tensors, NAME)
    denoiser.facts = {**facts}
    return denoiser.requires_grad_(False).eval()


def _add(network: Any, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """An adapter beside those that are there; it is the active one then. The file's B has the scale in it."""
    rank = _adapter(facts).rank
    with torch.random.fork_rng(devices=[]):
        _inject(network, rank, float(rank), _targets(network, str(facts["lora"]["targets"])), name)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for key, value in tensors.items():
            module, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
            part = modules[module].lora_A if rest.startswith("A") else modules[module].lora_B
            part[name].weight.copy_(value)
    network.requires_grad_(False)


class Bank:
    """One frozen base in memory and adapters on it: K experts for the memory of one and K small files.

    One adapter is active at a time, under a lock: threads that ask different experts wait for each other.
    """

    def __init__(self, denoiser: base.Denoiser, sha256: str) -> None:
        self.base, self.sha256 = denoiser.requires_grad_(False).eval(), sha256
        self._lock = threading.RLock()
        self._count = 0
        self._active: str | None = None
        self._unused: list[str] = []
        self._layers: list[Any] = []

    def load(self, folder: Path) -> Adapted:
        """The adapter in ``folder``; let go some time after nobody holds what is returned. Raises as ``read``."""
        return self.add(*read(folder, self.sha256), folder / "card.json")

    def add(self, facts: dict[str, Any], tensors: Mapping[str, Tensor], where: Path | str) -> Adapted:
        """An adapter as ``read`` gives it; ``where`` names it in errors. Raises DamagedError where the base is another's."""
        if (of := {key: value for key, value in facts.items() if key != "lora"}) != self.base.facts:
            raise DamagedError(f"{where}: network = {of!r} is not that of its base, {self.base.facts!r}")
        with self._lock:
            self._forget()
            name = f"expert_{self._count}"
            self._count += 1
            device = next(self.base.parameters()).device
            _add(self.base.network, facts, {key: value.to(device) for key, value in tensors.items()}, name)
            self._layers = _adapted_layers(self.base.network)
            self._active = name
            found = Adapted(self, name, facts)
        weakref.finalize(found, self._unused.append, name)  # at any moment and in any thread: it is only noted here
        return found

    def _forget(self) -> None:
        while self._unused:
            with _quiet():
                self.base.network.delete_adapters(self._unused.pop())
            self._active = None

    def names(self) -> list[str]:
        """Adapters in memory."""
        with self._lock:
            self._forget()
            return sorted(getattr(self.base.network, "peft_config", {}))

    def mixed(self, names: list[str], x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The velocity, every row with the adapter of its name: one pass of the base for all."""
        with self._lock:
            self._forget()
            with _naming(self._layers, names):
                return self.base.velocity(x, t, cond)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[base.Denoiser]:
        """The network with one adapter on it, for as long as the block runs."""
        with self._lock:
            self._forget()
            if self._active != name:
                for layer in self._layers:
                    # What peft's set_adapter does where nothing is trained; it looks at every parameter, 30 us a layer.
                    layer._active_adapter = [name]
                self._active = name
            yield self.base


@contextlib.contextmanager
def _naming(layers: list[Any], names: list[str]) -> Iterator[None]:
    """Every row of a batch goes through the adapter of its name, for as long as the block runs."""

    def name(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, keywords | {"adapter_names": names}

    handles = [layer.register_forward_pre_hook(name, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapted_layers(network: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


class Adapted:
    """An expert in a ``Bank``: a ``Velocity``, and what else is asked of a ``Denoiser`` in use."""

    def __init__(self, bank: Bank, name: str, facts: Mapping[str, Any]) -> None:
        self.bank, self.name, self.facts = bank, name, dict(facts)
        self.prediction, self.clusters = str(facts["prediction"]), 0

    @property
    def adapted(self) -> Adapted:
        """Itself: what ``ensemble.together`` looks for, behind whatever an expert is wrapped in."""
        return self

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with self.bank.using(self.name) as network:
            return network.predict(x, t, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with self.bank.using(self.name) as network:
            return network.velocity(x, t, cond)

    __call__ = velocity


# --- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's ``weights`` with an adapter's ``tensors`` (names and scale as in files) added: W + B A."""
    found = dict(weights)
    for name, A in tensors.items():
        if ".lora_A." not in name:
            continue
        B = tensors[name.replace(".lora_A.", ".lora_B.")]
        key = name.removeprefix(PREFIX).replace(".lora_A.", ".")
        found[key] = weights[key] + (B @ A).to(weights[key])
    return found
