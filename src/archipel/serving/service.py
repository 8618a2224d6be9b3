"""One server's parts together: what it offers, its jobs and worker, who may ask, what is counted."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel.ensemble.settings import Settings
from archipel.errors import ArchipelError
from archipel.serving.asked import Asked, Offer
from archipel.serving.errors import Refused, wrong
from archipel.serving.jobs import COMPLETED, Job, Jobs, OtherRequest, QueueFull, ShareFull
from archipel.serving.keys import Keys
from archipel.serving.limits import Limits
from archipel.serving.metrics import Metrics
from archipel.serving.worker import Worker

if TYPE_CHECKING:
    from archipel.ensemble.pipeline import Archipelago
    from archipel.ensemble.safety import Safety

_LOOK_AT_PARTS = 5.0  # seconds for which a strategy that could be used is taken to be usable


@dataclass
class Service:
    """What routes work with. Open for as long as the process holds the folder's lock."""

    archipelago: Archipelago
    offer: Offer
    jobs: Jobs
    worker: Worker
    keys: Keys
    limits: Limits
    metrics: Metrics
    safety: Safety | None = None

    @classmethod
    def open(
        cls, archipelago: Archipelago, folder: Path, keys: list[str], limits: Limits, safety: Safety | None = None
    ) -> Service:
        """``folder`` (mode 0700) gets jobs.sqlite and clips/; ``safety``: the switch for public serving.

        Raises ArchipelError where it cannot be used."""
        folder.mkdir(parents=True, exist_ok=True)
        clips = folder / "clips"
        clips.mkdir(exist_ok=True)
        for private in (folder, clips):
            private.chmod(0o700)
        jobs = Jobs(folder)
        metrics = Metrics(jobs)
        worker = Worker(archipelago, jobs, clips, limits, metrics.made, safety)
        offer = Offer.of(archipelago.config, archipelago.model, limits)
        salt = jobs.fact("salt", secrets.token_bytes(32))
        asked_by = Keys(keys, salt, limits.session_seconds)
        return cls(archipelago, offer, jobs, worker, asked_by, limits, metrics, safety)

    def __post_init__(self) -> None:
        self._usable: dict[str, float] = {}
        self._looking = threading.Lock()

    def close(self) -> None:
        self.worker.stop()
        if not self.worker.alive:
            self.jobs.close()

    # --- what routes do ----------------------------------------------------------------------------------------------

    def create(self, owner: str, asked: Asked, same_request: str | None) -> Job:
        """Queue a clip. Raises Refused: 400 where it is blocked or the strategy's parts are not there, 429 where the queue
        or this owner's share of it is full, 503 where the disk is."""
        self._check_safe(asked)
        if self.worker.full:
            raise Refused(
                503,
                "the server's disk is full, nothing can be stored now: try again later",
                code="disk_full",
                headers={"Retry-After": "30"},
            )
        self._check_parts(asked)
        try:
            job = self.jobs.add(
                owner,
                asked.prompt,
                asked.seed,
                asked.settings,
                image=asked.image,
                same_request=same_request,
                digest=asked.digest,
                most=self.limits.queue,
                shared=self.keys.several,
            )
        except QueueFull as full:
            after = self.worker.wait(self.limits.queue)
            whose = " of yours" if isinstance(full, ShareFull) else f" ({self.limits.queue})"
            raise Refused(
                429,
                f"as many clips{whose} wait already as may: try again in about {after} s",
                code="queue_full",
                headers={"Retry-After": str(after)},
            ) from None
        except OtherRequest:
            raise wrong("Idempotency-Key", "this Idempotency-Key came before with another request") from None
        self.metrics.created.inc()
        self.worker.call()
        return job

    def _check_safe(self, asked: Asked) -> None:
        """Raises Refused (400) for what the safety filter does not let pass."""
        if self.safety is None:
            return
        name, words = "", "this server does not make clips of what this {} holds"
        if self.safety.line(asked.prompt) is not None:
            name, what = "prompt", "prompt"
        elif any(self.safety.picture(one) for one in (asked.upload, asked.image) if one is not None):
            name, what = "input_reference", "picture"
        if name:
            self.metrics.blocked.labels(what).inc()
            raise wrong(name, words.format(what), "moderation_blocked")

    def _check_parts(self, asked: Asked) -> None:
        strategy = asked.settings["strategy"]
        with self._looking:
            if time.monotonic() - self._usable.get(strategy, -1e9) < _LOOK_AT_PARTS:
                return
            try:
                self.archipelago.refresh()
                settings = Settings.of(self.offer.config, strategy=strategy)
                self.archipelago.lineup(settings, None, 1)
            except ArchipelError as error:
                said = str(error).replace(str(self.archipelago.parts.source.where), "RUN")
                raise wrong("strategy", f"strategy {strategy} cannot be used here now: {said}") from error
            self._usable[strategy] = time.monotonic()

    def delete(self, job: Job) -> None:
        """Cancel or remove a job: its prompt, picture and clip are gone afterwards."""
        try:
            self.jobs.delete(job.id)
        except sqlite3.OperationalError:  # on a full disk the clip's room is what its row needs to go
            self.worker.remove(job.id)
            self.jobs.delete(job.id)
        self.worker.remove(job.id)
        self.worker.call()

    def video(self, job: Job) -> dict[str, Any]:
        """A job as the OpenAI interface shows it, with the settings that it is made with."""
        done = job.status == COMPLETED
        side = self.offer.config.clips.size * job.settings["scale"]
        return {
            "id": job.id,
            "object": "video",
            "model": self.offer.model,
            "status": job.status,
            "progress": 100 if done else self.worker.progress(job.id),
            "created_at": int(job.created),
            "completed_at": int(job.finished) if done and job.finished else None,
            "expires_at": int(job.finished + self.limits.keep_seconds) if done and job.finished else None,
            "prompt": job.prompt,
            "seconds": self.offer.seconds,
            "size": f"{side}x{side}",
            "remixed_from_video_id": None,
            "error": {"code": job.error_code, "message": job.error_message} if job.error_code else None,
            "seed": job.seed,
            "strategy": job.settings["strategy"],
            "guidance": job.settings["guidance"],
            "steps": job.settings["steps"],
            "warnings": self.worker.warnings(job.id) if done else [],
        }


Tell = Callable[[str], None]
