"""``archipel import``: weights from elsewhere as an expert of a run, checked as admission checks a stranger's.

Class, configuration, names, shapes, finite numbers and bounds against what ``run.toml`` makes; latents, text and prediction
against what the weights' own folder says of them; and the held-out loss on the cluster's validation clips against the owner's
bar. It is written aside (float32, diffusers' names) and moved into place: after a refusal the run is as it was.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archipel import __version__, store
from archipel.backbones import networks, spending
from archipel.encoders import outside
from archipel.errors import ArchipelError, ConfigError, DamagedError
from archipel.exchange.adapted import LORA
from archipel.exchange.folder import FACTS, codec_sha256, text_said
from archipel.exchange.opened import INDEX, PIPELINE
from archipel.islands import strict
from archipel.islands import trust as trusting
from archipel.islands.network import wanted_facts, wanted_tensors
from archipel.islands.strict import Refusal, shown
from archipel.islands.trust import Trust
from archipel.run import Run

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOT_SAID = "nothing in {folder} says what its latents, its text and its prediction are: they are taken as this run's"


@dataclass
class Brought:
    """What `import` did: sha256 of the weights as they lie in the run, the held-out loss (None: not measured), and notes."""

    name: str
    sha256: str
    loss: float | None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Said:
    """What stands beside the weights: the network's facts, sha256 of codec and text encoder, the card of its training,
    run and licence; None or empty where nothing is said."""

    network: Mapping[str, Any] | None = None
    codec: str | None = None
    text: Mapping[str, Any] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    expert: str = ""
    licence: str = ""


def bring(
    root: Path | str, name: str, folder: Path, *, licence: str = "", force: bool = False, trust: Path | None = None
) -> Brought:
    """Make the weights in ``folder`` expert ``name`` of the run at ``root``.

    ``folder``: an expert of an export (FOLDER/expert_0), an expert exported alone, an expert of another run, or any folder
    of diffusers with a transformer. ``licence``: of the weights, where the folder does not say. ``force``: also where the run
    has that expert already. ``trust``: the owner's trust.toml, see ``admit``.
    Raises ArchipelError saying what does not fit; the run is then as it was. LockedError while the expert is trained.
    """
    run = Run.open(root)
    if name not in run.expert_names:
        raise ArchipelError(f"{name!r} is no expert of this run: it has experts {', '.join(run.expert_names)}")
    target = run.expert(name)
    with store.lock(run.root / ".locks" / f"train-{name}.lock", f"expert {name} of {run.root}"):
        if run.done(target) and not force:
            raise ArchipelError(f"{run.root} has expert {name} already: replace it with --force")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=target.parent))
        made.chmod(0o755)
        try:
            brought = _Import(run, name, Path(folder), made, trusting.find(trust, run.root).trust).all(licence)
            _replace(made, target)
        except Refusal as refusal:
            raise ArchipelError(f"not imported, {refusal.rule}: {refusal.detail}") from refusal
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return brought


def _replace(made: Path, target: Path) -> None:
    old = made.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


class _Import:
    """One import, into the folder ``made``."""

    def __init__(self, run: Run, name: str, folder: Path, made: Path, trust: Trust) -> None:
        self.run, self.name, self.folder, self.made, self.trust = run, name, folder, made, trust
        self.notes: list[str] = []
        self.adapted = run.config.expert.lora_rank > 0
        card = store.read_card(run.base, "base") if self.adapted else None
        if self.adapted and card is None:
            raise ArchipelError(
                f"{run.base} is not there: `archipel prepare` or `archipel train RUN trunk` makes it first"
            )
        self.base: str | None = None if card is None else str(card["sha256"])

    def all(self, licence: str) -> Brought:
        said = read_said(self.folder)
        self._fits(said)
        self._weights()
        self._strict()
        facts = wanted_facts(self.run.config, self.name, self.base)
        sha256 = store.sha256_file(self.made / WEIGHTS)
        about = {
            "license": licence or said.licence or "not stated",
            "source": {"run": said.run, "expert": said.expert, "folder": self.folder.resolve().name},
            "stated": said.network is not None,
            "by": f"archipel {__version__}",
        }
        self._card(facts, sha256, said, about)
        loss = self._loss(about)
        self._card(facts, sha256, said, about)
        if said.network is None:
            self.notes.append(NOT_SAID.format(folder=self.folder))
        return Brought(self.name, sha256, loss, self.notes)

    # --- what is said -------------------------------------------------------------------------------------------

    def _fits(self, said: _Said) -> None:
        """Latents, text and prediction as the folder states them against the run's. Raises Refusal naming both."""
        wanted = wanted_facts(self.run.config, self.name, self.base)
        if said.network is None and self.adapted:
            raise Refusal("config", f"nothing in {self.folder} says which base its adapter is one of")
        if said.network is not None:
            for key in sorted({*wanted, *said.network} - {"role"}):
                if said.network.get(key) != wanted.get(key):
                    raise Refusal(
                        "config",
                        f"{key} of {self.folder} is {shown(said.network.get(key))}, of this run {shown(wanted.get(key))}",
                    )
        own = codec_sha256(self.run.codec)
        if said.codec and own and said.codec != own:
            raise Refusal(
                "config",
                f"the latents of {self.folder} are of another codec (sha256 {said.codec[:12]}) than this run's ({own[:12]}): "
                "what it knows is in the language of that codec",
            )
        text = text_said(self.run)
        if said.text and {**said.text} != text:
            raise Refusal(
                "config", f"the text encoder of {self.folder} is {shown(dict(said.text))}, this run's is {shown(text)}"
            )

    # --- weights ------------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        """The network's configuration and float32 weights in ``made``, under our names. Raises Refusal, ArchipelError."""
        from archipel.backbones import registry

        what = "import"
        place = outside.find(str(self.folder), ("transformer",), what)[0]
        found, wanted = outside.read_config(place, what), networks.expert_network(self.run.config)
        if found.get("_class_name") != wanted["_class_name"]:
            raise Refusal(
                "config",
                f"{place.folder} holds a {shown(found.get('_class_name'))}, expert {self.name} of this run is a {wanted['_class_name']}",
            )
        path = place.folder / LORA
        whole = outside.weight_files(place, what) if not path.is_file() else []
        if whole and self.adapted and place.folder.name == "transformer":
            raise Refusal("config", f"{place.folder} is a whole network, and experts of this run are adapters")
        if not whole and not self.adapted:
            raise Refusal("config", f"{place.folder} is an adapter, and experts of this run are whole networks")
        files = whole or [path]
        if (size := sum(path.stat().st_size for path in files)) > self.trust.bounds.weights:
            raise Refusal(
                "size", f"{place.folder} has {size} bytes of weights, at most {self.trust.bounds.weights} are read"
            )
        tensors = _load(files)
        if not self.adapted:
            found, tensors = registry.adapter(wanted["_class_name"]).settle(found, tensors)
        self._same(found, wanted)
        arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in tensors.items()}
        store.write_tensors(self.made / WEIGHTS, arrays, metadata={"format": "pt"})
        import diffusers

        store.write_json(self.made / CONFIG, {**wanted, "_diffusers_version": diffusers.__version__})

    def _same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        try:
            full = networks.complete(dict(found))
        except ConfigError as error:
            raise Refusal("config", str(error)) from error
        for key, want in wanted.items():
            if full.get(key) != want:
                raise Refusal("config", f"{key} of {self.folder} is {shown(full.get(key))}, of this run {shown(want)}")

    def _strict(self) -> None:
        """Names, shapes and numbers, as admission looks at them. Raises Refusal ("shape", "finite", "size")."""
        wanted, bounds = wanted_tensors(self.run.config, self.name), self.trust.bounds
        header = strict.read_header(self.made / WEIGHTS, tensors=len(wanted) + 64, limit=bounds.weights)
        found = {key: shape for key, (shape, _, _) in header.tensors.items()}
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise Refusal(
                    "shape",
                    f"tensor {shown(key)} of {self.folder} is {found.get(key)}, this run makes it {wanted.get(key)}",
                )
        strict.check_finite(self.made / WEIGHTS, header, bounds.magnitude)

    # --- what it is in the run ----------------------------------------------------------------------------------

    def _card(self, facts: Mapping[str, Any], sha256: str, said: _Said, about: Mapping[str, Any]) -> None:
        """What its training cost is what its own card said; null where nothing did, and never counted as this run's."""
        names = ("steps", "batch", "samples", "train_clips", "epochs", "flops", "seconds")
        store.write_card(
            self.made,
            "expert",
            self.run.id,
            [CONFIG, WEIGHTS],
            name=self.name,
            cluster=int(self.name),
            network=dict(facts),
            sha256=sha256,
            parameters=sum(int(np.prod(shape)) for shape in wanted_tensors(self.run.config, self.name).values()),
            **{key: said.card.get(key) for key in names},
            forward_flops=spending.forward_flops(self.run.config, self.name),
            validation={"raw": None, "ema": None},
            best=None,
            imported=dict(about),
        )

    def _loss(self, about: dict[str, Any]) -> float | None:
        """The held-out loss on the cluster's clips, put into ``about``. Raises Refusal("loss") where it misses the bar."""
        path = self.run.shard(self.name) / "validation.safetensors"
        if not path.is_file():
            self.notes.append(f"its loss was not measured: {self.run.shard(self.name)} is not there yet")
            return None
        from archipel.training import heldout

        found = heldout.measure(self.run.config, self.made, path, base=self.run.base if self.adapted else None)
        if not found.clips:
            self.notes.append("its loss was not measured: the cluster has no validation clips")
            return None
        told = f"held-out loss {found.loss:.4f} on {found.clips} clips"
        bars = (
            (found.ratio, self.trust.loss.bar, "the noisier times"),
            (found.overall, self.trust.loss.overall, "all times"),
        )
        for ratio, bar, times in bars if self.trust.loss.required else ():
            if not ratio <= bar:  # NaN is refused too
                raise Refusal(
                    "loss",
                    f"{told}: {ratio:.3f} of that of a network that says nothing at {times}, the bar is {bar:g} (loss in trust.toml)",
                )
        self.notes.append(f"{told}, {found.ratio:.3f} of that of a network that says nothing")
        about |= {"loss": found.loss, "clips": found.clips, "ratio": found.ratio}
        return found.loss


