"""Making and opening a run: from a preset, a source, parts from outside and ``--set`` to ``run.toml``, and back to a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from archipel import config as configuration
from archipel import presets, store
from archipel.config import RunConfig
from archipel.errors import ArchipelError, ConfigError
from archipel.run import Run

_WITH_PATH = ("folder", "webdataset", "huggingface")  # sources that read from clips.path


def resolve(
    *,
    source: str | None = None,
    preset: str = "",
    data: str = "",
    backbone: str = "",
    codec: str = "",
    text: str = "",
    weights: str = "",
    sets: Iterable[str] = (),
    over: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Preset, then source and data, then ``--set``: validated, with the compute budget filled in.

    ``codec``, ``text``, ``weights``: folders or hub ids of an autoencoder, of text encoders, and of a trained transformer,
    whose configurations are read here (see ``archipel.encoders.resolving``). Raises ConfigError (naming key, value and the
    nearest right one, or both sides that do not fit) and ArchipelError for a source that is not there.
    """
    from archipel.data import count_items
    from archipel.encoders import resolving
    from archipel.evaluation.stage import check_primary
    from archipel.training import budget

    values = presets.values(preset) if preset else {}
    values = configuration.merge(values, {"run": {"preset": preset}})
    chosen: dict[str, Any] = {}
    if source:
        chosen["source"] = source
        if preset and source != values.get("clips", {}).get("source", source):
            values = presets.without_source(values)
    if data:
        chosen["path"] = data
    values = configuration.merge(values, {"clips": chosen})
    said = configuration.merge(dict(over or {}), configuration.parse_sets(sets))
    parts = {"codec": {"path": codec}, "text": {"path": text}, "expert": {"backbone": backbone, "weights": weights}}
    said = configuration.merge(
        said,
        {name: {key: one for key, one in part.items() if one} for name, part in parts.items() if any(part.values())},
    )
    values = resolving.resolve(configuration.merge(values, said), said)
    values = presets.fit_rope(values)
    config = configuration.build(_located(values), "the settings")
    if data and config.clips.source not in _WITH_PATH:
        raise ConfigError(
            f"--data {data!r} is of no use to the source {config.clips.source}: name one with --source {' or '.join(_WITH_PATH)}"
        )
    check_primary(config.evaluate.primary)
    count = count_items(config.clips)
    if count is not None:
        configuration.check_count(config, min(count, config.clips.count or count))
    return budget.resolve(config)


def _located(values: dict[str, Any]) -> dict[str, Any]:
    """``clips.path`` made absolute where it names something on this disk, so that any working directory will do."""
    from archipel.data.base import is_url

    clips = values.get("clips", {})
    path = clips.get("path")
    if not path or not isinstance(path, str) or is_url(path) or clips.get("source") not in _WITH_PATH:
        return values
    full = Path(path).expanduser()
    if clips["source"] == "huggingface" and not full.exists():
        return values  # a data set of the hub
    return configuration.merge(values, {"clips": {"path": os.path.abspath(full)}})  # noqa: PTH100 - keeps links


def init(root: Path | str, **settings: Any) -> Run:
    """Write a new run's ``run.toml`` (see ``resolve`` for the settings). Raises ConfigError where a part is only planned for."""
    config = resolve(**settings)
    for key, part, option in (("codec", config.codec, "--codec"), ("text", config.text, "--text")):
        name = getattr(part, "model", "") or getattr(part, "encoder", "minilm")
        if not part.path and name not in ("", "minilm"):
            raise ConfigError(
                f"{key}.path is empty, but the preset plans with {name}: give it with {option} FOLDER (or a hub id)"
            )
    return Run.create(root, config)


def open_run(root: Path | str, sets: Iterable[str] = ()) -> Run:
    """Open a run; ``sets`` may only repeat what ``run.toml`` says, which wins.

    Raises ConfigError naming both values where they differ, ArchipelError where ``run.toml`` was edited after work began.
    """
    run = Run.open(root)
    for pair in sets:
        values = configuration.parse_sets([pair])
        key, _, wanted = (part.strip() for part in pair.partition("="))
        have = configuration.lookup(run.config, key)
        same = False
        with contextlib.suppress(ConfigError):  # what cannot even be set is another value, too
            asked = configuration.build(configuration.merge(run.config.model_dump(mode="json"), values), pair)
            same = configuration.lookup(asked, key) == have
        if not same:
            raise ConfigError(
                f"{key} is {have!r} in {run.root / 'run.toml'} and --set asks for {wanted}: start a new run for that"
            )
    card = store.read_card(run.clips)
    if card is not None and card.get("run") != run.id:
        raise ArchipelError(
            f"{run.root / 'run.toml'} was changed after work began (it is {run.id[:12]}, the clips were prepared for "
            f"{str(card.get('run'))[:12]}): restore it, or start a new run with the new settings"
        )
    return run
