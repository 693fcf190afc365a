"""Workers of Ray answer what they are sent, also when one of them dies."""

import gc
import time
from collections.abc import Iterator

import pytest
import ray
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedpeft.config.schema import Runtime
from fedpeft.simulation.ray import RayGrid
from fedpeft.simulation.start_ray import start_ray

# Ray leaves files of its processes open, and Python warns when it collects them.
OPEN = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OPEN)]


@pytest.fixture(scope="module", autouse=True)
def two_cores() -> Iterator[None]:
    assert start_ray(Runtime(total_cpus=2))
    assert not start_ray(Runtime(total_cpus=4))  # it runs
    yield
    ray.shutdown()
    gc.collect()


def message_to(node: int, kind: str = MessageType.TRAIN) -> Message:
    """Return a message that no client can answer, because its configuration names no method."""
    content = RecordDict({"config": ConfigRecord({"overrides": "method=none", "round": 1})})
    return Message(content, node, kind)


def test_every_client_is_a_node_and_as_many_workers_start_as_have_room() -> None:
    for clients, num_cpus, expected in ((9, 1, 2), (9, 0.5, 4), (1, 1, 1), (9, 2, 1)):
        with RayGrid(clients, num_cpus, 0) as grid:
            assert list(grid.get_node_ids()) == list(range(1, clients + 1))
            assert len(grid._workers) == expected
        assert ray.get(grid._started) == [True] * expected  # before they were killed
    reason = "^Ray has no machine with runtime.num_cpus=3 cores and runtime.num_gpus=0 GPUs$"
    with pytest.raises(ValueError, match=reason):
        RayGrid(1, 3, 0)
    with pytest.raises(ValueError, match="num_cpus=1 cores and runtime.num_gpus=0.5 GPUs$"):
        RayGrid(1, 1, 0.5)


def test_each_message_has_its_reply_and_errors_come_as_such() -> None:
    with RayGrid(7, 1, 0) as grid:
        kinds = [MessageType.TRAIN if i % 3 == 0 else MessageType.QUERY for i in range(7)]
        messages = [message_to(1 + i, kind) for i, kind in enumerate(kinds)]
        replies = grid.send_and_receive(messages)
        assert list(grid.pull_messages(["1"])) == []
    by_number = {int(r.metadata.reply_to_message_id): r for r in replies}
    assert sorted(by_number) == list(range(1, 8))
    for number, reply in by_number.items():
        assert reply.metadata.src_node_id == number
        assert reply.has_error() is ((number - 1) % 3 == 0)
        if reply.has_error():
            assert str(reply.error.reason).startswith("method must be one of")


def test_a_worker_that_dies_fails_one_pass_and_is_replaced() -> None:
    with RayGrid(1, 1, 0) as grid:
        (dead,) = grid._workers
        ray.get(grid._started)
        ids = grid.push_messages([message_to(1) for _ in range(4)])
        ray.kill(dead)  # while it still imports
        replies: dict[str, Message] = {}
        while len(replies) < 4:
            replies |= {r.metadata.reply_to_message_id: r for r in grid.pull_messages(ids)}
    reasons = [str(replies[i].error.reason) for i in ids]
    assert "the worker that was at it died" in reasons[0]
    assert all(reason.startswith("method must be one of") for reason in reasons[1:])


def test_late_messages_are_neither_begun_nor_kept() -> None:
    with RayGrid(1, 1, 0) as grid:
        late = [message_to(1) for _ in range(5)]
        for message in late:
            message.metadata.ttl = 0.01
        grid.push_messages(late)  # the worker starts, and two of them are at it
        time.sleep(0.02)
        (new,) = grid.push_messages([message_to(1)])
        assert [group[0].metadata.message_id for group in grid._queue] == [new]
        while not list(grid.pull_messages([new])):
            pass
        assert len(grid._replies) == 2
        grid.push_messages([])
        assert not grid._replies
