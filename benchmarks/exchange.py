"""Measure the server's memory over many rounds that evaluate ten thousand clients.

    python -m benchmarks.exchange [--clients 10000] [--rounds 200]

In each round the server asks all clients of a local grid to evaluate. The clients answer at once
with constant replies, so only the server and the grid can grow. ``rss`` is the resident memory in
MiB after the tenth round and after the last one.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import psutil
from flwr.app import Context, Message, MetricRecord, RecordDict

from benchmarks.measure import save
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.simulation.grid import InProcessGrid

WARM = 10  # rounds before the first look at the memory


def answer_all(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Answer each message with the same few metrics."""
    metrics: Any = {"validation-num-examples": 1, "test-num-examples": 1, "validation_loss": 1.0}
    return [Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=m) for m in messages]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    grid, nodes = InProcessGrid(args.clients, answer_all), Nodes(args.clients, 600)  # type: ignore[arg-type]
    nodes.join(grid)
    memory = psutil.Process().memory_info
    result: dict[str, Any] = {"clients": args.clients, "rounds": args.rounds, "rss": {}}
    for round in range(1, args.rounds + 1):
        content = RecordDict()
        messages = {
            client: Message(content, node, "evaluate", group_id=f"evaluate/{round}/0")
            for client, node in nodes.of.items()
        }
        replies = dict(exchange(grid, messages, 3600))
        assert len(replies) == args.clients
        if round in (WARM, args.rounds):
            result["rss"][str(round)] = memory().rss >> 20
    save("exchange", result)


if __name__ == "__main__":
    main()
