"""`archipel policy`: an island's own operations are allowed, everything else is not; by the printed JSON alone."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archipel import cli
from archipel.errors import ArchipelError
from archipel.islands import keys, objects, policy
from archipel.islands.bucket import Bucket
from archipel.islands.worker import Options, join
from archipel.progress import StopFlag

BUCKET, PREFIX = "archipel-runs", "teams/a/run-1/"


# --- evaluators of what was printed ----------------------------------------------------------------------------------


def s3_allows(document: dict[str, Any], operation: str, key: str) -> bool:
    """IAM's rule: allowed by some statement and denied by none. ``create`` carries If-None-Match, ``put`` does not."""
    action = {"get": "s3:GetObject", "list": "s3:ListBucket", "delete": "s3:DeleteObject"}.get(
        operation, "s3:PutObject"
    )
    arn = f"arn:aws:s3:::{BUCKET}" + ("" if operation == "list" else f"/{PREFIX}{key}")
    values = {"s3:if-none-match": "*"} if operation == "create" else {}
    if operation == "list":
        values["s3:prefix"] = f"{PREFIX}{key}"
    verdicts = set()
    for statement in document["Statement"]:
        applies = action in statement["Action"] and any(_like(arn, pattern) for pattern in statement["Resource"])
        if applies and all(_holds(kind, part, values) for kind, part in statement.get("Condition", {}).items()):
            verdicts.add(statement["Effect"])
    return verdicts == {"Allow"}


def _like(text: str, pattern: str) -> bool:
    assert "[" not in pattern
    return fnmatch.fnmatchcase(text, pattern)


def _holds(kind: str, part: dict[str, Any], values: dict[str, str]) -> bool:
    if kind == "Null":
        return all((key not in values) == (wanted == "true") for key, wanted in part.items())
    assert kind == "StringLike", kind
    return all(key in values and any(_like(values[key], p) for p in patterns) for key, patterns in part.items())


def gcs_allows(printed: dict[str, Any], operation: str, key: str) -> bool:
    """A permission is had where some binding's role holds it and its condition is true."""
    needed = {
        "get": {"storage.objects.get"},
        "list": {"storage.objects.list"},
        "create": {"storage.objects.create"},
        "put": {"storage.objects.create", "storage.objects.delete"},
        "delete": {"storage.objects.delete"},
    }[operation]
    roles = {role["roleId"]: set(role["includedPermissions"]) for role in printed["roles"]}
    name = f"projects/_/buckets/{BUCKET}" + ("" if operation == "list" else f"/objects/{PREFIX}{key}")
    had: set[str] = set()
    for binding in printed["policy"]["bindings"]:
        if any(_cel(term, name, PREFIX + key) for term in binding["condition"]["expression"].split(" || ")):
            had |= roles[binding["role"].rpartition("/")[2]]
    return needed <= had


def _cel(term: str, name: str, prefix: str) -> bool:
    if found := re.fullmatch(r"resource\.name == '([^']*)'", term):
        return name == found[1]
    if found := re.fullmatch(r"resource\.name\.startsWith\('([^']*)'\)", term):
        return name.startswith(found[1])
    found = re.fullmatch(r"api\.getAttribute\('([^']*)', ''\)\.startsWith\('([^']*)'\)", term)
    assert found and found[1] == "storage.googleapis.com/objectListPrefix", term
    return "/objects/" not in name and prefix.startswith(found[2])


def allowed(scheme: str, name: str, operation: str, key: str) -> bool:
    printed = json.loads(policy.render(f"{scheme}://{BUCKET}/{PREFIX}", name, bare=True))
    return s3_allows(printed, operation, key) if scheme == "s3" else gcs_allows(printed, operation, key)


# --- a real island ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(operation, key) of every request of ``join --only 0``, as they leave for the store."""
    seen: set[tuple[str, str]] = set()

    def watch(method: str, tell: Any) -> None:
        real = getattr(objects.Objects, method)

        def call(self: Any, *arguments: Any, **more: Any) -> Any:
            seen.add(tell(*arguments, **more))
            return real(self, *arguments, **more)

        monkeypatch.setattr(objects.Objects, method, call)

    watch("_put", lambda key, data, create: ("create" if create else "put", key))
    watch("_get", lambda key, limit: ("get", key))
    watch("_range", lambda key, begin, end: ("get", key))
    watch("_list", lambda prefix: ("list", prefix + "/"))  # what obstore asks the store for
    monkeypatch.setattr(objects.Objects, "remove", lambda *a: pytest.fail("an island removes nothing"))
    with StopFlag() as stop:
        join(bucket, Options(only=("0",), work=tmp_path / "work"), stop)
    assert bucket.state("0").done
    yield seen


