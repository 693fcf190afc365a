"""Rounds go on with the nodes that are there, and end with too few."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from fedpeft.client.app import app as client_app
from fedpeft.config.schema import Settings
from fedpeft.server import strategy
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.server.seen import Asked, RoundFailed
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.wire import identify, wire_bytes
from tests.conftest import Answer, Runner

AGAIN = "resume=true goes on"


def failing(clients: set[int], times: int = 1000) -> Answer:
    """Answer, but fail so many of the messages that ask some clients to train."""
    left = dict.fromkeys(clients, times)

    def answer(message: Message, context: Context) -> Message:
        client = int(context.node_config.get("partition-id", -1))
        if message.metadata.message_type == "train" and left.get(client, 0):
            left[client] -= 1
            raise RuntimeError("no power")
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    return answer


@pytest.mark.parametrize(
    ("asked", "clients", "least"),
    [(0.5, 3, 2), (0.5, 4, 2), (0.5, 1, 1), (1.0, 5, 5), (0.01, 3, 1), (2, 3, 2), (7, 3, 3)],
)
def test_how_many_replies_a_round_needs(asked: float, clients: int, least: int) -> None:
    runtime = Settings().runtime.__class__(min_replies=asked)
    assert Settings(runtime=runtime).fewest_replies(clients) == least


def test_one_of_three_is_no_average(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(RoundFailed) as failed:
        run("method=lora", f"run_dir={tmp_path / 'run'}", answer=failing({0, 2}))
    assert str(failed.value).startswith(
        "only 1 of 3 replies were usable, and runtime.min_replies=0.5 asks for 2; client 0: no "
    )
    assert str(failed.value).endswith(f"run_dir={tmp_path / 'run'} {AGAIN}")
    assert len(run.recorder.of("train", 1)) == 2  # client 1, in the round and in its repetition


def test_a_run_that_diverged_is_not_told_to_go_on(run: Runner) -> None:
    with pytest.raises(
        RoundFailed, match="stopped after round 0, and would probably diverge again: lower lr and"
    ):
        run("lr=1e30", "optimizer.max_grad_norm=null")


def test_fewer_may_be_allowed(run: Runner) -> None:
    summary = run("num_rounds=1", "runtime.min_replies=1", answer=failing({0, 2}))
    assert sorted(summary["refused"]["1"]) == ["0", "2"]
    assert run.lines()[1]["weights"] == {"1": 1.0}


def test_a_round_is_repeated_once(run: Runner) -> None:
    """The second time everybody is there, so the result equals a run's without a failure."""
    whole = run("method=fedsa_lora")
    once = run.lines()[1]
    repeated = run("method=fedsa_lora", answer=failing({0, 2}, times=1))
    assert repeated["shared_state_sha256"] == whole["shared_state_sha256"]
    assert repeated["final"] == whole["final"] and repeated["refused"] == {}
    line = run.lines()[1]
    assert line["repeated"].startswith("only 1 of 3 replies were usable")
    # the first try's messages were sent as well
    assert line["downlink_bytes"] == 2 * once["downlink_bytes"]
    sent = [wire_bytes(e.up.content) for e in run.recorder.of("train", 1)]
    assert len(sent) == 1 + 3 and line["uplink_bytes"] == sum(sent)


class Changing(InProcessGrid):
    """A grid on which nodes come, go, and return under other ids.

    Attributes:
        partitions: the partition that each node holds, by node id.
    """

    def __init__(self, partitions: dict[int, int]) -> None:
        super().__init__(3, lambda messages, _: [self.answered(m) for m in messages])
        self.partitions = partitions

    def answered(self, message: Message) -> Message:
        return Message(RecordDict(), reply_to=message)

    def get_node_ids(self) -> list[int]:
        return list(self.partitions)

    def node_config(self, node: int) -> dict[str, Any]:
        return {"partition-id": self.partitions[node]}


