"""Measures of a round: of the server's model, and the clients' own, summed up."""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
from flwr.app import Message

from fedpeft.data.rows.source import prefix_of
from fedpeft.engine.cpu import cores
from fedpeft.engine.engine import Engine
from fedpeft.reporting.observer import P10, UNWEIGHTED, WORST, Line
from fedpeft.server.aggregation import Aggregator
from fedpeft.server.limits import FRAME, MOST_ROWS, capped, check_size
from fedpeft.server.replies import printable, reason, restarted, seconds
from fedpeft.server.seen import Seen
from fedpeft.state import State
from fedpeft.wire import sentence, wire_bytes

Ranges = Mapping[str, tuple[float, float]]
OWN_SPLITS = ("validation", "test")  # a client measures itself on both


class Evaluator:
    """Reads and sums up what clients measured, as ``Aggregator`` does what they trained.

    Args:
        up: knows the clients' rows, and how much one of them may weigh.
    """

    def __init__(self, up: Aggregator) -> None:
        self.up, self.config, self.task = up, up.config, up.engine.task

    def over(
        self,
        replies: Iterable[tuple[int, Message]],
        asked: Iterable[int],
        seen: Seen,
        late: str,
    ) -> Line:
        """Sum up the clients' measures; note each client's measures and who measured nothing.

        Too few clients give no measure, because the measure chooses the best round.

        Args:
            replies: client and reply, as they arrive.
            asked: clients that got a message.
            seen: the server's view of the round; takes bytes, refusals and each client's measures.
            late: reason to note for clients that did not reply.
        """
        read: dict[int, tuple[dict[str, float], float | None]] = {}
        silent = dict.fromkeys(asked, late)
        for client, reply in replies:  # a reply that was read is not kept
            try:
                if silent.pop(client, None) is None:
                    raise ValueError("the client replied twice")
                read[client] = self._measured(client, reply, seen), seconds(reply)
            except Exception as error:  # whatever a client sends, it must not end the run
                seen.refuse(client, f"evaluation: {printable(sentence(error))}")
        for client, why in silent.items():
            seen.refuse(client, f"evaluation: {why}")
        measures: dict[int, dict[str, float]] = {}
        for client in sorted(read.keys() - seen.last.refused.keys()):
            measures[client], took = read[client]
            seen.note(client, **noted(measures[client]), evaluation_seconds=took)
        clients, count = self.config.num_clients, len(measures)  # also those without a node now
        least = self.config.fewest_replies(clients)
        if count < least:
            why = f"runtime.min_replies={self.config.runtime.min_replies} asks for {least}"
            return {"unmeasured": f"only {count} of {clients} clients measured, and {why}"}
        return dict(over_clients(measures, self.task.sign, self.up.most_weight(measures)))

    def _measured(self, client: int, reply: Message, seen: Seen) -> dict[str, float]:
        """Count a reply's bytes, check it, and return what a client measured."""
        if not reply.has_error():
            size = wire_bytes(reply.content)
            seen.count("evaluation_uplink_bytes", size, client)
            check_size(size, FRAME)
            if restarted(reply):
                seen.restarted.add(client)
        return measured(reply, self.task.ranges, self.up.known_rows(client))


def measure(
    engine: Engine, split: str, state: State, round: int, last: bool = False
) -> dict[str, float]:
    """Measure the model that clients would get.

    Args:
        engine: the server's engine, whose model takes the values of ``state``.
        split: ``validation``, ``test``, or the name of an extra test.
        state: parameters that the server has set, full.
        round: the round that has ended.
        last: the run's last evaluation, in which tasks may also measure generated text.

    Returns:
        Measures by name, with the split in front.
    """
    engine.replica.load(engine.replica.received(state, round))
    metrics = engine.evaluate(engine.rows.examples(split), cores(), last)
    return {f"{prefix_of(split)}_{key}": value for key, value in metrics.items()}


