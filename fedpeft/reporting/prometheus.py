"""A run's numbers for Prometheus, at http://127.0.0.1:PORT/metrics while the run lasts."""

from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from fedpeft.reporting.observer import OUTCOMES, Line, Observer

HOST = "127.0.0.1"
MEASURES = ("train_loss", "validation_", "client_validation_")  # first letters of a line's keys


class Metrics(Observer):
    """Serves gauges and counters from ``start`` to ``stop``.

    Args:
        port: TCP port to serve at, on 127.0.0.1 alone.

    Raises:
        ValueError: the extra ``metrics`` is not installed.
    """

    def __init__(self, port: int) -> None:
        try:
            import prometheus_client as prometheus  # an extra
        except ImportError as error:
            raise ValueError(
                f"metrics_port={port} needs prometheus-client: pip install 'fedpeft[metrics]'"
            ) from error
        self.port, self._serve = port, prometheus.start_http_server
        self._serving: tuple[WSGIServer, Thread] | None = None
        self.registry = prometheus.CollectorRegistry()  # metrics of this run alone

        def metric(kind: Any, name: str, text: str, *labels: str) -> Any:
            return kind(f"fedpeft_{name}", text, labels, registry=self.registry)

        gauge, counter = prometheus.Gauge, prometheus.Counter
        self.rounds = metric(gauge, "rounds", "Rounds that the run is to have")
        self.round = metric(gauge, "round", "The last round that ended")
        self.seconds = metric(prometheus.Summary, "round_seconds", "Seconds of a round")
        self.clients = metric(
            counter, "clients", "Clients that were asked, by outcome", "phase", "outcome"
        )
        self.bytes = metric(
            counter, "bytes", "Bytes of the messages, serialised", "phase", "direction"
        )
        self.measure = metric(gauge, "measure", "Measures of the last round that has them", "name")

    def start(self, title: str, num_rounds: int) -> None:
        """Begin to serve.

        Raises:
            ValueError: another program has the port.
        """
        self.rounds.set(num_rounds)
        try:
            self._serving = self._serve(self.port, HOST, self.registry)
        except OSError as error:
            raise ValueError(
                f"metrics_port={self.port} cannot be opened on {HOST}: {error.strerror}"
            ) from error

    def round_done(self, line: Line) -> None:
        self.round.set(line["round"])
        self.seconds.observe(line["seconds"])
        for phase, start in (("train", ""), ("evaluate", "evaluation_")):
            for outcome in OUTCOMES:
                self.clients.labels(phase, outcome).inc(line.get(f"{start}{outcome}_clients", 0))
            for direction in ("up", "down"):
                sent = line.get(f"{start}{direction}link_bytes", 0)
                self.bytes.labels(phase, direction).inc(sent)
        for key, value in line.items():
            if key.startswith(MEASURES) and value is not None:
                self.measure.labels(key).set(value)

    def stop(self, status: str = "completed", reason: str = "") -> None:
        """End serving, so that the next run of this process can have the port."""
        if self._serving is not None:
            server, thread = self._serving
            server.shutdown()
            server.server_close()
            thread.join()
            self._serving = None
