"""Who says that a card is theirs: Ed25519 over run, expert and the sha256 of the card, which lists the weights'."""

from __future__ import annotations

from pathlib import Path

from archipel import store
from archipel.islands import trust
from archipel.islands.trust import Signature

_SIGNED = "archipel remote expert 1"  # never to be taken for the signature of a commit


def payload(run: str, name: str, card: bytes) -> bytes:
    """The bytes that are signed."""
    return f"{_SIGNED}\n{run}\n{name}\n{store.sha256_bytes(card)}\n".encode()


def sign(keyfile: Path, run: str, name: str, card: bytes) -> dict[str, str]:
    """{"signature", "signer"}, see ``trust.sign``. Raises ArchipelError for a file that is no key, or that others may read."""
    return trust.sign(keyfile, payload(run, name, card))


def refused(rules: Signature, run: str, name: str, card: bytes, signature: str, signer: str) -> str | None:
    """Why a signature is refused, or None. One is always required: there are no files to look at instead."""
    if not rules.keys:
        return "trust.toml names no key, and a remote expert's card must be signed by one: [[signature.keys]]"
    required = rules.model_copy(update={"required": True})
    return trust.check_signature(required, name, payload(run, name, card), signature or None, signer or None)
