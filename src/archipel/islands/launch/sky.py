"""SkyPilot: one task file per training job, for the user to launch. Nothing is launched from here.

A task's command is the very one that any island runs. The files hold no secret: the machine has a role that may use the
bucket, or `sky` is given the names of environment variables, whose values it takes from the shell it is started in.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from archipel import store as files
from archipel.errors import ArchipelError, Stopped
from archipel.islands import site as sites
from archipel.islands.claims import read_state
from archipel.islands.launch import engine
from archipel.islands.launch.local import in_order
from archipel.islands.objects import Objects
from archipel.islands.site import SkySite
from archipel.islands.urls import check_url, is_url, local_root
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.spread import Spread

# Not ours to send: SkyPilot reports usage unless this is set.
QUIET = "SKYPILOT_DISABLE_USAGE_COLLECTION=1"
_CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
}
# What else the command needs to find the bucket: no secrets, so they go along.
_WHERE = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT")


def check_store(url: str) -> str:
    """The store's URL. Raises ArchipelError for one that a machine in a cloud cannot see, or with credentials in it."""
    if not is_url(url) or local_root(url) is not None:
        raise ArchipelError(
            f"--engine sky needs a bucket that machines in a cloud can reach, and {url} lies on this one: give "
            "--store s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
        )
    return check_url(url)


def task(
    run: Run, store: str, name: str, site: SkySite, threads: int | None, sets: Sequence[str] = ()
) -> dict[str, Any]:
    """One job's task as SkyPilot reads it: name, resources, environment, setup, run. Deterministic, without secrets.

    ``sets``: pairs on top of the run's ``site.toml``, whose [train] says how the job computes.
    """
    asked = {
        "infra": site.infra,
        "accelerators": site.accelerators,
        "cpus": site.cpus,
        "memory": site.memory,
        "disk_size": site.disk_size,
        "image_id": site.image_id,
    }
    where = {key: value for key in _WHERE if (value := os.environ.get(key)) and "@" not in value}
    environment = engine.environment(threads) | {"ARCHIPEL_STOP_WITH_PARENT": "0"} | where
    command = shlex.join(["archipel", *engine.join_arguments(store, run, name, threads, sets)])
    return {
        "name": task_name(run, name),
        "resources": {key: value for key, value in asked.items() if value} | {"use_spot": site.use_spot},
        "envs": environment | site.envs,
        "setup": "set -e\n" + "\n".join(site.setup) + "\n",
        "run": command + "\n",
    }


def task_name(run: Run, name: str) -> str:
    return f"archipel-{run.id[:8]}-{name}"


def render(value: dict[str, Any]) -> str:
    """YAML, with texts of several lines as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, words: str) -> Any:
        style = "|" if "\n" in words else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", words, style=style)

    Dumper.add_representer(str, text)
    head = "# One training job of an Archipel run, for SkyPilot. Made by `archipel run RUN --engine sky`.\n"
    return head + yaml.dump(value, Dumper=Dumper, sort_keys=False, width=10_000, allow_unicode=True)


def launch_command(path: Path, value: dict[str, Any], store: str) -> str:
    """What the user types. A managed job is started again where a spot machine was taken away."""
    secrets = [name for name in _CREDENTIALS.get(store.partition("://")[0], ()) if name in os.environ]
    given = [part for name in secrets for part in ("--secret", name)]  # the name only: sky reads the value itself
    if value["resources"]["use_spot"]:
        verb = ["sky", "jobs", "launch", "--yes", "--detach-run"]
    else:
        verb = ["sky", "launch", "--yes", "--detach-run", "--down", "--cluster", value["name"]]
    return f"{QUIET} {shlex.join([*verb, *given, str(path)])}"


class SkyEngine:
    """``archipel run RUN --engine sky --store s3://...``: publishes the run and writes ``RUN/sky/<job>.yaml``.

    Called again when the islands are done, it brings their results back, and the run goes on here.
    """

    def __init__(self, run: Run, store: str, threads: int | None = None, sets: Iterable[str] = ()) -> None:
        self.run, self.store, self.threads = run, check_store(store), threads
        self._sets = tuple(sets)
        self.site = sites.read(run.root, self._sets).sky

    @property
    def items(self) -> Spread | None:
        return None

    @property
    def tasks(self) -> Spread | None:
        return None

    @property
    def device(self) -> str | None:
        return None

    def __enter__(self) -> SkyEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def train(self, names: list[str], stop: StopFlag) -> None:
        """Write the task files of what is not done and stop there; with all done, bring the results back.

        Raises Stopped (no failure: exit 0) after writing, ArchipelError where the store is refused or stays away.
        """
        engine.publish(self.run, self.store)
        objects = Objects.open(self.store)
        left = [name for name in in_order(self.run, names) if not read_state(objects, name).done]
        if not left:
            engine.collect(self.run, self.store)
            return
        print(f"{len(left)} jobs are not done; launch those that are not running yet:", file=sys.stderr, flush=True)
        for line in self.write(left):
            print(line, flush=True)
        raise Stopped(
            f"nothing was launched from here: the task files are in {self.run.root / 'sky'}. `archipel status {self.store}` "
            "shows how the jobs fare; when all are done, the same command brings the results back and goes on",
            interrupted=False,
        )

    def write(self, names: list[str]) -> Iterator[str]:
        """Write ``RUN/sky/<job>.yaml`` for each name; yields the commands that launch them."""
        for name in names:
            value = task(self.run, self.store, name, self.site, self.threads, self._sets)
            path = self.run.root / "sky" / f"{name}.yaml"
            files.write_text(path, render(value))
            yield launch_command(path, value, self.store)
