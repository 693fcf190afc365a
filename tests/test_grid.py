"""Every client is a node of the local grid; messages that may train in one pass go together."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedpeft.client.client import answer_all
from fedpeft.config.load import load_config
from fedpeft.config.runtime import Runtime
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.engine.plan import Job
from fedpeft.engine.probing import Vectorised
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.simulation.launch import local_grid, simulate
from fedpeft.state import read
from tests.conftest import Runner, quiet, with_fields

ONE_BY_ONE = ("runtime.clients_per_pass=1", "evaluation.clients=always")


class Simulated:
    """Runs a configuration as ``fedpeft run`` does in one process, and notes each parcel."""

    def __init__(self, run: Runner) -> None:
        self.run = run
        self.parcels: list[tuple[str, list[int]]] = []

    def __call__(self, *overrides: str, answer: Any = answer_all) -> dict[str, Any]:
        def noted(messages: Sequence[Message], contexts: Sequence[Context]) -> Any:
            clients = [int(context.node_config["partition-id"]) for context in contexts]
            self.parcels.append((messages[0].metadata.message_type, clients))
            return answer(messages, contexts)

        self.run.run_dir = self.run.folder / f"simulated{len(self.parcels)}"
        whole = with_fields(self.run.base, [*overrides, f"run_dir={self.run.run_dir}"])
        open_engine.cache_clear()
        return simulate(InProcessGrid(1, noted), whole, quiet())

    def trained(self) -> list[list[int]]:
        """Return the clients of each training pass, in the order in which they ran."""
        return [clients for kind, clients in self.parcels if kind == "train"]


@pytest.fixture
def simulated(run: Runner) -> Simulated:
    return Simulated(run)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lora",),
        ("method=fedsa_lora",),
        ("method=fedtt_plus", "strategy=scaffold", "optimizer.name=sgd", "compression=topk"),
        ("method=hetlora", "method.ranks=[1,2]"),
        ("method=lora", "strategy=local_only"),
        ("method=lora", "strategy=centralized"),
        ("method=lora", "optimizer.keep_state=true"),
    ],
)
def test_a_state_folder_and_passes_change_no_bit_and_no_byte(
    run: Runner, simulated: Simulated, overrides: tuple[str, ...]
) -> None:
    plain = run(*overrides, *ONE_BY_ONE)
    lines = run.lines()
    summary = simulated(*overrides, *ONE_BY_ONE)
    assert summary["shared_state_sha256"] == plain["shared_state_sha256"]
    assert summary["bytes"] == plain["bytes"]
    for ours, theirs in zip(simulated.run.lines(), lines, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }


def test_personal_parameters_lie_in_the_runs_folder(run: Runner, simulated: Simulated) -> None:
    simulated("method=fedsa_lora", "num_clients=3", *ONE_BY_ONE)
    (folder,) = (run.run_dir / "clients").iterdir()  # of this run
    assert sorted(path.name for path in folder.iterdir()) == [f"client_{i}" for i in range(3)]
    names = list(read(folder / "client_0" / "00002.safetensors"))
    assert names and all(".lora_B." in n or n.startswith("classifier") for n in names)
    simulated("method=lora", *ONE_BY_ONE)
    assert not (run.run_dir / "clients").exists()


def test_clients_of_a_pass_go_together(simulated: Simulated) -> None:
    passes_of_two = ("runtime.clients_per_pass=2", "batch_size=2")
    simulated("method=lora", "num_clients=5", "num_rounds=1", *passes_of_two)
    assert sorted(map(len, simulated.trained())) == [1, 2, 2]
    assert sorted(sum(simulated.trained(), [])) == [0, 1, 2, 3, 4]


def test_clients_of_unequal_ranks_are_in_passes_of_their_own(simulated: Simulated) -> None:
    passes_of_four = ("runtime.clients_per_pass=4", "batch_size=2")
    unequal = ("method=hetlora", "method.ranks=[1,2]")
    simulated(*unequal, "num_clients=4", "num_rounds=1", *passes_of_four)
    assert sorted(map(sorted, simulated.trained())) == [[0, 2], [1, 3]]


def test_a_pass_gives_what_one_by_one_gives(simulated: Simulated) -> None:
    common = ("method=lora", "num_clients=4", "optimizer.name=sgd", "lr=0.1", "batch_size=2")
    alone = simulated(*common, *ONE_BY_ONE)
    together = simulated(*common, "runtime.clients_per_pass=4", "evaluation.clients=always")
    assert together["bytes"] == alone["bytes"]
    assert together["shared_state_sha256"] != alone["shared_state_sha256"]  # it was another way
    for key, value in alone["final"].items():
        assert together["final"][key] == pytest.approx(value, rel=1e-4), key


def test_the_longest_work_goes_first(simulated: Simulated) -> None:
    epochs = ("local_steps=null", "local_epochs=1", "partition.alpha=0.3")
    simulated("method=lora", "num_clients=4", "num_rounds=1", *epochs, *ONE_BY_ONE)
    order = [clients[0] for clients in simulated.trained()]
    rows = Engine(load_config([*simulated.run.base, "num_clients=4", *epochs])).rows
    lengths = rows.examples("train").lengths
    tokens = [
        sum(lengths[row] for row in rows.client_examples(client)["train"].rows)
        for client in range(4)
    ]
    assert len(set(tokens)) == 4
    assert order == sorted(range(4), key=lambda client: -tokens[client])


def test_one_clients_failure_is_its_own(
    simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_client = Engine.train_client

    def broken(engine: Engine, job: Job) -> Any:
        if job.client == 1:
            raise ValueError("the disk of client 1 is full")
        return train_client(engine, job)

    monkeypatch.setattr(Engine, "train_client", broken)
    monkeypatch.setattr(Engine, "vectorised", Vectorised.NO)
    one_pass = ("num_clients=3", "num_rounds=1", "runtime.clients_per_pass=3")
    summary = simulated("method=lora", *one_pass)
    assert summary["refused"] == {"1": {"1": "the disk of client 1 is full"}}


def test_a_pass_that_fails_fails_all_its_clients(simulated: Simulated) -> None:
    def answer(messages: Sequence[Message], contexts: Sequence[Context]) -> Any:
        clients = [context.node_config["partition-id"] for context in contexts]
        if messages[0].metadata.message_type == "train" and 2 in clients:
            raise RuntimeError("out of memory")
        return answer_all(messages, contexts)

    two_passes = ("num_clients=4", "num_rounds=1", "runtime.clients_per_pass=2")
    summary = simulated("method=lora", *two_passes, answer=answer)
    lost = next(clients for clients in simulated.trained() if 2 in clients)
    assert summary["refused"] == {"1": {str(client): "out of memory" for client in sorted(lost)}}
    assert len(lost) == 2


def calls_of(grid: InProcessGrid, messages: Sequence[Message], calls: list[list[int]]) -> Any:
    """Send messages and return the clients of each call that answers them, in order.

    Args:
        grid: answers the messages.
        messages: messages to send.
        calls: list that the grid's workers fill; emptied before.
    """
    calls.clear()
    assert len(grid.send_and_receive(messages, timeout=60)) == len(messages)
    return calls


def test_messages_that_are_answered_in_one_call() -> None:
    """Training goes by passes, evaluation in 64 calls at most; groups stay apart.

    A message without a group is answered alone.
    """
    calls: list[list[int]] = []

    def noted(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        calls.append([int(context.node_config["partition-id"]) for context in contexts])
        return [Message(RecordDict(), reply_to=message) for message in messages]

    def sent(kind: str, clients: Sequence[int], group: str) -> list[Message]:
        return [Message(RecordDict(), c + 1, kind, group_id=group) for c in clients]

    grid = InProcessGrid(130, noted)  # type: ignore[arg-type]
    assert list(grid.get_node_ids()) == list(range(1, 131))
    assert calls_of(grid, sent("train", [4, 2], "a"), calls) == [[4], [2]]
    grid.groups = lambda clients: [clients[i : i + 2] for i in range(0, len(clients), 2)]
    both = sent("train", [0, 1, 2], "a") + sent("train", [7, 6, 5, 4], "b")
    assert calls_of(grid, both, calls) == [[0, 1], [2], [7, 6], [5, 4]]
    assert calls_of(grid, sent("train", [0, 1, 2], ""), calls) == [[0], [1], [2]]
    assert calls_of(grid, sent("evaluate", range(64), "c"), calls) == [[c] for c in range(64)]
    calls_of(grid, sent("evaluate", range(130), "c"), calls)
    assert [len(call) for call in calls] == [3] * 43 + [1]
    assert sum(calls, []) == list(range(130))


def test_a_local_grid_in_one_process() -> None:
    called: list[str] = []
    runtime = Runtime(kind="inprocess")
    with local_grid(5, runtime, lambda: called.append("before")) as grid:
        assert called == ["before"] and type(grid) is InProcessGrid
        assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5]

    def wrong() -> None:
        raise ValueError("there is no such folder")

    with pytest.raises(ValueError, match="no such folder"), local_grid(5, runtime, wrong):
        pytest.fail("a grid was there")


def test_nodes_join_without_a_message_to_a_worker() -> None:
    grid, nodes = InProcessGrid(4, lambda *_: pytest.fail("a worker was asked")), Nodes(4, 5)
    nodes.join(grid)
    assert nodes.of == {0: 1, 1: 2, 2: 3, 3: 4}
    fewer = Nodes(2, 5)
    fewer.join(grid)
    assert fewer.of == {0: 1, 1: 2} and sorted(fewer.left_out) == [3, 4]
    assert fewer.left_out[3].startswith("node 3 holds partition 2, but num_clients=2: start 2")
    with pytest.raises(TimeoutError, match=r"no client holds partitions \[4\] of num_clients=5"):
        Nodes(5, 0.1).join(grid)


def test_late_messages_are_not_begun_in_the_next_round() -> None:
    begun: list[int] = []

    def slow(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        begun.append(int(contexts[0].node_config["partition-id"]))
        time.sleep(0.3)
        return [Message(RecordDict(), reply_to=message) for message in messages]

    grid = InProcessGrid(4, slow)  # type: ignore[arg-type]
    for clients, timeout in (([0, 1, 2], 0.2), ([3], 60.0)):
        sent = {client: Message(RecordDict(), client + 1, "train") for client in clients}
        assert [client for client, _ in exchange(grid, sent, timeout)] == clients[:1]
    assert begun == [0, 3]


def at_once(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    return [Message(RecordDict(), reply_to=message) for message in messages]


def test_replies_are_pulled_in_the_order_in_which_they_came() -> None:
    """In the order of a set, a hash of ids would decide which client an error names first."""
    grid = InProcessGrid(30, at_once)  # type: ignore[arg-type]
    grid.groups = lambda clients: [sorted(clients, key=lambda client: (client % 7, -client))]
    ids = grid.push_messages(
        Message(RecordDict(), node, "train", group_id="all") for node in grid.get_node_ids()
    )
    replies = grid.pull_messages(ids)
    clients = [reply.metadata.src_node_id - 1 for reply in replies]
    assert clients == sorted(range(30), key=lambda client: (client % 7, -client))


def test_replies_do_not_stay_in_the_grid(tmp_path: Path) -> None:
    grid = InProcessGrid(50, at_once)  # type: ignore[arg-type]
    grid.state_folder = tmp_path
    for _ in range(3):
        sent = {c: Message(RecordDict(), c + 1, "evaluate", group_id="all") for c in range(50)}
        assert len(dict(exchange(grid, sent, 60))) == 50
    held = [value for value in vars(grid).values() if isinstance(value, dict) and value]
    assert held == []


def test_ray_gets_three_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine misses the 30 seconds that Ray gives its own processes."""
    ray = pytest.importorskip("ray")
    from fedpeft.simulation.start_ray import start_ray

    left = [Exception("timed out"), Exception("timed out")]

    def init(*_: Any, **__: Any) -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    assert start_ray(Runtime()) and not left
    left += [Exception("timed out")] * 3
    with pytest.raises(RuntimeError, match="did not start on this machine, tried 3 times: timed"):
        start_ray(Runtime())
