"""``archipel policy``: the least that one island's credentials must allow, in the words of S3 and of Google Cloud Storage.

An island reads the run and its own shard, and creates under its own job: it deletes nothing, replaces neither claims nor
results, and sees nobody else's data. Docs: AWS, "Enforce conditional writes on Amazon S3 buckets" (the condition key
s3:if-none-match); Google Cloud, "Attribute reference for IAM Conditions" (resource.name).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from archipel.errors import ArchipelError
from archipel.islands import keys
from archipel.run import MONOLITH, ROUTER

PROBE = "probe"  # what `Objects.probe` creates, to see that the store honours conditions
_PREFIX = re.compile(r"[A-Za-z0-9_./-]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_GCS_NOTES = """\
What Google Cloud Storage cannot express, and what follows:
- A condition on "only if absent" does not exist in IAM. Whoever may create an object at a key may create it only while there
  is none (replacing needs storage.objects.delete), so claims and results are safe because delete is not given for them. But
  heartbeat.json and checkpoints must be rewritten, so delete is given below the job's attempts, the results among them, but
  for the claims and committed*.json: an island could replace its own uncommitted result. The commit holds the card's
  sha256, so a replaced result is refused, never loaded.
- Conditions match the beginning or end of an object's name: everything below an attempt may be rewritten alike. Listing is no
  access to an object: its binding looks at the prefix asked for (storage.googleapis.com/objectListPrefix).
- Turn on uniform bucket-level access (conditions need it) and object versioning or a soft-delete window, so that the owner
  can bring back what a hostile island replaced."""
_S3_NOTES = """\
"Create only" is enforced by the condition key s3:if-none-match: a PutObject without the header If-None-Match: * is not
allowed for claims, commits and the probe ("Null": "true" means that the header is absent; S3 takes no value but *). Parts
of multipart uploads carry no such header and are refused there; ours are one request.
Versioning on the bucket lets the owner bring back what an island replaced among its own heartbeats, checkpoints and results.
An island whose key falls into other hands can fill its own job's prefix: set a budget alarm, S3 has no quota per key."""


@dataclass(frozen=True)
class Rights:
    """Patterns of keys below the run's prefix; ``*`` stands for any characters, as in S3's resources.

    read: objects that may be read; list: prefixes that may be listed; create: may be written where absent, never
    replaced; write: may be written and replaced. Nothing may be deleted.
    """

    read: tuple[str, ...]
    list: tuple[str, ...]
    create: tuple[str, ...]
    write: tuple[str, ...]


def rights(name: str) -> Rights:
    """What the island of job ``name`` needs. Raises ArchipelError for a name that no job has."""
    if not (name in (MONOLITH, ROUTER) or re.fullmatch(r"0|[1-9][0-9]?", name)):
        raise ArchipelError(f"--island {name!r} is not a job: give an expert's number, monolith or router")
    job, shard = keys.job(name), keys.shard("all" if name in (MONOLITH, ROUTER) else name)
    return Rights(
        read=(keys.RUN, keys.PUBLISHED, f"{shard}/*", f"{job}/*", PROBE),
        list=(f"{job}/*",),
        create=(f"{job}/claims/*.json", f"{job}/committed*.json", PROBE),
        # Attempts are eight digits: a pattern that cannot match claims, committed*.json or reopened/.
        write=tuple(f"{job}/{'?' * 8}/{part}" for part in ("heartbeat.json", "checkpoints/*", "result/*")),
    )


def allows(found: Rights, operation: str, key: str) -> bool:
    """Whether ``rights`` allow an operation: "get", "list" (key: a prefix), "create", "put" (replacing) or "delete"."""
    patterns = {
        "get": found.read,
        "list": found.list,
        "create": (*found.create, *found.write),
        "put": found.write,
    }.get(operation, ())
    return any(_glob(pattern).fullmatch(key) for pattern in patterns)


def _glob(pattern: str) -> re.Pattern[str]:
    """S3's wildcards: ``*`` any characters, slashes too; ``?`` one."""
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern), re.DOTALL)


