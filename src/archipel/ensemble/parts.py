"""What a run trained and fitted, loaded on demand, from wherever it lies; where there is a bound on memory, let go again.

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

from archipel import box, store
from archipel.config import RunConfig
from archipel.contracts import Codec, Conditioning, Posterior, TextEncoder, Velocity
from archipel.ensemble.shelf import Shelf
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.routing.router import CALIBRATION, load_router, read_calibration
from archipel.run import DAMAGED, ROUTER, Run

if TYPE_CHECKING:
    from archipel.backbones.lora import Bank

PIPELINE = "archipel.exchange.loaded:open_parts"
"""``open_parts(folder, device) -> Parts`` for folders that ``archipel export`` wrote, as ``module:function``."""
EXPORTED = "model_index.json"  # a folder that holds it is an export
OPENER = "archipel.islands.remote:open_source"
"""``open_source(url, run_id) -> Source`` for runs that are no folders, as ``module:function``."""
REMOTE = "archipel.remote.known:joined"
"""``joined(source) -> Source`` with the experts that this machine's site.toml has elsewhere, as ``module:function``."""
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


class BoxFolder(RunFolder):
    """A model that ``archipel pack`` made: a run's folder with what generating needs, and nothing that could make the rest."""

    def how(self, names: Sequence[str]) -> str:
        return f"it holds experts and router only; {box.CARD} in it says how the run is made again"


def open_source(where: Path | str, run_id: str | None = None) -> Source:
    """The source at a folder, a URL, or ``box:``. Raises ArchipelError where there is no run, or one of another id."""
    where = box.locate(where)
    if "://" in str(where) or (Path(where) / PUBLISHED).is_file():
        return cast(Source, pkgutil.resolve_name(OPENER)(str(where), run_id))
    run = Run.open(where)
    if run_id is not None:
        run.expect(run_id)
    if box.is_box(run.root):
        box.facts(run.root)
        return BoxFolder(run)
    return RunFolder(run)


def open_parts(
    where: Path | str | None = None,
    device: str = "cpu",
    *,
    run_id: str | None = None,
    memory: int | None = None,
    host: int | None = 0,
) -> Parts:
    """The parts of a run's folder, of a bucket, of an export, or (None, ``box:``) of the model that ships with the package.

    Raises ArchipelError where there is no run, or not ``run_id``."""
    where = box.locate(where)
    if "://" in str(where) or not (Path(where) / EXPORTED).is_file():
        source = cast(Source, pkgutil.resolve_name(REMOTE)(open_source(where, run_id)))
        return Parts(source, device, memory=memory, host=host)
    if memory is not None:
        raise ArchipelError(f"{where} is an export, which is loaded whole: a bound on memory is for runs and buckets")
    parts = cast(Parts, pkgutil.resolve_name(PIPELINE)(where, device))
    if run_id is not None and not parts.run_id.startswith(run_id):
        raise ArchipelError(f"{where} was exported from the run {parts.run_id[:12]}, not from {run_id[:12]}")
    return parts