# --- reading what is said ----------------------------------------------------------------------------------------------


def read_said(folder: Path) -> _Said:
    """What the folder of weights, or the export around it, says of them. Raises ArchipelError for a whole export."""
    if not folder.is_dir():
        raise ArchipelError(f"{folder} is not a folder: give one with {CONFIG} and weights, such as FOLDER/expert_0")
    index = _json(folder / INDEX)
    if index.get("_class_name") == PIPELINE:
        here = [entry.name for entry in sorted(folder.glob("expert_*")) if entry.is_dir()]
        raise ArchipelError(
            f"{folder} is a whole export: name one of its experts, {', '.join(str(folder / n) for n in here)}"
        )
    for top, name in ((folder.parent, folder.name.removeprefix("expert_")), (folder, "")):
        facts = _json(top / FACTS)
        name = name or str(facts.get("expert", ""))
        card = _mapping(_mapping(facts.get("cards")).get(name))
        if facts and card:
            source = _mapping(facts.get("source"))
            licence = str(facts.get("licence") or "")
            licence = licence or (f"not stated; its clips: {source['license']}" if source.get("license") else "")
            text = _mapping(facts.get("text")) or None
            return _Said(
                _mapping(card.get("network")), facts.get("codec"), text, card, str(facts.get("run", "")), name, licence
            )
    own = store.read_card(folder, "expert") if (folder / "card.json").is_file() else None
    if own is not None:
        codec = codec_sha256(folder.parent.parent / "codec")
        return _Said(_mapping(own.get("network")), codec, None, own, str(own["run"]), str(own.get("name", "")))
    return _Said()


def _load(files: list[Path]) -> dict[str, Any]:
    """Float32 tensors of safetensors files. Raises DamagedError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {key: value.float() for path in files for key, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"the weights in {files[0].parent} cannot be read ({error})") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any]:
    return _mapping(store.read_json(path)) if path.is_file() else {}