def split(url: str) -> tuple[str, str, str]:
    """scheme, bucket and prefix ("" or "a/b/") of an s3:// or gs:// URL. Raises ArchipelError."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if parts.scheme not in ("s3", "gs"):
        raise ArchipelError(f"{parts.scheme or 'a folder'} has no policies that we can print: give s3:// or gs://")
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if not plain or not _BUCKET.fullmatch(parts.netloc) or not _PREFIX.fullmatch(prefix):
        raise ArchipelError(
            f"{parts.scheme}://{parts.hostname or ''}/... is no URL of the form {parts.scheme}://bucket/prefix"
        )
    return parts.scheme, parts.netloc, f"{prefix}/" if prefix else ""


def render(url: str, name: str, *, bare: bool = False) -> str:
    """The policy of one island as text: comments (what it does, what the store cannot express), then JSON. ``bare``: the
    JSON alone. Raises ArchipelError."""
    scheme, bucket, prefix = split(url)
    policy = s3_policy(bucket, prefix, name) if scheme == "s3" else gcs_policy(bucket, prefix, name)
    text = json.dumps(policy, indent=2)
    if bare:
        return text
    notes = _S3_NOTES if scheme == "s3" else _GCS_NOTES
    head = (
        f"The island of job {name}, on {scheme}://{bucket}/{prefix}: for `archipel join {url} --only {name}`.\n{notes}"
    )
    return "\n".join(f"# {line}".rstrip() for line in head.splitlines()) + "\n" + text


def s3_policy(bucket: str, prefix: str, name: str) -> dict[str, Any]:
    """An IAM policy document (version 2012-10-17) for the island of a job."""
    need = rights(name)

    def places(patterns: tuple[str, ...]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{prefix}{pattern}" for pattern in patterns]

    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "Read", "Effect": "Allow", "Action": ["s3:GetObject"], "Resource": places(need.read)},
            {
                "Sid": "ListOwnJob",
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
                "Condition": {"StringLike": {"s3:prefix": [f"{prefix}{pattern}" for pattern in need.list]}},
            },
            {
                "Sid": "CreateOnce",
                "Effect": "Allow",
                "Action": ["s3:PutObject"],
                "Resource": places(need.create),
                "Condition": {"Null": {"s3:if-none-match": "false"}},
            },
            {
                "Sid": "WriteOwnAttempts",
                "Effect": "Allow",
                "Action": ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
                "Resource": places(need.write),
            },
            {
                "Sid": "NeverReplace",
                "Effect": "Deny",
                "Action": ["s3:PutObject"],
                "Resource": places(need.create),
                "Condition": {"Null": {"s3:if-none-match": "true"}},
            },
            {
                "Sid": "NeverDelete",
                "Effect": "Deny",
                "Action": ["s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectAcl", "s3:PutBucketPolicy"],
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            },
        ],
    }


def gcs_policy(bucket: str, prefix: str, name: str) -> dict[str, Any]:
    """Custom roles and conditional bindings (IAM policy version 3) for the island of a job."""
    need = rights(name)
    at = f"projects/_/buckets/{bucket}/objects/{prefix}"

    def where(patterns: tuple[str, ...]) -> str:
        return " || ".join(dict.fromkeys(_begins(at, pattern) for pattern in patterns))

    listing = "api.getAttribute('storage.googleapis.com/objectListPrefix', '')"
    lists = " || ".join(f"{listing}.startsWith('{prefix}{pattern.removesuffix('*')}')" for pattern in need.list)
    parts = [f"storage.multipartUploads.{verb}" for verb in ("create", "abort", "listParts")]
    roles = {
        "archipelRead": ["storage.objects.get"],
        "archipelList": ["storage.objects.list"],
        "archipelCreate": ["storage.objects.create"],
        "archipelRewrite": ["storage.objects.create", "storage.objects.delete", *parts],
    }
    conditions = {
        "archipelRead": where(need.read),
        "archipelList": lists,
        "archipelCreate": where(need.create),
        "archipelRewrite": where(need.write),
    }
    return {
        "roles": [{"roleId": role, "includedPermissions": permissions} for role, permissions in roles.items()],
        "policy": {
            "version": 3,
            "bindings": [
                {
                    "role": f"projects/PROJECT/roles/{role}",
                    "members": ["serviceAccount:ISLAND@PROJECT.iam.gserviceaccount.com"],
                    "condition": {"title": f"{role}-{name}", "expression": conditions[role]},
                }
                for role in roles
            ],
        },
    }


def _begins(at: str, pattern: str) -> str:
    """A pattern as a CEL expression over an object's name. Names of attempts are cut to the 0 that they begin with: a
    fence of ten million would be needed for another, and claims, commits and reopenings begin with letters."""
    wild = min((n for n in (pattern.find("*"), pattern.find("?")) if n >= 0), default=-1)
    if wild < 0:
        return f"resource.name == '{at}{pattern}'"
    return f"resource.name.startsWith('{at}{pattern[:wild]}{'0' if pattern[wild] == '?' else ''}')"
