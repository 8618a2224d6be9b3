"""``run.toml``: reading, writing and ``--set``."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from archipel import FORMAT, store
from archipel.config.checks import check
from archipel.config.schema import RunConfig, Section
from archipel.errors import ArchipelError, ConfigError, DamagedError


def known_keys() -> list[str]:
    keys = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def _describe(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known_keys() + list(RunConfig.model_fields), n=1, cutoff=0.5)
            lines.append(f"{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        message = item["msg"][0].lower() + item["msg"][1:]
        if item["type"] == "literal_error":
            near = difflib.get_close_matches(
                str(item["input"]),
                [part.strip(" '") for part in str(item["ctx"]["expected"]).replace(" or ", ", ").split(",")],
                n=1,
                cutoff=0.3,
            )
            message += f"; the nearest is {near[0]!r}" if near else ""
        lines.append(f"{key} = {item['input']!r}: {message}")
    return f"{where}: " + "; ".join(lines)


def build(values: Mapping[str, Any], where: str = "run.toml") -> RunConfig:
    """Validate nested values. Raises ConfigError naming key, value and the nearest right one."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, where)) from error
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` with ``over``'s keys on top."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_sets(pairs: Iterable[str]) -> dict[str, Any]:
    """``["expert.steps=2000"]`` -> nested values; the right side is TOML, or else a plain string."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} is not of the form section.key=value, such as expert.steps=2000")
        if key not in known_keys():
            near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
            raise ConfigError(f"--set {pair!r}: {key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        section, _, name = key.partition(".")
        values = merge(values, {section: {name: value}} if name else {section: value})
    return values


def lookup(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def to_toml(config: RunConfig) -> str:
    import tomli_w

    head = (
        "# The science of this run, resolved. Written once; its sha256 is the run's id, and it wins on resume.\n"
        "# Every key is explained in docs/configuration.md.\n"
    )
    return head + tomli_w.dumps(_written(config))


def _written(config: RunConfig) -> dict[str, Any]:
    """All values but those of later keys at their defaults (see ``schema._later``)."""
    values = config.model_dump(mode="json")
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            values[name] = written(section)
            if not values[name]:  # a section of later keys only
                del values[name]
    return values


def written(section: Section) -> dict[str, Any]:
    """A section's values as they stand in ``run.toml``: what is hashed stays the same where a later key is at its default."""
    values: dict[str, Any] = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("later") and getattr(section, key) == field.default:
            del values[key]
    return values


def read(path: Path) -> tuple[RunConfig, str]:
    """Read ``run.toml``: the configuration and the run's id. A newer format is refused before anything else is read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArchipelError(f"{path} is not there: make a run first with `archipel init {path.parent}`") from error
    return parse(data, str(path))


def parse(data: bytes, where: str) -> tuple[RunConfig, str]:
    """The configuration in the bytes of a ``run.toml`` and their sha256, the run's id; ``where`` names it in errors."""
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{where} is not readable TOML ({error})") from error
    version = values.get("format")
    if not isinstance(version, int):
        raise ConfigError(f"{where}: format is missing; it is {FORMAT} for this Archipel")
    if version > FORMAT:
        raise ArchipelError(
            f"{where} has format {version}, this Archipel reads format {FORMAT}: "
            f"install a newer Archipel (one that writes format {version})"
        )
    return build(values, where), store.sha256_bytes(data)
