"""``site.toml`` in a run's folder: what concerns this site only (partitions, limits, machine types) and no result.

It is local and mutable, is published nowhere and is in no hash: two sites may train the same run with different ones.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from archipel import config as configuration
from archipel.config import Section
from archipel.errors import ConfigError, DamagedError
from archipel.training.local import Local

NAME = "site.toml"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# A word that ends like these names something that must not stand in a file which people copy about.
_SECRET = re.compile(r"(SECRET|PASSWORD|TOKEN|CREDENTIALS?|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY)(_ID)?$", re.IGNORECASE)


def seconds(text: str) -> float:
    """``90s``, ``30m``, ``2h`` or ``1d`` -> seconds, above 0. Raises ValueError."""
    value = float(text[:-1]) * _UNITS[text[-1:]] if text[-1:] in _UNITS else float(text)
    if not 0 < value < 1e9:
        raise ValueError(text)
    return value


def _duration(text: str) -> str:
    try:
        seconds(text)
    except ValueError:
        raise PydanticCustomError("duration", "expected a duration such as 90s, 30m, 12h or 2d") from None
    return text


class SlurmSite(Section):
    """[slurm]: what each training job asks of Slurm. An empty text or 0 leaves the matter to Slurm's own defaults."""

    partition: str = Field("", description="Partition.")
    account: str = Field("", description="Account to charge.")
    qos: str = Field("", description="Quality of service.")
    constraint: str = Field("", description="Features that a node must have.")
    time: str = Field("4h", description="Limit of one job; a job that reaches it is requeued and continues.")
    signal: str = Field(
        "2m", description="How long before the limit a job is told to save and to go back to the queue."
    )
    cpus: int = Field(0, ge=0, description="CPUs per job.")
    gpus: int = Field(0, ge=0, description="GPUs per job.")
    mem: str = Field("", description="Memory per job, for example 32G.")
    threads: int = Field(
        0, ge=0, description="CPU threads of a training process (0: `cpus`, else what the job began with, else all)."
    )
    setup: tuple[str, ...] = Field((), description="Lines of shell before the command, for example `module load cuda`.")
    python: str = Field("", description="Python on the nodes, with Archipel installed (empty: the one that submits).")
    options: dict[str, str] = Field({}, description="Any other options of sbatch, for example {reservation = 'may'}.")
    tries: int = Field(
        3,
        ge=1,
        le=100,
        description="Jobs that may vanish one after the other without a step gained; then it is an error.",
    )
    poll: float = Field(10.0, gt=0, description="Seconds between looks at the store and at the queue.")

    @field_validator("time", "signal")
    @classmethod
    def _is_duration(cls, value: str) -> str:
        return _duration(value)


class SkySite(Section):
    """[sky]: the machine that each SkyPilot task asks for. What is empty or 0 is SkyPilot's choice."""

    accelerators: str = Field("", description="For example H100:1 or L4:1.")
    cpus: str = Field("", description="vCPUs: 8, or 8+ for at least 8.")
    memory: str = Field("", description="Memory in GB: 32, or 32+.")
    disk_size: int = Field(0, ge=0, description="Disk in GB.")
    infra: str = Field(
        "",
        description="Where: aws, gcp/us-central1, k8s, ... Best the region of the bucket, whose traffic is then free.",
    )
    image_id: str = Field("", description="Machine image or docker:NAME.")
    use_spot: bool = Field(
        True, description="Spot machines: one that is taken away costs the steps since its checkpoint."
    )
    setup: tuple[str, ...] = Field(
        ("pip install 'archipel[islands]'",), description="Lines of shell that install Archipel on the machine."
    )
    envs: dict[str, str] = Field(
        {}, description="Environment of the tasks. No secrets: those go by `sky launch --secret`."
    )

    @field_validator("cpus", "memory", mode="before")
    @classmethod
    def _number_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("envs")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if _SECRET.search(name):
                raise PydanticCustomError(
                    "secret",
                    "{name} names a secret, and this file is no place for one: give it to `sky launch --secret {name}`",
                    {"name": name},
                )
        return value


