"""The owner's ``trust.toml``: whose signatures count, what may be read, and how good an expert must be. Always local.

Also Ed25519 (RFC 8032) over what a result is: run, job, fence and the sha256 of its card, which lists the rest.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from archipel import FORMAT
from archipel.errors import ArchipelError, ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FILE = "trust.toml"
VARIABLE = "ARCHIPEL_TRUST"
_SIGNED = "archipel commit 1"  # what a signature is for, so that it can never be taken for one of something else
_KEY_FILE = 8192  # bytes


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Signer(_Part):
    """``[[signature.keys]]``: somebody whose results are believed to be theirs."""

    name: str = Field(min_length=1, max_length=64, description="Whose key it is; shown in answers.")
    key: str = Field(description="The public key as `archipel keygen` prints it: 32 bytes in base64.")
    jobs: list[str] = Field([], description="Jobs that this key may sign (empty: all).")

    @field_validator("key")
    @classmethod
    def _is_a_key(cls, value: str) -> str:
        if len(_unbase64(value) or b"") != 32:
            raise ValueError("expected 32 bytes in base64, as `archipel keygen` prints them")
        return value


class Signature(_Part):
    """``[signature]``"""

    required: bool = Field(False, description="Refuse results that are not signed by one of the keys.")
    keys: list[Signer] = Field([], description="Keys that count. Where there are any, another's signature is refused.")


class Bounds(_Part):
    """``[bounds]``: nothing larger is read."""

    weights: int = Field(64 << 30, ge=1, description="Bytes of model.safetensors.")
    card: int = Field(1 << 20, ge=1, le=64 << 20, description="Bytes of card.json.")
    config: int = Field(64 << 10, ge=1, le=1 << 20, description="Bytes of config.json.")
    metrics: int = Field(16 << 20, ge=1, le=1 << 30, description="Bytes of metrics.jsonl.")
    magnitude: float = Field(1000.0, gt=0, description="Largest absolute value of a weight.")


class Loss(_Part):
    """``[loss]``: the bar, relative to the loss of a network that says nothing (output zero) on the same draws."""

    required: bool = Field(
        True, description="Refuse what misses the bar. False suits an owner whose machines have trained all of it."
    )
    bar: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Experts: most that the held-out loss may be of the silent network's, over the noisier times.",
    )
    overall: float = Field(
        1.5,
        gt=0,
        description="Experts: the same over all times, where networks that know few clips by heart are worse.",
    )
    router: float = Field(
        0.99, gt=0, le=1, description="Router: most that its cross-entropy may be of the clusters' shares' own."
    )
    tolerance: float = Field(
        0.02, gt=0, le=1, description="How far the loss that the card claims may be from the measured one, relatively."
    )


class Trust(_Part):
    """All of ``trust.toml``. Every key has a default; the file may be absent."""

    run: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="Id of the run to admit for (empty: any).")
    published: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="sha256 of the bucket's published.json (empty: any)."
    )
    signature: Signature = Signature()
    bounds: Bounds = Bounds()
    loss: Loss = Loss()


@dataclass(frozen=True)
class Source:
    """What was read, and from where (None: the defaults)."""

    trust: Trust
    path: Path | None


def find(given: Path | None, run_folder: Path | None) -> Source:
    """The owner's trust: ``given`` (--trust), else RUN/trust.toml, else $ARCHIPEL_TRUST, else the user's own file.

    ``run_folder``: a run on this machine, None for a bucket, whose own trust.toml would be a stranger's. Raises
    ConfigError naming key and value; a file that was asked for and is not there is an error.
    """
    if given is not None:
        return Source(read(given), given)
    if run_folder is not None and os.path.lexists(run_folder / FILE):
        return Source(read(run_folder / FILE), run_folder / FILE)
    if named := os.environ.get(VARIABLE):
        return Source(read(Path(named)), Path(named))
    import platformdirs

    own = platformdirs.user_config_path("archipel") / FILE
    return Source(read(own), own) if os.path.lexists(own) else Source(Trust(), None)


def read(path: Path) -> Trust:
    """Read a trust.toml. Raises ArchipelError where it is missing, ConfigError naming key and value."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ArchipelError(f"{path} is not there: give --trust the file that says whom and what you trust") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable TOML ({error})") from error
    version = values.pop("format", FORMAT)
    if version != FORMAT:
        raise ConfigError(f"{path}: format = {version!r}, this Archipel reads format {FORMAT}")
    try:
        return Trust.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(f"{key} = {item['input']!r}: there is no such key")
            else:
                lines.append(f"{key} = {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


# --- signatures ------------------------------------------------------------------------------------------------------


def payload(run: str, name: str, fence: int, sha256: str) -> bytes:
    """The bytes that a result's signature is over: run id, job, fence and the card's sha256, each on a line."""
    return f"{_SIGNED}\n{run}\n{name}\n{fence}\n{sha256}\n".encode()


def sign(keyfile: Path, message: bytes) -> dict[str, str]:
    """{"signature", "signer"} of ``message`` (see ``payload``): both base64, the signer is its public key.

    ``keyfile``: Ed25519 private key as PEM, or its 32 bytes raw or in base64. Raises ArchipelError for a file that is
    none of these or that other users may read.
    """
    private = _load_private(keyfile)
    return {"signature": _base64(private.sign(message)), "signer": _public(private)}


def keygen(keyfile: Path) -> str:
    """Make a key pair: the private key goes to a new file that only its owner may read; the public key is given back.

    Raises ArchipelError where the file exists: a key is never overwritten.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    text = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    keyfile.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(keyfile, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ArchipelError(f"{keyfile} exists: a key is never overwritten; choose another name") from error
    with open(handle, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return _public(private)


def check_signature(
    trust: Signature, name: str, message: bytes, signature: str | None, signer: str | None
) -> str | None:
    """Why a result's signature is refused, or None where it is fine or does not matter.

    Without keys in trust.toml and without ``required`` a signature says nothing to us and is not looked at.
    """
    if not trust.keys and not trust.required:
        return None
    if signature is None or signer is None:
        return "the result is not signed, and trust.toml requires it" if trust.required else None
    known = next((key for key in trust.keys if _unbase64(key.key) == _unbase64(signer)), None)
    if known is None:
        return "it is signed by a key that trust.toml does not list"
    if known.jobs and name not in known.jobs:
        return f"it is signed by {known.name}, whose key may sign {', '.join(known.jobs)} only"
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(_unbase64(known.key) or b"").verify(_unbase64(signature) or b"", message)
    except (InvalidSignature, ValueError):
        return f"the signature is not {known.name}'s over this run, job, fence and card"
    return None


def _load_private(keyfile: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        info = keyfile.stat()
        if os.name == "posix" and info.st_mode & 0o077:
            raise ArchipelError(f"{keyfile} can be read by other users: chmod 600 {keyfile}")
        with open(keyfile, "rb") as file:
            data = file.read(_KEY_FILE)
    except FileNotFoundError as error:
        raise ArchipelError(f"{keyfile} is not there: `archipel keygen {keyfile}` makes a key") from error
    if b"-----BEGIN" in data:
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            found = load_pem_private_key(data, password=None)
            if isinstance(found, Ed25519PrivateKey):
                return found
    else:
        raw = data if len(data) == 32 else _unbase64(data.decode("ascii", "replace").strip())
        if raw is not None and len(raw) == 32:
            return Ed25519PrivateKey.from_private_bytes(raw)
    raise ArchipelError(f"{keyfile} is no Ed25519 private key (PEM without a password, or its 32 bytes in base64)")


def _public(private: Ed25519PrivateKey) -> str:
    return _base64(private.public_key().public_bytes_raw())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes | None:
    with contextlib.suppress(binascii.Error, ValueError):
        return base64.b64decode(text, validate=True)
    return None
