"""A run: a folder whose files are the whole state. This module knows its paths and nothing about mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archipel import config as configuration
from archipel import store
from archipel.config import RunConfig
from archipel.errors import ArchipelError, MissingStageError

MONOLITH = "monolith"
ROUTER = "router"
TRUNK = (
    "trunk"  # the shared start of a warm run: trained like a job, but at home and before all jobs, never by an island
)
DAMAGED = "damaged"  # stands where a version would, for a part that is there and cannot be used


def starts_warm(config: RunConfig) -> bool:
    """Whether experts and monolith begin with the trunk's weights, which their shards then carry."""
    return config.expert.warm_start == TRUNK and not config.expert.lora_rank


def begins_with_base(config: RunConfig) -> bool:
    """Whether experts and monolith begin with (or are adapters of) the weights in ``base/``, which every job then needs."""
    return bool(config.expert.weights or config.expert.lora_rank)


def _folder_hint(path: Path) -> str:
    return f", {path.parent}" if path.name == "run.toml" else ""


@dataclass(frozen=True)
class Run:
    """An opened run. ``id`` is the sha256 of ``run.toml``; every card names it."""

    root: Path
    config: RunConfig
    id: str

    @classmethod
    def open(cls, root: Path | str) -> Run:
        """Open an existing run. Raises ArchipelError where there is none or its format is newer."""
        root = Path(root)
        if not root.exists():
            raise ArchipelError(f"there is no run at {root}: make one with `archipel init {root}`")
        if root.is_file():
            raise ArchipelError(f"{root} is a file: give the run's folder" + _folder_hint(root))
        config, run_id = configuration.read(root / "run.toml")
        return cls(root, config, run_id)

    @classmethod
    def create(cls, root: Path | str, config: RunConfig) -> Run:
        """Write ``run.toml``. A folder that already holds another run, or anything else, is left untouched and refused."""
        root = Path(root)
        path = root / "run.toml"
        if path.exists():
            raise ArchipelError(
                f"{root} already holds a run: continue it with `archipel run {root}`, or choose another folder"
            )
        if root.is_file():
            raise ArchipelError(f"{root} is a file: a run is a folder")
        torn = set(root.glob(".run.*.tmp.toml"))  # of an init that was killed while it wrote
        if root.exists() and set(root.iterdir()) - torn:
            raise ArchipelError(f"{root} is not empty and holds no run: choose another folder")
        for path_aside in torn:
            path_aside.unlink(missing_ok=True)
        store.write_text(path, configuration.to_toml(config))
        return cls.open(root)

    @property
    def expert_names(self) -> list[str]:
        return [str(k) for k in range(self.config.partition.k)]

    @property
    def job_names(self) -> list[str]:
        """Everything that islands can train: experts, the monolith, the router."""
        return [*self.expert_names, MONOLITH, ROUTER]

    @property
    def trunk_names(self) -> list[str]:
        """The shared start, where the run has one."""
        return [TRUNK] if self.config.expert.trunk_steps else []

    @property
    def clips(self) -> Path:
        return self.root / "clips"

    @property
    def manifest(self) -> Path:
        return self.clips / "manifest.parquet"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def codec(self) -> Path:
        """The fitted codec: needed to generate, small, and therefore apart from the cache."""
        return self.root / "codec"

    @property
    def text(self) -> Path:
        """Text encoders that were brought from outside (``text.path``)."""
        return self.root / "text"

    @property
    def base(self) -> Path:
        """Weights that every expert begins with or is an adapter of, where the run has such (``begins_with_base``)."""
        return self.root / "base"

    @property
    def partition(self) -> Path:
        return self.root / "partition"

    def shard(self, name: str) -> Path:
        """What one job trains on: a cluster's shard for an expert, ``all`` for the monolith, the router and the trunk."""
        return self.root / "shards" / ("all" if name in (MONOLITH, ROUTER, TRUNK) else name)

    def expert(self, name: str) -> Path:
        """Folder of an expert, the monolith, the router or the trunk. Raises ArchipelError naming the jobs there are."""
        names = [*self.job_names, *self.trunk_names]
        if name not in names:
            raise ArchipelError(f"{name!r} is not a job of this run: it has {', '.join(names)}")
        return self.root / name if name in (ROUTER, TRUNK) else self.root / "experts" / name

    def samples(self, protocol: str) -> Path:
        return self.root / "samples" / protocol

    def begun(self, protocol: str) -> Path:
        """Samples of clips that were given their first frame."""
        return self.samples(f"{protocol}-first-frame")

    def scores(self, protocol: str) -> Path:
        return self.root / "scores" / f"{protocol}.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def log(self, stage: str) -> Path:
        return self.root / "logs" / f"{stage}.log"

    def done(self, folder: Path) -> bool:
        """Whether a folder was committed by this run (a card of another run id does not count)."""
        card = store.read_card(folder)
        return card is not None and card.get("run") == self.id

    def expect(self, run_id: str) -> None:
        """Raise ArchipelError where this is not the run whose id (or its first 8 characters or more) was given."""
        if len(run_id) < 8 or not self.id.startswith(run_id.lower()):
            raise ArchipelError(f"{self.root} holds run {self.id[:12]}, not {run_id[:64]!r}: is it the right folder?")

    def need(self, folder: Path, stage: str) -> None:
        """Raise MissingStageError naming the stage to run where ``folder`` is not committed."""
        if not self.done(folder):
            raise MissingStageError(f"{folder} is not finished: run `archipel {stage} {self.root}` first")