class TrainSite(Section):
    """[train]: how training processes compute here, where no option of the command says otherwise."""

    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the matrix products.")
    micro_batch: int = Field(0, ge=0, description="Clips that one process computes at once (0: all of its share).")
    checkpointing: bool = Field(
        False, description="Compute activations inside a block again on the way back instead of keeping them."
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps AdamW's moments in 8 bits (torchao)."
    )
    compile: bool = Field(False, description="Compile the repeated blocks (torch.compile).")
    ema: Literal["device", "host"] = Field("device", description="Where the average of the weights lies.")


class RemoteSite(Section):
    """[remote.2]: where expert 2 is asked, whose weights are not here. See docs/remote.md."""

    url: str = Field(description="https://host, or http://127.0.0.1:port on this machine.")
    token_env: str = Field(
        "", description="Environment variable with the token; it is sent to this origin only (empty: none)."
    )
    private: bool = Field(False, description="The host may have a private address.")
    fp16: bool = Field(False, description="Send and receive 16 bits a number: half the bytes.")
    ca: str = Field("", description="File of certificates to trust instead of the system's.")
    connect: float = Field(5.0, gt=0, le=60, description="Seconds for a connection.")
    seconds: float = Field(60.0, gt=0, le=3600, description="Seconds for one step's answer.")
    clip_seconds: float = Field(600.0, gt=0, le=86400, description="Seconds for a whole clip.")

    @field_validator("token_env")
    @classmethod
    def _names_a_variable(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", value):
            raise PydanticCustomError(
                "secret", "expected the name of an environment variable such as ISLAND_2_TOKEN, not the token itself"
            )
        return value

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        if "@" in value or "?" in value:
            raise PydanticCustomError("secret", "a URL with credentials or options: the token goes by token_env")
        return value


class SiteConfig(Section):
    """All of ``site.toml``."""

    train: TrainSite = TrainSite()
    slurm: SlurmSite = SlurmSite()
    sky: SkySite = SkySite()
    remote: dict[str, RemoteSite] = Field({})

    @field_validator("remote")
    @classmethod
    def _one_origin_a_token(cls, value: dict[str, RemoteSite]) -> dict[str, RemoteSite]:
        seen: dict[str, str] = {}
        for name, one in value.items():
            if not re.fullmatch(r"0|[1-9][0-9]{0,3}", name):
                raise PydanticCustomError("expert", "expected [remote.2], where 2 is an expert's number")
            origin = "/".join(one.url.split("/")[:3])
            if one.token_env and seen.setdefault(one.token_env, origin) != origin:
                raise PydanticCustomError(
                    "token",
                    "{name} is the token_env of two origins, and one would be told the other's token: use two variables",
                    {"name": one.token_env},
                )
        return value


def _keys() -> list[str]:
    found = []
    for name, field in SiteConfig.model_fields.items():
        section: Any = RemoteSite if name == "remote" else field.annotation
        found += [name, *(f"{name}.{key}" for key in section.model_fields)]
    return found


def _build(values: Mapping[str, Any], where: str) -> SiteConfig:
    try:
        return SiteConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5)
                lines.append(f"{key} is not a key" + (f"; did you mean {near[0]}?" if near else ""))
            elif item["type"] in ("secret", "token", "expert"):  # its value is not repeated
                lines.append(f"{key}: {item['msg']}")
            else:
                lines.append(f"{key} = {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def read(folder: Path, sets: Iterable[str] = ()) -> SiteConfig:
    """The folder's ``site.toml`` (all defaults where there is none) with ``section.key=value`` pairs on top.

    Raises ConfigError naming file, key, value and the nearest right key, DamagedError where the file is no TOML.
    """
    path = folder / NAME
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DamagedError(f"{path} is not readable TOML ({error})") from error
    site = _build(values, str(path))
    for pair in sets:
        key, equals, text = (part.strip() for part in pair.partition("="))
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"--site {pair!r} is not of the form section.key=value, such as slurm.partition=gpu")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        values = configuration.merge(values, {section: {name: value}})
        site = _build(values, f"--site {pair}")
    return site


def local(folder: Path, given: Mapping[str, Any], sets: Iterable[str] = ()) -> Local:
    """How a process computes in a run's folder: what was ``given`` (None: nothing was), else the site's [train], else the
    defaults of ``Local``. Raises as ``read`` and ``Local`` do."""
    asked = {key: value for key, value in given.items() if value is not None}
    return Local(**(read(folder, sets).train.model_dump() | asked))
