"""What a run trained and fitted, loaded on demand, from wherever it lies.

A ``Source`` says what is there and hands out folders on this disk; ``RunFolder`` is a run's own folder,
``archipel.islands.remote.BucketRun`` fetches what an owner admitted. Nothing here knows about buckets: this package lies
below islands, so an address that is no folder is opened by what ``OPENER`` names, looked up by name when one is given.
"""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from archipel import store
from archipel.config import RunConfig
from archipel.contracts import Codec, Conditioning, Posterior, TextEncoder, Velocity
from archipel.errors import ArchipelError, MissingStageError
from archipel.routing.router import CALIBRATION, load_router, read_calibration
from archipel.run import DAMAGED, ROUTER, Run

if TYPE_CHECKING:
    from archipel.backbones.lora import Bank

OPENER = "archipel.islands.remote:open_source"
"""``open_source(url, run_id) -> Source`` for runs that are no folders, as ``module:function``."""
PUBLISHED = "published.json"  # a folder that holds it is a bucket on this disk, not a run's folder


class Source(Protocol):
    """Where the trained parts of one run lie. ``where`` is how a person calls it: a folder or a URL.

    ``uncalibrated``: whether a router without a calibration is used as it is (where it cannot be calibrated).
    """

    run: Run
    where: str
    uncalibrated: bool

    def look(self, *, fresh: bool = True) -> dict[str, str]:
        """Jobs whose part can be used now -> its version, another string for other bytes. Cheap.

        ``fresh=False`` allows an answer of some seconds ago, where asking costs something.
        """
        ...

    def folder(self, name: str, version: str) -> Path:
        """A folder on this disk with the card, configuration and weights of that version (or of a later one).

        Raises ArchipelError saying what is wrong with a version that is ``DAMAGED``.
        """
        ...

    def codec(self) -> Path:
        """A folder on this disk with the codec."""
        ...

    def base(self) -> Path:
        """A folder on this disk with the base that experts are adapters of, where they are."""
        ...

    def text(self) -> Path:
        """A folder on this disk with the text encoders, where they were brought from outside."""
        ...

    def how(self, names: Sequence[str]) -> str:
        """What to do to get the parts ``names``, which are not there."""
        ...


class RunFolder:
    """A run's own folder: what was trained (or pulled) there."""

    uncalibrated = False

    def __init__(self, run: Run) -> None:
        self.run, self.where = run, str(run.root)

    def look(self, *, fresh: bool = True) -> dict[str, str]:
        found = {name: self._version(name) for name in self.run.job_names}
        return {name: version for name, version in found.items() if version is not None}

    def _version(self, name: str) -> str | None:
        folder = self.run.expert(name)
        try:
            if not self.run.done(folder) or (name == ROUTER and read_calibration(self.run) is None):
                return None
            names = ("card.json", CALIBRATION) if name == ROUTER else ("card.json",)
            return ".".join(store.sha256_file(folder / file) for file in names)
        except FileNotFoundError:  # taken away while we looked
            return None
        except ArchipelError:
            return DAMAGED  # whoever asks for it is told why, others go on

    def folder(self, name: str, version: str) -> Path:
        folder = self.run.expert(name)
        if version == DAMAGED:
            self.run.need(folder, "verify")
            read_calibration(self.run)
        return folder

    def codec(self) -> Path:
        self.run.need(self.run.codec, "prepare")
        return self.run.codec

    def base(self) -> Path:
        self.run.need(self.run.base, "prepare" if self.run.config.expert.weights else "train RUN trunk")
        return self.run.base

    def text(self) -> Path:
        self.run.need(self.run.text, "prepare")
        return self.run.text

    def how(self, names: Sequence[str]) -> str:
        verbs = ["route" if name == ROUTER else "train" for name in names]
        ends = ["" if name == ROUTER else f" {name}" for name in names]
        commands = [f"`archipel {verb} {self.where}{end}`" for verb, end in zip(verbs, ends, strict=True)]
        return "run " + "; ".join(commands)


def open_source(where: Path | str, run_id: str | None = None) -> Source:
    """The source at a folder or a URL. Raises ArchipelError where there is no run, or one of another id."""
    if "://" in str(where) or (Path(where) / PUBLISHED).is_file():
        return cast(Source, pkgutil.resolve_name(OPENER)(str(where), run_id))
    run = Run.open(where)
    if run_id is not None:
        run.expect(run_id)
    return RunFolder(run)