def test_an_island_may_do_what_it_does_and_others_may_not(recorded: set[tuple[str, str]]) -> None:
    assert {operation for operation, _ in recorded} == {"get", "list", "create", "put"} and len(recorded) > 10
    common = {keys.RUN, keys.PUBLISHED, policy.PROBE}
    for scheme in ("s3", "gs"):
        refused = {(operation, key) for operation, key in recorded if not allowed(scheme, "0", operation, key)}
        assert not refused
        # The same operations are refused to the island of the next job, but for what all read and the probe.
        assert {key for operation, key in recorded if allowed(scheme, "1", operation, key)} <= common
    # And nothing is granted by name that join does not read.
    read = {key for operation, key in recorded if operation == "get"}
    for pattern in policy.rights("0").read:
        assert any(fnmatch.fnmatchcase(key, pattern) for key in read), f"{pattern} is never read"


FORBIDDEN = [
    ("delete", "jobs/2/claims/00000001.json"),
    ("delete", "jobs/2/committed.json"),
    ("delete", "run.toml"),
    ("put", "jobs/2/claims/00000001.json"),
    ("put", "jobs/2/committed.json"),
    ("put", "jobs/2/committed-1.json"),
    ("put", "probe"),
    ("put", "run.toml"),
    ("create", "run.toml"),
    ("create", "published.json"),
    ("create", "shards/2/validation.safetensors"),
    ("create", "jobs/2/reopened/1.json"),
    ("put", "jobs/2/reopened/1.json"),
    ("create", "jobs/1/claims/00000001.json"),
    ("create", "jobs/22/claims/00000001.json"),
    ("put", "jobs/22/00000001/heartbeat.json"),
    ("put", "jobs/1/00000001/result/model.safetensors"),
    ("get", "shards/1/train.safetensors"),
    ("get", "shards/22/train.safetensors"),
    ("get", "shards/all/train.safetensors"),
    ("get", "jobs/1/00000001/checkpoints/00000010/state.safetensors"),
    ("get", "jobs/22/committed.json"),
    ("create", "admitted/2.json"),
    ("put", "admitted/2.json"),
    ("create", "refused/2/00000001.json"),
    ("get", "admitted/1.json"),
    ("list", ""),
    ("list", "jobs/"),
    ("list", "jobs/22/"),
    ("list", "shards/"),
    ("get", "../other/run.toml"),
]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize(("operation", "key"), FORBIDDEN)
def test_what_an_island_may_not(scheme: str, operation: str, key: str) -> None:
    assert not allowed(scheme, "2", operation, key)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("name", ["0", "2", "63", "monolith", "router"])
def test_what_every_island_may(scheme: str, name: str) -> None:
    shard = "all" if name in ("monolith", "router") else name
    for operation, key in [
        ("get", "run.toml"), ("get", "published.json"), ("get", f"shards/{shard}/train.safetensors"),
        ("list", f"jobs/{name}/"), ("list", f"jobs/{name}/claims/"), ("get", f"jobs/{name}/committed-1.json"),
        ("create", keys.claim(name, 12)), ("create", keys.committed(name)), ("create", keys.committed(name, 3)),
        ("put", keys.heartbeat(name, 12)), ("put", f"{keys.checkpoint(name, 12, 100)}/state.safetensors"),
        ("put", f"{keys.result(name, 12)}/card.json"), ("get", f"{keys.checkpoint(name, 11, 100)}/manifest.json"),
        ("create", "probe"), ("get", "probe"),
    ]:  # fmt: skip
        assert allowed(scheme, name, operation, key), (operation, key)


def test_replacing_is_denied_even_if_another_policy_allows_it() -> None:
    printed = json.loads(policy.render(f"s3://{BUCKET}/{PREFIX}", "2", bare=True))
    everything = {"Effect": "Allow", "Action": ["s3:PutObject", "s3:DeleteObject"], "Resource": ["arn:aws:s3:::*"]}
    printed["Statement"].append(everything)
    assert s3_allows(printed, "create", "jobs/2/claims/00000001.json")
    assert not s3_allows(printed, "put", "jobs/2/claims/00000001.json")
    assert not s3_allows(printed, "delete", "jobs/2/claims/00000001.json")


def test_the_verb_prints_comments_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["policy", f"gs://{BUCKET}/x", "--island", "monolith"])
    out = capsys.readouterr().out
    assert not ended.value.code and "cannot express" in out
    json.loads("\n".join(line for line in out.splitlines() if not line.startswith("#")))
    with pytest.raises(SystemExit):
        cli.main(["policy", f"s3://{BUCKET}", "--island", "2", "--json"])
    assert "arn:aws:s3:::archipel-runs/run.toml" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("url", "name", "words"),
    [
        ("az://container/x", "2", "az has no policies"),
        ("/tmp/x", "2", "a folder has no policies"),
        ("s3://bucket/x", "3; drop", "not a job"),
        ("s3://bucket/x", "-1", "not a job"),
        ("s3://user:secret@bucket/x", "2", "no URL of the form"),
        ("s3://bucket/x*", "2", "no URL of the form"),
        ('s3://bucket/x"y', "2", "no URL of the form"),
        ("gs://bucket/x'||true||'", "2", "no URL of the form"),
    ],
)
def test_wrong_use_is_named(url: str, name: str, words: str) -> None:
    with pytest.raises(ArchipelError, match=re.escape(words)) as caught:
        policy.render(url, name)
    assert "secret" not in str(caught.value)