class Parts:
    """Codec, text encoder, router and experts of a source. What was loaded is kept until another version is there.

    memory: bytes of networks on the device at a time, None for no bound; host: bytes of those that left a GPU, kept in the host's
    memory (see ``shelf``). With a bound threads take turns at networks, and a clip whose expert was replaced on disk while it
    was on its way ends with an error.
    """

    def __init__(
        self, source: Run | Source, device: str = "cpu", *, memory: int | None = None, host: int | None = 0
    ) -> None:
        if memory is not None and memory < 1:
            raise ArchipelError(f"memory = {memory} cannot be used: give a number of bytes, or None for no bound")
        self.source: Source = RunFolder(source) if isinstance(source, Run) else source
        self.device = device
        self._known: dict[str, str] | None = None
        self.shelf = Shelf(memory, host, device)
        self._cards: dict[tuple[str, str], str] = {}
        self.lock = threading.RLock()

    @property
    def run(self) -> Run:
        return self.source.run

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def run_id(self) -> str:
        return self.run.id

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

        return cast(Posterior, self._load(ROUTER, load, pinned=True))

    def expert(self, name: str) -> Velocity:
        """An expert or the monolith; loaded when it is first called, and the same bytes from then on. Or a remote one."""
        remote = getattr(self.source, "remote", None)
        found = None if remote is None else remote(name)
        return _Lazy(self, name) if found is None else cast(Velocity, found)

    def denoiser(self, name: str, version: str | None = None) -> Velocity:
        """A trained network, loaded now. Where experts are adapters, they share the base's memory and take turns on it.

        ``version``: the one that a clip began with. Raises ArchipelError where that one is there no more.
        """
        from archipel.backbones.registry import load_denoiser

        def load(folder: Path) -> Velocity:
            if self.config.expert.lora_rank:
                return self._bank().load(folder)
            return cast(Velocity, load_denoiser(folder).eval().to(self.device))

        with self.lock:
            if self.config.expert.lora_rank:
                self._bank()  # takes its place before an adapter does
            return cast(Velocity, self._load(name, load, version))

    def _bank(self) -> Bank:
        from archipel.backbones.lora import Bank
        from archipel.training.bases import load

        def make() -> Bank:
            network, sha256 = load(self.config, self.source.base())
            return Bank(network.to(self.device), sha256)

        def size() -> int:
            return _size(self.source.base())

        return cast("Bank", self.shelf.get(("base", ""), make, size, pinned=True))

    def _load(
        self, name: str, load: Callable[[Path], object], version: str | None = None, *, pinned: bool = False
    ) -> object:
        with self.lock:
            self.check([name])
            key = (name, version or self.available()[name])
            adapter = bool(self.config.expert.lora_rank) and name != ROUTER

            def fetch() -> object:
                if adapter:
                    self._bank().names()  # what made room leaves the base now
                return load(self._folder(*key))

            def size() -> int:
                return _size(self._folder(*key))

            # An adapter's tensors are copied into the base.
            passing = size() if adapter and self.shelf.bound is not None and key not in self.shelf else 0
            return self.shelf.get(key, fetch, size, pinned=pinned, passing=passing, measure=not adapter)

    def _folder(self, name: str, version: str) -> Path:
        """The folder of a version, which is the one that was read before. Raises ArchipelError where it was replaced."""
        folder = self.source.folder(name, version)
        try:
            card = store.sha256_file(folder / "card.json")
        except FileNotFoundError as error:
            raise DamagedError(f"{folder} was taken away while a clip was on its way: generate it again") from error
        if self.shelf.bound is not None and self._cards.setdefault((name, version), card) != card:
            raise ArchipelError(
                f"{folder} was replaced while a clip was on its way, and the bound on memory had let go of what it began "
                "with: generate it again"
            )
        return folder

    def available(self) -> dict[str, str]:
        """Jobs whose part can be used -> its version, as of the last look."""
        with self.lock:
            if self._known is None:
                self._known = self.source.look()
            return self._known

    def refresh(self, *, fresh: bool = True) -> list[str]:
        """Look again; returns the names that are new, or there in another version. Loading waits for their first use.

        What was loaded and is gone or replaced is let go; samples that are on their way keep what they began with.
        """
        with self.lock:
            before, now = self._known or {}, self.source.look(fresh=fresh)
            self._known = now
            for name, version in [key for key in self.shelf.held() if key[1] and now.get(key[0]) != key[1]]:
                self.shelf.drop((name, version))
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


def _size(folder: Path) -> int:
    """Bytes of a folder's weights, as their file has them and as they are loaded."""
    try:
        return (folder / "model.safetensors").stat().st_size
    except OSError:
        return 0  # whoever loads it says what is wrong


class _Lazy:
    """A part's velocity, loaded at its first call and held: a clip is never begun by one version and ended by another.

    Where memory is bounded it is asked for at every call, in the version that it began with, and used under the lock.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name
        self._version: str | None = None
        self._network: Velocity | None = None

    @property
    def _bounded(self) -> bool:
        return self._parts.shelf.bound is not None

    @property
    def ready(self) -> bool:
        """Whether it is in memory now."""
        return not self._bounded or (self._name, self._version) in self._parts.shelf

    @property
    def adapted(self) -> Velocity | None:
        """The expert itself where it is an adapter, which others on its base can be asked together with."""
        if self._bounded or not self._parts.config.expert.lora_rank:
            return None
        return self._held()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if not self._bounded:
            return self._held()(x, t, cond)
        with self._parts.lock:
            self._parts.check([self._name])
            self._version = self._version or self._parts.available()[self._name]
            return self._parts.denoiser(self._name, self._version)(x, t, cond)

    def _held(self) -> Velocity:
        if self._network is None:
            self._network = self._parts.denoiser(self._name)
        return self._network