class Parts:
    """Codec, text encoder, router and experts of a source. What was loaded is kept until another version is there."""

    def __init__(self, source: Run | Source, device: str = "cpu") -> None:
        self.source: Source = RunFolder(source) if isinstance(source, Run) else source
        self.device = device
        self._known: dict[str, str] | None = None
        self._loaded: dict[tuple[str, str], object] = {}
        self._lock = threading.RLock()

    @property
    def run(self) -> Run:
        return self.source.run

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @cached_property
    def codec(self) -> Codec:
        from archipel.encoders.codecs import load_codec

        return cast(Codec, load_codec(self.source.codec()))

    @cached_property
    def text(self) -> TextEncoder:
        from archipel.encoders.text import open_text

        return open_text(self.config.text, self.source.text() if self.config.text.path else None)

    @property
    def router(self) -> Posterior:
        """The calibrated router."""

        def load(folder: Path) -> Posterior:
            return load_router(self.run, folder, uncalibrated=self.source.uncalibrated).to(self.device)

        return cast(Posterior, self._load(ROUTER, load))

    def expert(self, name: str) -> Velocity:
        """An expert or the monolith; loaded when it is first called, and the same bytes from then on."""
        return _Lazy(self, name)

    def denoiser(self, name: str) -> Velocity:
        """A trained network, loaded now. Where experts are adapters, they share the base's memory and take turns on it."""
        from archipel.backbones.registry import load_denoiser

        def load(folder: Path) -> Velocity:
            if self.config.expert.lora_rank:
                return self._bank.load(folder)
            return cast(Velocity, load_denoiser(folder).eval().to(self.device))

        return cast(Velocity, self._load(name, load))

    @cached_property
    def _bank(self) -> Bank:
        from archipel.backbones.lora import Bank
        from archipel.training.bases import load

        network, sha256 = load(self.config, self.source.base())
        return Bank(network.to(self.device), sha256)

    def _load(self, name: str, load: Callable[[Path], object]) -> object:
        with self._lock:
            self.check([name])
            version = self.available()[name]
            if (name, version) not in self._loaded:
                folder = self.source.folder(name, version)
                self._loaded[name, version] = load(folder)
            return self._loaded[name, version]

    def available(self) -> dict[str, str]:
        """Jobs whose part can be used -> its version, as of the last look."""
        with self._lock:
            if self._known is None:
                self._known = self.source.look()
            return self._known

    def refresh(self, *, fresh: bool = True) -> list[str]:
        """Look again; returns the names that are new, or there in another version. Loading waits for their first use.

        What was loaded and is gone or replaced is let go; samples that are on their way keep what they began with.
        """
        with self._lock:
            before, now = self._known or {}, self.source.look(fresh=fresh)
            self._known = now
            for name, version in [key for key in self._loaded if now.get(key[0]) != key[1]]:
                del self._loaded[name, version]
            return [name for name, version in now.items() if before.get(name) != version]

    def check(self, names: Sequence[str]) -> None:
        """Raise MissingStageError naming every one of ``names`` that is not there, and what makes it."""
        if any(name not in self.available() for name in names):
            self.refresh()
        missing = [name for name in names if name not in self.available()]
        if missing:
            raise MissingStageError(
                f"not there yet in {self.source.where}: {', '.join(missing)}: {self.source.how(missing)}"
            )

    def latent_shape(self) -> tuple[int, int, int, int]:
        clips = self.config.clips
        return self.codec.latent_shape(clips.frames, clips.size, clips.size)


class _Lazy:
    """A part's velocity, loaded at its first call and held: a clip is never begun by one version and ended by another."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name
        self._network: Velocity | None = None

    @property
    def adapted(self) -> Velocity | None:
        """The expert itself where it is an adapter, which others on its base can be asked together with."""
        if not self._parts.config.expert.lora_rank:
            return None
        return self._held()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self._held()(x, t, cond)

    def _held(self) -> Velocity:
        if self._network is None:
            self._network = self._parts.denoiser(self._name)
        return self._network
