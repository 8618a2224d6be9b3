"""The keys of a run in a bucket: made of job names, fences, steps and hashes only, never of a user's file names.

run.toml  published.json  codec/*  text/*  base/*  shards/<job's shard>/*
jobs/<name>/claims/<fence>.json              who holds the job: created once each, counting up without a gap
jobs/<name>/<fence>/heartbeat.json           moves while the holder lives
jobs/<name>/<fence>/checkpoints/<step>/*     manifest.json last
jobs/<name>/<fence>/result/*                 card.json last
jobs/<name>/committed.json                   the job's one result; -<r> after the owner reopened it r times
jobs/<name>/reopened/<r>.json                the owner's word that results so far do not count
admitted/<sha256>/*  admitted/<name>.json    what ensembles load: the owner's
refused/<name>/<fence>.json                  why not: the owner's
"""

from __future__ import annotations

import re

from archipel.errors import ArchipelError

RUN = "run.toml"
PUBLISHED = "published.json"
ADMITTED = "admitted"
BASE = "base"
TEXT = "text"
CARD = "card.json"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_CLAIM = re.compile(r"jobs/[a-z0-9]+/claims/(\d{8})\.json")
MAX_FENCE = 99_999_999


def check_key(key: str) -> str:
    """The key itself. Raises ArchipelError for one that could leave its prefix or name a hidden file."""
    parts = key.split("/")
    if len(key) > 512 or not all(_PART.fullmatch(part) for part in parts):
        raise ArchipelError(
            f"{key[:80]!r} is not a key of a run: letters, digits, '.', '_', '-' between single slashes"
        )
    return key


def job(name: str) -> str:
    return f"jobs/{name}"


def claims(name: str) -> str:
    return f"jobs/{name}/claims"


def claim(name: str, fence: int) -> str:
    return f"jobs/{name}/claims/{fence:08d}.json"


def fence_of(key: str) -> int | None:
    """The fence that a claim's key names, or None where it is no claim's key."""
    found = _CLAIM.fullmatch(key)
    return int(found[1]) if found else None


def attempt(name: str, fence: int) -> str:
    return f"jobs/{name}/{fence:08d}"


def heartbeat(name: str, fence: int) -> str:
    return f"{attempt(name, fence)}/heartbeat.json"


def checkpoints(name: str, fence: int) -> str:
    return f"{attempt(name, fence)}/checkpoints"


def checkpoint(name: str, fence: int, step: int) -> str:
    return f"{checkpoints(name, fence)}/{step:08d}"


def result(name: str, fence: int) -> str:
    return f"{attempt(name, fence)}/result"


def committed(name: str, opening: int = 0) -> str:
    """The key of a job's result; ``opening`` counts how often the owner reopened the job."""
    return f"jobs/{name}/committed.json" if opening == 0 else f"jobs/{name}/committed-{opening}.json"


def reopened(name: str, opening: int) -> str:
    return f"jobs/{name}/reopened/{opening}.json"


def shard(name: str) -> str:
    return f"shards/{name}"


def admitted(name_or_sha256: str, file: str = "") -> str:
    """``admitted("2")`` is the pointer of a job, ``admitted(sha256, "card.json")`` a file of what it points to."""
    return f"{ADMITTED}/{name_or_sha256}/{file}" if file else f"{ADMITTED}/{name_or_sha256}.json"


def refused(name: str, fence: int) -> str:
    return f"refused/{name}/{fence:08d}.json"
