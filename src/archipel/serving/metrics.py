"""What Prometheus reads: jobs by state, requests by route, seconds per clip. Nothing that a client wrote is a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archipel.serving.jobs import Jobs

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """A registry of its own, so that several servers may live in one process (tests)."""

    def __init__(self, jobs: Jobs) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram
        from prometheus_client.core import GaugeMetricFamily

        class States:
            def collect(self) -> Iterator[Any]:
                gauge = GaugeMetricFamily("archipel_jobs", "Jobs that are kept, by state", labels=["state"])
                for state, count in jobs.counts().items():
                    gauge.add_metric([state], count)
                yield gauge

        self.registry = CollectorRegistry()
        self.registry.register(States())
        given: dict[str, Any] = {"registry": self.registry}
        self.created = Counter("archipel_jobs_created", "Jobs that were queued", **given)
        self.clips = Counter("archipel_clips", "Clips by what came of them", ["outcome"], **given)
        self.seconds = Histogram("archipel_batch_seconds", "Seconds per batch of clips", buckets=_SECONDS, **given)
        self.blocked = Counter("archipel_blocked", "What the safety filter refused or withheld", ["what"], **given)
        self.requests = Counter("archipel_http_requests", "Requests", ["route", "method", "status"], **given)
        self.latency = Histogram(
            "archipel_http_seconds", "Seconds to the head of an answer", ["route"], buckets=_SECONDS, **given
        )

    def made(self, outcome: str, clips: int, seconds: float) -> None:
        self.clips.labels(outcome).inc(clips)
        if outcome == "blocked":
            self.blocked.labels("clip").inc(clips)
        if outcome == "completed":
            self.seconds.observe(seconds)

    def page(self) -> bytes:
        from prometheus_client import generate_latest

        return bytes(generate_latest(self.registry))
