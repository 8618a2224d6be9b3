"""What the pages do on somebody's behalf: ask for clips, follow them, find them again. The jobs are the HTTP interface's.

What is asked for together (one clip, or several to compare) is a group: the jobs' request names begin with its name, so that a
page that is opened again finds it in the table, whatever happened to the browser or the server meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archipel.serving import asked as requests
from archipel.serving.errors import Refused
from archipel.serving.jobs import COMPLETED, FAILED, Job
from archipel.studio.context import StudioContext

GENERATE, COMPARE = "studio-generate", "studio-compare"
_LOOK = 0.3  # seconds between looks at a job that is followed
_STORED = "The server cannot store anything now: its disk may be full. Try again later."


@dataclass(frozen=True)
class Shot:
    """A job as a page shows it. ``left``: seconds until it is there, None where nobody knows; ``ahead``: jobs before it."""

    job: Job
    progress: int = 0
    left: float | None = None
    ahead: int = 0
    trace: Mapping[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.job.status in (COMPLETED, FAILED)


class Desk:
    """``stopping``: whether the server has been asked to end."""

    def __init__(self, context: StudioContext, stopping: Callable[[], bool] = lambda: False) -> None:
        self.context, self.service, self.stopping = context, context.service, stopping

    # --- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, owner: str, kind: str, several: Sequence[Mapping[str, Any]], image: bytes | None = None) -> str:
        """Queue one job per entry of ``several`` (fields as in ``serving.asked``); returns their group's name.

        All or none. Raises Refused, whose message is for people.
        """
        return await asyncio.to_thread(self._ask, owner, kind, [dict(fields) for fields in several], image)

    def _ask(self, owner: str, kind: str, several: list[dict[str, Any]], image: bytes | None) -> str:
        service, group = self.service, f"{kind}-{secrets.token_hex(8)}"
        made: list[Job] = []
        try:
            checked = [requests.read(fields, image, service.offer, service.limits) for fields in several]
            for number, asked in enumerate(checked):
                made.append(service.create(owner, asked, f"{group}/{number:02d}"))
        except Refused:
            self._take_back(made)
            raise
        except sqlite3.OperationalError as error:
            self._take_back(made)
            raise Refused(503, _STORED) from error
        return group

    def _take_back(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.service.delete(job)

    # --- looking -----------------------------------------------------------------------------------------------------

    def latest(self, owner: str, kind: str) -> str | None:
        """The group that was asked for last, as far as anything of it is left."""
        found = self.service.jobs.names_of_requests(owner, f"{kind}-", 1)
        return found[0].rpartition("/")[0] if found else None

    def shot(self, job: Job) -> Shot:
        worker, jobs = self.service.worker, self.service.jobs
        if job.status == COMPLETED:
            return Shot(job, 100, trace=worker.trace(job.id))
        if job.status == FAILED:
            return Shot(job)
        waits = job.started is None
        return Shot(job, worker.progress(job.id), worker.left(job.id), jobs.ahead(job) if waits else 0)

    def shots(self, owner: str, group: str) -> list[Shot]:
        """What is there of a group: cancelled or removed jobs are not."""
        return [self.shot(job) for job in self.service.jobs.by_request(owner, f"{group}/")]

    async def follow(self, owner: str, group: str) -> AsyncIterator[list[Shot]]:
        """A group at each change, until all of it has ended, is gone, or the server stops."""
        before: list[Shot] | None = None
        while True:
            now = self.shots(owner, group)
            if now != before:
                yield now
                before = now
            if all(shot.ended for shot in now) or self.stopping():
                return
            await asyncio.sleep(_LOOK)

    def page(self, owner: str, after: str | None, count: int) -> tuple[list[Shot], bool]:
        """Finished clips and failed jobs of an owner, newest first, beginning after the job ``after``; whether there are more."""
        jobs = self.service.jobs
        found: list[Job] = []
        begin = jobs.find(after, owner) if after else None
        while len(found) <= count:
            more = jobs.page(owner, after=begin, limit=count + 1)
            found += [job for job in more if job.status in (COMPLETED, FAILED)]
            if len(more) <= count:
                break
            begin = more[-1]
        return [self.shot(job) for job in found[:count]], len(found) > count

    # --- ending ------------------------------------------------------------------------------------------------------

    async def cancel(self, owner: str, group: str) -> None:
        """Remove what of a group is not finished."""
        jobs = [shot.job for shot in self.shots(owner, group) if not shot.ended]
        await asyncio.to_thread(self._take_back, jobs)

    async def delete(self, owner: str, name: str) -> None:
        """Remove a clip of this owner; nothing where there is none."""
        job = self.service.jobs.find(name, owner)
        if job is not None:
            await asyncio.to_thread(self._take_back, [job])
