"""Workers of Ray answer what they are sent, also when one of them dies."""

import gc
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedpeft.config.load import settings
from fedpeft.config.runtime import Runtime
from fedpeft.config.schema import ConfigError
from fedpeft.simulation.launch import run
from fedpeft.simulation.machines import this_machine
from fedpeft.simulation.ray import RayGrid
from fedpeft.simulation.start_ray import address_of, check_answers, start_ray
from tests.conftest import quiet

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
    """Return a message, which no client can train by, because its configuration names no method."""
    if kind == MessageType.QUERY:
        return Message(RecordDict(), node, kind)
    content = RecordDict({"config": ConfigRecord({"overrides": "method=none", "round": 1})})
    return Message(content, node, kind)


def wait_for_workers(grid: RayGrid) -> list[Any]:
    while len(grid.started()) < len(grid.workers()):
        grid.pull_messages([])  # no reply is asked for, but the grid looks at its workers
    return grid.started()


def test_every_client_is_a_node_and_as_many_workers_start_as_have_room() -> None:
    for clients, num_cpus, total, expected in ((1, 1, None, 1), (9, 2, None, 1), (9, 0.5, 1, 2)):
        with RayGrid(clients, num_cpus, 0, total) as grid:
            assert list(grid.get_node_ids()) == list(range(1, clients + 1))
            assert len(grid.workers()) == expected
    assert ray.get(list(grid._starting)) == [this_machine()] * 2  # they ran before they were killed
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
        (dead,) = wait_for_workers(grid)
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
        wait_for_workers(grid)
        late = [message_to(1) for _ in range(5)]
        for message in late:
            message.metadata.ttl = 0.01
        begun, with_it, *queued = grid.push_messages(
            late
        )  # the worker imports, and two are with it
        time.sleep(0.02)
        (new,) = grid.push_messages([message_to(1)])
        while not list(grid.pull_messages([new])):
            pass
        assert len(grid.pull_messages([begun])) == 1
        assert grid.pull_messages(queued) == []  # else they had come before the new one's
        grid.push_messages([])
        assert grid.pull_messages([with_it]) == []


def test_a_worker_gets_nothing_before_it_runs_and_one_that_cannot_start_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others: Any = ray.remote(Holder).options(num_cpus=1).remote()
    ray.get(others.__ray_ready__.remote())
    with RayGrid(2, 1, 0) as grid:  # Ray has room for two, but one core is not free
        while not grid.started():
            grid.pull_messages([])
        replies = grid.send_and_receive([message_to(1 + i % 2) for i in range(6)])
        assert len(replies) == 6
        assert (len(grid.started()), len(grid.workers())) == (1, 2)
        ray.kill(others)
        wait_for_workers(grid)
        assert len(grid.started()) == 2
    monkeypatch.setattr("fedpeft.simulation.ray.Worker", Faulty)
    with RayGrid(2, 1, 0) as grid:
        (reply,) = grid.send_and_receive([message_to(1)])
    assert str(reply.error.reason).startswith("Ray has no worker left: ")
    assert "no such disk" in str(reply.error.reason)


class Holder:
    """Holds a core, as another program on the cluster does."""


class Faulty:
    def __init__(self) -> None:
        raise OSError("no such disk")

    def machine(self) -> None: ...


def test_the_moments_of_clients_are_kept_on_ray_too(base: list[str], tmp_path: Path) -> None:
    keeping = ["method.rank=4", "optimizer.keep_state=true", "runtime.clients_per_pass=1"]
    shas = [
        run([*base, *keeping, f"run_dir={tmp_path / kind}", f"runtime={kind}"], quiet())[
            "shared_state_sha256"
        ]
        for kind in ("inprocess", "ray")
    ]
    assert shas[0] == shas[1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "runtime.address=head",
            "runtime.address must be HOST:PORT of a Ray cluster that this machine belongs to, auto "
            "or local, got head",
        ),
        (
            "runtime.address=ray://head:10001",
            "runtime.address must be HOST:PORT of a Ray cluster that this machine belongs to, auto "
            "or local, got ray://head:10001",
        ),
        ("runtime.address=[1]", "runtime.address must be str, got [1]"),
        (
            "runtime=inprocess runtime.address=head:6379",
            "runtime.address=head:6379 is for Ray: set runtime=ray",
        ),
        (
            "runtime.total_cpus=1 runtime.num_cpus=2",
            "runtime.total_cpus=1 must be >= the cores of a worker, runtime.num_cpus=2",
        ),
    ],
)
def test_wrong_places_are_refused_early(overrides: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(overrides)
    assert str(error.value) == sentence


def test_the_key_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of(Runtime()) == ("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    assert address_of(Runtime()) == ("RAY_ADDRESS", "there:6379")
    assert address_of(Runtime(address="here:1")) == ("runtime.address", "here:1")
    assert address_of(settings("runtime.address=local").runtime) == ("runtime.address", "local")
    monkeypatch.setenv("RAY_ADDRESS", "ray://there:10001")
    with pytest.raises(ValueError, match="^RAY_ADDRESS must be HOST:PORT .*got ray://there:10001$"):
        address_of(Runtime())


def test_an_address_at_which_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(ValueError) as error:
            check_answers("runtime.address", f"127.0.0.1:{port}")
    assert str(error.value).startswith(
        f"runtime.address=127.0.0.1:{port}: no Ray cluster answers there (["
    )


def test_versions_that_differ_are_named() -> None:
    here = this_machine()
    there = here._replace(address="10.0.0.2", versions={**here.versions, "torch": "2.0.0"})
    assert here.differs(here) is None
    assert here.differs(there) == (
        f"Ray's machine 10.0.0.2 has torch 2.0.0, and this one has {here.versions['torch']}: "
        "install the same on both"
    )
    assert here.versions["fedpeft"].startswith("0.1.0 (code ")
