"""The remote experts of this machine: where site.toml says they are, and which of them were admitted.

Of a run's folder that is ``RUN/site.toml`` and ``RUN/remote/<expert>.json``; of a bucket the ``site.toml`` in the user's own
configuration folder, and the admissions in the cache folder's copy of the run. Nothing of a run, a bucket, a card or a request
names an address.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel import FORMAT, store
from archipel.ensemble.parts import RunFolder, Source
from archipel.errors import ConfigError, DamagedError
from archipel.islands import site
from archipel.islands.site import RemoteSite
from archipel.remote import address
from archipel.remote.expert import Offer, RemoteExpert
from archipel.remote.link import Link
from archipel.remote.wire import Shapes
from archipel.run import Run

if TYPE_CHECKING:
    from archipel.remote.address import Origin

FOLDER = "remote"  # of a run's folder: admissions of remote experts
KIND = "admitted remote expert"
RETRY_AFTER = 30.0  # seconds for which an expert that failed is left out of new clips


@dataclass(frozen=True)
class Place:
    """Where expert ``name`` is asked: its section of site.toml, and the file that it is in."""

    name: str
    site: RemoteSite
    file: Path
    origin: Origin

    @property
    def where(self) -> str:
        """What an admission is bound to: origin and path."""
        return f"{self.origin}{self.origin.path}"

    def token(self) -> str | None:
        """The token, "" where none is wanted, None where its variable is not set."""
        return os.environ.get(self.site.token_env) or None if self.site.token_env else ""

    def link(self, token: str) -> Link:
        about = self.site
        return Link(self.origin, token, connect=about.connect, private=about.private, ca=about.ca)


def home_of(source: Source) -> tuple[Path, Path]:
    """(folder of site.toml, folder of the admissions) of a run."""
    if isinstance(source, RunFolder):
        return source.run.root, source.run.root / FOLDER
    import platformdirs

    return platformdirs.user_config_path("archipel"), source.run.root / FOLDER


def places(source: Source) -> dict[str, Place]:
    """The experts that site.toml has elsewhere. Raises ConfigError naming file and key, DamagedError."""
    folder, _ = home_of(source)
    if not (folder / site.NAME).exists():
        return {}
    own, names, found = isinstance(source, RunFolder), source.run.expert_names, {}
    for name, about in site.read(folder).remote.items():
        file = folder / site.NAME
        if name not in names:
            if own:
                raise ConfigError(f"{file}: [remote.{name}]: this run has experts 0 to {len(names) - 1}")
            continue
        found[name] = Place(name, about, file, address.parse(about.url, f"{file}: remote.{name}.url"))
    return found


# --- admissions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Admission:
    """What ``archipel admit RUN 2 --remote`` wrote down: of which run and expert, at which address, whose card (sha256) by
    whose key, what it reads, and how much it takes at once."""

    run: str
    name: str
    where: str
    sha256: str
    signer: str
    prediction: str
    latent: list[int]
    text: list[int]
    image: bool
    rows: int
    steps: int
    measured: str

    @property
    def offer(self) -> Offer:
        shapes = Shapes.of({"latent_shape": self.latent, "text_shape": self.text, "image": self.image})
        return Offer(self.name, self.sha256, shapes, self.prediction, self.rows, self.steps)


def record(folder: Path, admission: Admission) -> None:
    """``folder``: that of the admissions."""
    about = {"format": FORMAT, "kind": KIND, **asdict(admission)}
    store.write_sealed(folder / f"{admission.name}.json", about)


def forget(folder: Path, name: str) -> None:
    (folder / f"{name}.json").unlink(missing_ok=True)


def recorded(folder: Path, name: str) -> Admission | None:
    """The admission of an expert, None where there is none. Raises DamagedError for a file that is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    value = store.read_json(path)
    wanted = {"format": FORMAT, "kind": KIND}
    if not isinstance(value, dict) or not store.sealed(value) or {key: value.get(key) for key in wanted} != wanted:
        raise DamagedError(f"{path} is no admission of a remote expert: remove it, and admit the expert again")
    rest = {key: part for key, part in value.items() if key not in (*wanted, store.CHECK)}
    try:
        return Admission(**rest)
    except TypeError as error:
        raise DamagedError(f"{path} is of another version: admit the expert again") from error