def measured(reply: Message, ranges: Ranges, rows: Mapping[str, int] | None) -> dict[str, float]:
    """Read and check a client's metrics.

    Args:
        reply: a client's reply to a message to evaluate.
        ranges: least and greatest value of each metric that the task gives.
        rows: number of rows that the client has, by split; null if the server does not know.

    Raises:
        ValueError: the reply is an error, or lacks or holds something that it should not.
    """
    if reply.has_error():
        raise ValueError(reason(reply))
    if "metrics" not in reply.content.metric_records:
        raise ValueError("the reply carries no metrics")
    metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
    counts = [f"{split}-num-examples" for split in OWN_SPLITS]
    bounds = {f"{split}_{name}": ends for split in OWN_SPLITS for name, ends in ranges.items()}
    # A mod around the client's app may add metrics of its own, which nobody asked for here.
    metrics = {key: value for key, value in metrics.items() if key in counts or key in bounds}
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r:.40}")
        least, most = bounds.get(key, (1, math.inf))
        if not least <= value <= most:
            raise ValueError(f"{key} must be from {least:g} to {most:g}, got {value:g}")
    if not all(isinstance(metrics.get(key), int) and metrics[key] >= 1 for key in counts):
        raise ValueError(f"num-examples of {' and '.join(OWN_SPLITS)} must be >= 1")
    _check_rows(metrics, rows)
    return {key: value if key in counts else float(value) for key, value in metrics.items()}


def noted(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a client's measures under the names of the table of clients."""
    return {key.replace("-num-examples", "_rows"): value for key, value in metrics.items()}


def over_clients(
    measures: Mapping[int, Mapping[str, float]], sign: Callable[[str], int], most: float = 1.0
) -> dict[str, float]:
    """Sum up what clients measured, four numbers for each metric.

    ``client_test_accuracy`` is the mean weighted by the clients' rows of the split. With a suffix:
    ``unweighted`` is the mean in which each client counts alike, ``worst`` the
    worst client's value, and ``p10`` the value that nine of ten clients reach: the 10th percentile,
    or the 90th where less is better. Percentiles between two clients are interpolated. The baseline
    is left out unless every client sent it, because a part of the clients have another one.

    Args:
        measures: each client's metrics and numbers of rows of each split, by client.
        sign: 1 if more of a metric is better, -1 if less, by its name.
        most: share of the weighted mean beyond which no client weighs, because clients with rows of
            their own may say any number of rows.
    """
    result: dict[str, float] = {}
    keys = {key for metrics in measures.values() for key in metrics}
    for key in sorted(key for key in keys if not key.endswith("-num-examples")):
        split, _, name = key.partition("_")
        rows = f"{split}-num-examples"
        having = [metrics for metrics in measures.values() if key in metrics]
        if name == "baseline" and len(having) < len(measures):
            continue
        values = [metrics[key] for metrics in having]
        weights = [metrics[rows] for metrics in having]
        if most < 1 and (whole := sum(weights)):
            weights = capped([weight / whole for weight in weights], most)
        weighted = 0.0  # not by sum(), which adds otherwise in Python 3.12
        for weight, value in zip(weights, values, strict=True):
            weighted += weight * value
        less_is_better = sign(name) < 0
        result |= {
            f"client_{key}": weighted / sum(weights),
            f"client_{key}{UNWEIGHTED}": fmean(values),
            f"client_{key}{WORST}": max(values) if less_is_better else min(values),
            f"client_{key}{P10}": float(np.percentile(values, 90 if less_is_better else 10)),
        }
    return result


def _check_rows(metrics: Mapping[str, float], most: Mapping[str, int] | None) -> None:
    for split in OWN_SPLITS:
        number, bound = metrics[f"{split}-num-examples"], MOST_ROWS if most is None else most[split]
        if number > bound:
            raise ValueError(
                f"{split}-num-examples is {number}, but the client measures {bound} rows at most"
            )
