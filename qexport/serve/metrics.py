"""What Prometheus is told. One registry per service, so that tests and embedders can have several."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Bounds of the histograms: from a small model on a GPU to a large one on a CPU."""


class Metrics:
    """Counters, gauges and histograms of a service; names are documented in docs/serving.md."""

    def __init__(self) -> None:
        """All at zero."""
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter("qexport_requests", "Answers by status.", ["path", "status"], registry=registry)
        self.request_s = Histogram(
            "qexport_request_seconds", "Time of a request.", ["path"], registry=registry, buckets=SECONDS
        )
        self.images = Counter(
            "qexport_images", "Images drawn and delivered to a request.", ["bundle"], registry=registry
        )
        self.padding = Counter("qexport_padding_images", "Images drawn to fill a batch.", ["bundle"], registry=registry)
        self.batch_s = Histogram(
            "qexport_batch_seconds", "Time of a batch.", ["bundle", "bucket"], registry=registry, buckets=SECONDS
        )
        self.queued = Gauge("qexport_queue_images", "Images that wait.", ["bundle"], registry=registry)
        self.dropped = Counter(
            "qexport_dropped_images",
            "Images that nobody waited for when their turn came.",
            ["bundle"],
            registry=registry,
        )

        self.drawers = Gauge("qexport_drawers_ready", "Drawers that can draw.", ["bundle"], registry=registry)
        self.lost = Counter("qexport_lost_drawers", "Drawers that ended or hung.", ["bundle"], registry=registry)
        self.again = Counter(
            "qexport_redrawn_images", "Images drawn again after a drawer was lost.", ["bundle"], registry=registry
        )

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