# --- beside what is here ---------------------------------------------------------------------------------------------


class Joined:
    """A run's own parts, and admitted remote experts for those that are not here: a ``Source``.

    An expert whose weights are here is never asked elsewhere.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.run, self.where = source, source.run, source.where
        self.uncalibrated = source.uncalibrated
        self._used: dict[str, tuple[Place, Admission]] = {}
        self._why: dict[str, str] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def look(self, *, fresh: bool = True) -> dict[str, str]:
        found = dict(self._source.look(fresh=fresh))
        used, why = {}, {}
        for name, place in places(self._source).items():
            if name in found:
                continue
            admission = recorded(home_of(self._source)[1], name)
            refused = self._refused(place, admission)
            if refused or admission is None:
                why[name] = refused
            else:
                used[name] = (place, admission)
                found[name] = f"remote-{admission.sha256}"
        self._used, self._why = used, why
        return found

    def _refused(self, place: Place, admission: Admission | None) -> str:
        """Why an expert cannot be asked now, and what to do; nothing where it can."""
        admit = f"`archipel admit {self.where} {place.name} --remote`"
        if admission is None or admission.run != self.run.id:
            return f"expert {place.name} is offered by {place.origin} and was not admitted: {admit}"
        if admission.where != place.where:
            return f"expert {place.name} was admitted at {admission.where}, not at {place.where}: {admit}"
        if place.token() is None:
            return f"the token of expert {place.name} is to be in {place.site.token_env}, which is not set"
        failed, reason = self._failed.get(place.name, (-RETRY_AFTER, ""))
        ago = time.monotonic() - failed
        if ago < RETRY_AFTER and reason:
            left = RETRY_AFTER - ago
            return f"expert {place.name} was lost {ago:.0f} s ago ({reason}); it is asked again in {left:.0f} s"
        return ""

    def remote(self, name: str) -> RemoteExpert | None:
        """A connection of its own to an admitted expert; None for one that is here, or not anywhere."""
        if name not in self._used:
            return None
        place, admission = self._used[name]

        def lost(reason: str) -> None:
            self._failed[name] = (time.monotonic(), reason)

        return expert(place, admission.offer, on_lost=lost)

    def how(self, names: Sequence[str]) -> str:
        told = [self._why[name] for name in names if name in self._why]
        rest = [name for name in names if name not in self._why]
        return "; ".join([*told, *([self._source.how(rest)] if rest else [])])

    def folder(self, name: str, version: str) -> Path:
        if name in self._used and version.startswith("remote-"):
            raise DamagedError(f"expert {name} is at {self._used[name][0].origin}: its weights are not here")
        return self._source.folder(name, version)

    def codec(self) -> Path:
        return self._source.codec()

    def base(self) -> Path:
        return self._source.base()

    def text(self) -> Path:
        return self._source.text()


def expert(place: Place, offer: Offer, **more: Any) -> RemoteExpert:
    """The expert at a place, as it was offered. Nothing is sent yet."""
    about = place.site
    times: Mapping[str, Any] = {"seconds": about.seconds, "clip_seconds": about.clip_seconds}
    return RemoteExpert(place.link(place.token() or ""), offer, fp16=about.fp16, **times, **more)


def joined(source: Source) -> Source:
    """``source`` with what site.toml adds; itself where that is nothing. Raises ConfigError, DamagedError."""
    run = getattr(source, "run", None)
    return Joined(source) if isinstance(run, Run) and (home_of(source)[0] / site.NAME).exists() else source
