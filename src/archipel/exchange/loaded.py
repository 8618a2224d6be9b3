"""The parts of a diffusers pipeline, as what ``Archipelago`` mixes: the same strategies and guidance, whoever loaded the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from archipel.config import RunConfig
from archipel.contracts import Codec, Conditioning, Posterior, TextEncoder, Velocity
from archipel.ensemble.parts import Parts
from archipel.errors import ArchipelError, DamagedError
from archipel.exchange import adapters
from archipel.routing.calibration import Calibration, identity
from archipel.routing.router import CalibratedRouter
from archipel.run import ROUTER, Run

Facts = Mapping[str, Any]


class Nowhere:
    """The ``Source`` of parts that are in memory: nothing can be fetched."""

    uncalibrated = False

    def __init__(self, where: str, names: Sequence[str]) -> None:
        self.where, self._names = where, list(names)

    @property
    def run(self) -> Run:
        raise ArchipelError(f"{self.where} is an export: the run that it came from is not here")

    def look(self, *, fresh: bool = True) -> dict[str, str]:
        return dict.fromkeys(self._names, "")

    def folder(self, name: str, version: str) -> Path:
        raise ArchipelError(f"{self.where} has its parts in memory, not in folders")

    def codec(self) -> Path:
        raise ArchipelError(f"{self.where} has its parts in memory, not in folders")

    def how(self, names: Sequence[str]) -> str:
        return f"it was exported without {', '.join(names)}"


class Called:
    """A network as a velocity (or a router's logits) that is called in the network's own dtype and answers in float32.

    ``turn`` is told before each call: where models take turns on a small GPU, the others go first.
    """

    def __init__(self, network: nn.Module, adapter: Callable[..., Tensor], turn: Callable[[], None]) -> None:
        self._network, self._adapter, self._turn = network, adapter, turn
        self.reads = getattr(adapter, "reads", "both")

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._turn()
        dtype = next(p.dtype for p in self._network.parameters() if p.is_floating_point())
        return self._adapter(x.to(dtype), t, cond.to(x.device, dtype)).float()


class LoadedParts(Parts):
    """Codec, text encoder, router and experts of a pipeline's components.

    ``facts``: the entry "archipel" of model_index.json (see ``folder``); ``components``: {"vae", "text_encoder", "tokenizer",
    "expert_0", ..., "router", ...}; ``turn(name)`` is called before the component ``name`` is; ``adapters``: experts (and the
    monolith) that are adapters over the component "transformer".
    Raises DamagedError where facts and components do not fit each other.
    """

    def __init__(
        self,
        facts: Facts,
        config: RunConfig,
        components: Mapping[str, Any],
        turn: Callable[[str], None],
        device: str,
        adapters: Mapping[str, Any] | None = None,
        where: str = "the exported folder",
    ) -> None:
        self._facts, self._config, self._components, self._turn = facts, config, dict(components), turn
        self._adapters = dict(adapters or {})
        names = [*facts.get("experts", {}), *(name for name in ("monolith", ROUTER) if self._has(name))]
        super().__init__(cast(Any, Nowhere(where, names)), device)

    def _has(self, name: str) -> bool:
        return name in self._adapters or self._components.get(name) is not None

    @property
    def config(self) -> RunConfig:
        return self._config

    @property
    def run_id(self) -> str:
        return str(self._facts.get("run", ""))

    @property
    def codec(self) -> Codec:
        return adapters.codec(self._components["vae"], self.config, self.device)

    @property
    def text(self) -> TextEncoder:
        return adapters.text(self._components, self.config)

    @property
    def router(self) -> Posterior:
        facts, network = self._facts.get(ROUTER), self._components.get(ROUTER)
        if network is None or not isinstance(facts, Mapping):
            self.check([ROUTER])
            raise DamagedError(f"{self.source.where} has a router and does not describe it")
        k = self.config.partition.k
        value = self._facts.get("calibration")
        fitted = isinstance(value, Mapping)
        calibration = Calibration.from_json(dict(value or {}), "calibration") if fitted else identity(np.full(k, 1 / k))
        if len(calibration.prior) != k:
            raise DamagedError(f"the calibration is for {len(calibration.prior)} experts, not for {k}")
        call = Called(network, adapters.router(network, dict(facts)), lambda: self._turn(ROUTER))
        return CalibratedRouter(call, calibration, fitted)

    def expert(self, name: str) -> Velocity:
        if name not in self.available():
            return cast(Velocity, _Absent(self, name))
        return self.denoiser(name)

    def denoiser(self, name: str, version: str | None = None) -> Velocity:
        self.check([name])
        if name in self._adapters:
            network = self._components["transformer"]
            return cast(Velocity, Called(network, self._adapters[name], lambda: self._turn("transformer")))
        facts = self._facts["experts"][name] if name.isdigit() else self._facts[name]
        key = f"expert_{name}" if name.isdigit() else name
        network = self._components[key]
        return cast(Velocity, Called(network, adapters.denoiser(network, dict(facts)), lambda: self._turn(key)))

    def refresh(self, *, fresh: bool = True) -> list[str]:
        return []


class _Absent:
    """An expert that the export has not: it has weight 0 and is never called."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._parts.check([self._name])
        raise AssertionError("unreachable")


def open_parts(folder: Path | str, device: str) -> LoadedParts:
    """What ``Archipelago`` mixes, from a folder that ``archipel export`` wrote; in memory as a whole.

    Raises ArchipelError where it is no export of ours, DamagedError where its parts do not fit each other.
    """
    from archipel.exchange.pipeline import ArchipelPipeline

    pipe: Any = ArchipelPipeline.from_pretrained(folder)
    return cast(LoadedParts, pipe.to(device).parts(str(folder)))