def test_nodes_come_go_and_return() -> None:
    grid, nodes = Changing({11: 0, 12: 1, 13: 2}), Nodes(3, 5)
    nodes.join(grid)
    assert nodes.of == {0: 11, 1: 12, 2: 13}
    del grid.partitions[12]
    nodes.join(grid)
    assert nodes.of == {0: 11, 2: 13}  # nobody waits for it
    grid.partitions |= {99: 1, 14: 2}
    nodes.join(grid)
    assert nodes.of == {0: 11, 1: 99, 2: 13}
    assert nodes.left_out == {14: "node 14 holds partition 2, as node 13 does, which came first"}
    del grid.partitions[13]
    nodes.join(grid)
    assert nodes.of == {0: 11, 1: 99, 2: 14} and nodes.left_out == {}


def test_only_a_new_run_needs_all_nodes() -> None:
    nodes = Nodes(3, 0.3)
    with pytest.raises(TimeoutError, match=r"no client holds partitions \[1\] of num_clients=3"):
        nodes.join(Changing({11: 0, 13: 2}))
    nodes.goes_on = True
    nodes.join(Changing({11: 0, 13: 2}), [0, 1, 2], 2)
    assert nodes.of == {0: 11, 2: 13}


def test_a_round_waits_for_the_nodes_that_it_needs() -> None:
    grid, nodes = Changing({11: 0, 12: 1, 13: 2}), Nodes(3, 0.5)
    nodes.join(grid)
    del grid.partitions[12]
    coming = iter([{}, {}, {99: 1}])
    ask = grid.get_node_ids
    grid.get_node_ids = lambda: grid.partitions.update(next(coming, {})) or ask()  # type: ignore[method-assign]
    nodes.join(grid, [0, 1], 2)
    assert nodes.of == {0: 11, 1: 99, 2: 13} and next(coming, None) is None
    del grid.partitions[99]
    begun = time.monotonic()
    nodes.join(grid, [0, 1], 2)  # after the timeout the round begins without it
    assert nodes.of == {0: 11, 2: 13} and 0.5 <= time.monotonic() - begun < 1.5


class Slow(InProcessGrid):
    """Node 3 never answers."""

    def __init__(self) -> None:
        super().__init__(
            3, lambda messages, _: [Message(RecordDict(), reply_to=m) for m in messages]
        )

    def _in_parcels(self, group: list[Message]) -> Any:
        return [p for p in super()._in_parcels(group) if p[0].metadata.dst_node_id != 3]


def asked(take: Callable[[int], Message]) -> dict[int, Message]:
    identify()
    return {client: take(client + 1) for client in range(3)}


@pytest.mark.parametrize(
    ("enough", "wait", "seconds"), [(2, 0.2, 0.2), (3, 0.2, 1.5), (2, None, 1.5)]
)
def test_who_is_late_is_waited_for_a_while(enough: int, wait: float | None, seconds: float) -> None:
    """The time counts from the reply that makes enough; the timeout stays the upper bound."""
    messages = asked(lambda node: Message(RecordDict(), node, MessageType.TRAIN))
    begun = time.monotonic()
    replies: dict[int, Message] = {}
    coming = exchange(Slow(), messages, 1.5, enough=lambda: len(replies) >= enough, wait=wait)
    for client, reply in coming:
        replies[client] = reply
    assert sorted(replies) == [0, 1]
    assert seconds <= time.monotonic() - begun < seconds + 0.9


def test_only_usable_replies_are_enough(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three must be usable, and one of them fails."""
    seen: list[list[bool]] = []

    def noting(*args: Any) -> Iterator[tuple[int, Message]]:
        seen.append([])
        for answer in exchange(*args):
            yield answer
            seen[-1].append(args[4]())

    monkeypatch.setattr(strategy, "exchange", noting)
    run("num_rounds=1", "evaluation.clients=always", answer=failing({0}))
    evaluated, trained, *_ = seen
    assert trained == [False, False, True] and evaluated == [False, True, True]


def test_a_client_without_a_node_gives_no_usable_reply() -> None:
    asked = Asked("train", [0, 1, 2], [0, 1], {0, 1}, {1: "it failed", 2: "no node"})
    assert asked.usable == 1
