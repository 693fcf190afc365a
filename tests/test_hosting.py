"""Simulated nodes that stand for any client give what a node a client gives."""

import time
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors import safe_open

from fedpeft.client.app import app as client_app
from fedpeft.config.load import load_config
from fedpeft.engine.session import Session, open_session
from fedpeft.server.app import serve
from fedpeft.server.nodes import Hosts, clients_of
from fedpeft.simulation.launch import SIMULATED, InProcessGrid
from tests.conftest import TINY, Answer, Runner, quiet

ONE_BY_ONE = ("runtime.cohort=1", "evaluation.clients=always")


class Hosted:
    """Runs a configuration on two nodes that stand for all clients."""

    def __init__(self, run: Runner) -> None:
        self.run, self.messages, self.prepared = run, [], 0

    def __call__(self, *overrides: str, answer: Answer = client_app) -> dict[str, Any]:
        def noted(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "query":
                self.prepared += 1
            else:
                self.messages.append((message.metadata.message_type, clients_of(message)))
            return answer(message=message, context=context)  # type: ignore[call-arg]

        method = [o for o in overrides if o.startswith("method=")][-1].removeprefix("method=")
        self.run.run_dir = self.run.folder / f"hosted{len(self.messages)}"
        given = [*self.run.base, *TINY.get(method, []), *overrides, f"run_dir={self.run.run_dir}"]
        open_session.cache_clear()
        return serve(InProcessGrid(noted, [{SIMULATED: True}] * 2), given, quiet(), simulated=True)  # type: ignore[arg-type]


@pytest.fixture
def hosted(run: Runner) -> Hosted:
    return Hosted(run)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lora",),
        ("method=fedsa_lora",),
        ("method=fedtt_plus", "strategy=scaffold", "compression=topk"),
        ("method=hetlora", "method.ranks=[1,2]"),
        ("method=lora", "strategy=local_only"),
        ("method=lora", "strategy=centralized"),
    ],
)
def test_the_same_to_the_last_bit_and_byte(
    run: Runner, hosted: Hosted, overrides: tuple[str, ...]
) -> None:
    own = run(*overrides, *ONE_BY_ONE)
    lines = run.lines()
    found = hosted(*overrides, *ONE_BY_ONE)
    assert found["shared_state_sha256"] == own["shared_state_sha256"]
    assert found["bytes"] == own["bytes"]
    for ours, theirs in zip(hosted.run.lines(), lines, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }


def test_what_a_client_keeps_lies_in_the_runs_folder(run: Runner, hosted: Hosted) -> None:
    hosted("method=fedsa_lora", "num_clients=3", *ONE_BY_ONE)
    files = sorted(path.name for path in (run.run_dir / "clients").iterdir())
    assert files == ["client_0.safetensors", "client_1.safetensors", "client_2.safetensors"]
    with safe_open(run.run_dir / "clients" / files[0], "pt") as file:
        names = list(file.keys())
    assert names and all(".lora_B." in n or n.startswith("classifier") for n in names)
    hosted("method=lora", *ONE_BY_ONE)
    assert not (run.run_dir / "clients").exists()


def test_a_cohort_is_a_message(hosted: Hosted) -> None:
    hosted("method=lora", "num_clients=5", "num_rounds=1", "runtime.cohort=2", "batch_size=2")
    trained = [clients for kind, clients in hosted.messages if kind == "train"]
    assert sorted(map(len, trained)) == [1, 2, 2]
    assert sorted(sum(trained, [])) == [0, 1, 2, 3, 4]


def test_a_cohort_gives_what_one_by_one_gives(hosted: Hosted) -> None:
    common = ("method=lora", "num_clients=4", "optimizer.name=sgd", "lr=0.1", "batch_size=2")
    alone = hosted(*common, *ONE_BY_ONE)
    together = hosted(*common, "runtime.cohort=4", "evaluation.clients=always")
    assert together["bytes"] == alone["bytes"]
    assert together["shared_state_sha256"] != alone["shared_state_sha256"]  # it was another way
    for key, value in alone["final"].items():
        assert together["final"][key] == pytest.approx(value, rel=1e-4), key


def test_the_longest_work_goes_first(hosted: Hosted) -> None:
    epochs = ("local_steps=null", "local_epochs=1", "partition.alpha=0.3")
    hosted("method=lora", "num_clients=4", "num_rounds=1", *epochs, *ONE_BY_ONE)
    order = [clients[0] for kind, clients in hosted.messages if kind == "train"]
    config = load_config([*hosted.run.base, "method=lora", "num_clients=4", *epochs])
    session = Session(config)
    train = session.examples("train")
    tokens = [
        sum(train.lengths[row] for row in session.client_examples(client)["train"].rows)
        for client in range(4)
    ]
    assert len(set(tokens)) == 4
    assert order == sorted(range(4), key=lambda client: -tokens[client])


def test_one_clients_failure_is_its_own(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    train_client = Session.train_client

    def broken(session: Session, client: int, *args: Any) -> Any:
        if client == 1:
            raise ValueError("the disk of client 1 is full")
        return train_client(session, client, *args)

    monkeypatch.setattr(Session, "train_client", broken)
    monkeypatch.setattr(Session, "_together", None)
    summary = hosted("method=lora", "num_clients=3", "num_rounds=1", "runtime.cohort=3")
    assert summary["refused"] == {"1": {"1": "the disk of client 1 is full"}}


def test_a_node_that_fails_fails_all_its_clients(hosted: Hosted) -> None:
    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and 2 in clients_of(message):
            raise RuntimeError("out of memory")
        return client_app(message=message, context=context)

    summary = hosted("method=lora", "num_clients=4", "num_rounds=1", "runtime.cohort=2",
                     answer=answer)  # fmt: skip
    lost = next(c for kind, c in hosted.messages if kind == "train" and 2 in c)
    assert summary["refused"] == {"1": {str(client): "out of memory" for client in sorted(lost)}}
    assert len(lost) == 2


def test_who_is_late_is_not_asked_in_the_next_round() -> None:
    begun: list[list[int]] = []

    def slow(message: Message, context: Context) -> Message:
        begun.append(clients_of(message))
        time.sleep(0.3)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(slow, [{SIMULATED: True}])  # type: ignore[arg-type]
    hosts = Hosts(4, timeout=1, folder="run")
    hosts.join(grid)
    for groups, timeout in (([[0], [1], [2]], 0.2), ([[3]], 60)):
        sent = list(hosts.messages("train", RecordDict(), groups))
        replies = list(hosts.exchange(grid, sent, timeout))
        assert [hosts.client_of(reply) for reply in replies] == groups[0]
    assert begun == [[0], [3]]
    assert not grid._queue
