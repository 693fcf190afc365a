"""Grids, and answers to their messages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedpeft.simulation.grid import AnswerAll, InProcessGrid
from fedpeft.state import State
from fedpeft.wire import pack


def own_rows(client: int, folder: Path) -> type[InProcessGrid]:
    """Return a kind of grid on which one client's node has rows of its own, in a folder."""

    class OwnRows(InProcessGrid):
        def node_config(self, node: int) -> dict[str, Any]:
            own = {"data-path": str(folder)} if node == client + 1 else {}
            return super().node_config(node) | own

    return OwnRows


def one_by_one(client_app: Callable[[Message, Context], Message]) -> AnswerAll:
    """Return a function that answers a parcel's messages one after another by any ClientApp."""

    def tried(message: Message, context: Context) -> Message | Exception:
        try:
            return client_app(message, context)
        except Exception as error:
            return error

    def answer_all(
        messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        return [tried(m, c) for m, c in zip(messages, contexts, strict=True)]

    return answer_all


def rewritten(reply: Message, message: Message, state: State, **metrics: Any) -> Message:
    """Return a reply with another state and other metrics.

    Args:
        reply: the reply whose metrics are taken over.
        message: the message that the reply answers.
        state: the state that takes the place of the reply's.
        metrics: metrics that are set anew; null leaves a metric out.
    """
    arrays, index = pack(state)
    numbers = dict(reply.content.metric_records["metrics"]) | metrics
    numbers = {key: value for key, value in numbers.items() if value is not None}
    content = RecordDict(
        {
            "arrays": arrays,
            "config": ConfigRecord({"index": index}),
            "metrics": MetricRecord(numbers),
        }
    )
    return Message(content, reply_to=message)
