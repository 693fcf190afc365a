"""``fedpeft check`` tells what a run would find, here and at its nodes, and trains nothing."""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft.client.app import app as client_app
from fedpeft.config.load import load_config
from fedpeft.config.overrides import join
from fedpeft.deployment.policy import Policy
from fedpeft.deployment.worker import _answer as worker_answer
from fedpeft.engine import facts as facts_module
from fedpeft.engine.engine import Engine
from fedpeft.engine.facts import NUMBERS, TEXTS, free_memory
from fedpeft.engine.parameters import parameter_counts
from fedpeft.reporting.check import Report, named
from fedpeft.server.app import main, serve
from fedpeft.server.check import check
from fedpeft.server.limits import FRAME
from fedpeft.simulation.grid import InProcessGrid
from tests.conftest import Answer, quiet

Patch = pytest.MonkeyPatch
CONFIG = "config"


@pytest.fixture(autouse=True)
def no_training(monkeypatch: Patch) -> None:
    """Let every training fail."""

    def train(*_: object) -> None:
        raise AssertionError("a check must not train")

    monkeypatch.setattr(Engine, "train", train)


@pytest.fixture
def nodes_are(monkeypatch: Patch) -> Callable[[Answer], None]:
    """``nodes_are(answer)`` puts an app in the place of the nodes'."""
    return lambda answer: monkeypatch.setattr("fedpeft.simulation.grid.app", answer)


def changed(client: int, **values: Any) -> Answer:
    """Answer as a node does, but with other facts of one client; null takes one away."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        if context.node_config["partition-id"] == client and "facts" in reply.content:
            record: Any = reply.content.config_records["facts"]
            for key, value in values.items():
                if value is None:
                    del record[key]
                else:
                    record[key] = value
        return reply

    return answer


def checked(base: list[str], *overrides: str) -> Report:
    return check(InProcessGrid(3), [*base, *overrides])


# --- one process ------------------------------------------------------------------------------


def test_the_command_s_numbers(
    fedpeft: Callable[..., str], base: list[str], checkpoint: Path
) -> None:
    report = json.loads(fedpeft("check", "--json", *base))
    assert report["problems"] == [] == report["notes"]
    weights = sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    sides = [report["server"], *report["clients"].values()]
    assert {side["weights"] for side in sides} == {weights}
    assert list(report["clients"]) == ["0", "1", "2"]
    engine = Engine(load_config(base))
    for client, facts in report["clients"].items():
        rows = engine.rows.client_examples(int(client))
        assert {s: facts[s] for s in rows} == {s: len(examples) for s, examples in rows.items()}
        assert facts["train"] > facts["validation"] > 0
    assert report["rows"] == {"train": 240, "validation": 40, "test": 40}
    counts = parameter_counts(engine.replica.roles, engine.replica.model)
    assert report["parameters"] == counts
    assert counts["bytes_up"] == [4 * counts["trained"][1]] * 2
    assert report["server"]["torch"].startswith("2.")
    assert 50 < report["server"]["used_bytes"] / 2**20 < 20_000
    assert not list(Path().iterdir())  # no run directory, no other file


def test_the_command_s_table(fedpeft: Callable[..., str], base: list[str]) -> None:
    text = fedpeft("check", *base)
    (line,) = [line for line in text.splitlines() if "rows of a client" in line]
    low, middle, high = map(int, re.findall(r"\d+", line))
    assert low <= middle <= high and low + middle + high == 240
    assert "clients 0-2" in text and "no problem was found; nothing was trained" in text


def test_a_problem_gives_status_2(
    fedpeft: Callable[..., str], base: list[str], capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("check", *base, "partition=dirichlet", "partition.min_size=90")
    assert ended.value.code == 2
    answer = capsys.readouterr()
    (problem,) = [line for line in answer.out.splitlines() if line.startswith("problem: ")]
    assert problem.startswith("problem: clients 0-2: 240 training rows cannot give")
    assert "no problem" not in answer.out and answer.err == "" and not caplog.records


def test_a_wrong_configuration_is_one_sentence(
    fedpeft: Callable[..., str], base: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("check", *base, "model.path=/nowhere")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fedpeft: model.path=/nowhere") and error.count("\n") == 1


def test_ray_needs_room_here(base: list[str], monkeypatch: Patch) -> None:
    def problems(*overrides: str) -> list[str]:
        report = check(InProcessGrid(3), [*base, "runtime=ray", *overrides], simulated=True)
        return [*report.problems, *report.notes]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert problems("runtime.num_cpus=4") == []
    assert problems("runtime.num_cpus=5") == [
        "runtime.num_cpus=5 is more than the 4 cores of this machine"
    ]
    assert problems("runtime.num_cpus=5", "runtime.total_cpus=8") == []
    assert problems("runtime.num_cpus=5", "runtime.address=10.0.0.1:6379") == []
    monkeypatch.setattr(facts_module, "free_memory", lambda: 100 << 20)
    (note,) = problems("runtime.num_cpus=2")
    assert re.match(r"2 workers of about [\d,]+ MiB each may not fit into the 100 MiB", note)
    assert problems("runtime.address=10.0.0.1:6379") == []


def test_free_memory_is_the_container_s(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text(f"{5 << 20}\n")
    (tmp_path / "memory.max").write_text("max\n")
    whole = free_memory(tmp_path)
    (tmp_path / "memory.max").write_text(f"{7 << 20}\n")
    assert free_memory(tmp_path) == 2 << 20 < whole
    (tmp_path / "memory.max").write_text(f"{1 << 60}\n")
    assert 2 << 20 < free_memory(tmp_path) < 1 << 50


def test_ranges_of_clients() -> None:
    assert named([0, 1, 2, 5, 7, 8]) == "clients 0-2, 5, 7-8"
    assert named([7]) == "client 7" and named([7, 9]) == "clients 7, 9"


# --- nodes ------------------------------------------------------------------------------------


def test_a_node_s_answer_holds_versions_hashes_and_numbers(base: list[str], table: Path) -> None:
    """A site with a folder of its own counts its rows and names nothing of it."""
    grid = InProcessGrid(1)
    config = grid.node_config(1) | {"data-path": str(table), "partition-id": 2}
    overrides = join([*base, "data.labels=[food,music,sport,weather]"])
    content = RecordDict({CONFIG: ConfigRecord({"overrides": overrides})})
    message = Message(content, 1, "query")
    reply = client_app(message=message, context=Context(1, 1, config, RecordDict(), {}))  # type: ignore[call-arg]
    record = reply.content.config_records["facts"]
    assert set(record) == {*TEXTS, *NUMBERS, "train", "validation", "test"}
    assert [record[split] for split in ("train", "validation", "test")] == [192, 24, 24]
    for key in TEXTS:
        assert re.fullmatch(r"[0-9a-f]{64}|\d+\.\d+\.\d+(\+\w+)?", str(record[key]))
    assert set(reply.content.config_records) == {"facts"} and not reply.content.array_records
    assert reply.content.metric_records["metrics"] == {"partition-id": 2, "own-rows": 1}


def test_a_query_without_a_configuration_opens_nothing(monkeypatch: Patch) -> None:
    monkeypatch.setattr("fedpeft.client.client.open_engine", None)
    grid = InProcessGrid(1)
    reply = client_app(message=Message(RecordDict(), 1, "query"), context=grid.context(1))  # type: ignore[call-arg]
    assert list(reply.content) == ["metrics"]


def test_differences_are_named_by_client(base: list[str], nodes_are: Any) -> None:
    nodes_are(changed(1, fedpeft="0.0.9", torch="2.12.0"))
    report = checked(base)
    here = report.server
    assert report.problems == [
        f"client 1: fedpeft is 0.0.9, and the server's is {here['fedpeft']}: install the same"
    ]
    assert report.notes == [
        f"client 1: torch is 2.12.0, and the server's is {here['torch']}: "
        "the last bits of numbers may differ"
    ]
    nodes_are(changed(2, weights="ab" * 32))
    (problem,) = checked(base).problems
    assert problem.startswith(f"client 2: the weights are {'ab' * 32}, and the server's are ")
    assert here["weights"] in problem


def test_clients_alike_are_a_column(base: list[str], nodes_are: Any, capsys: Any) -> None:
    nodes_are(changed(1, torch="2.12.0"))
    checked(base).show()
    heading = capsys.readouterr().out.splitlines()[2]
    assert re.findall(r"clients? \d[\d, -]*\d|client \d", heading) == ["clients 0, 2", "client 1"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"torch": None}, "torch must be a short text, got None"),
        ({"weights": "x" * 101}, "weights must be a short text, got 'xxx"),
        ({"train": -1}, "train must be a whole number >= 0, got -1"),
        ({"free_bytes": 0.5}, "free_bytes must be a whole number >= 0, got 0.5"),
    ],
)
def test_an_answer_that_is_none(
    base: list[str], nodes_are: Any, values: dict[str, Any], sentence: str
) -> None:
    nodes_are(changed(1, **values))
    report = checked(base)
    (problem,) = report.problems
    assert problem.startswith(f"client 1: {sentence}")
    assert list(report.clients) == [0, 2]


def test_nodes_that_cannot_answer_are_problems(base: list[str], nodes_are: Any) -> None:
    def answer(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        if CONFIG not in message.content:
            return client_app(message=message, context=context)  # type: ignore[call-arg]
        if client == 1:
            raise RuntimeError("no power")
        return Message(RecordDict(), reply_to=message)  # as fedpeft answered before

    nodes_are(answer)
    report = checked(base)
    assert report.problems == [
        "clients 0, 2: its fedpeft does not know how to answer a check: install the server's",
        "client 1: no power",
    ]
    report.show()


def test_a_large_answer_is_a_problem(base: list[str], nodes_are: Any) -> None:
    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        if CONFIG in message.content and context.node_config["partition-id"] == 1:
            reply.content["more"] = ConfigRecord({"bytes": bytes(FRAME)})
        return reply

    nodes_are(answer)
    report = checked(base)
    (problem,) = report.problems
    assert re.fullmatch(
        rf"client 1: the reply has \d+ bytes, but at most {FRAME} may come", problem
    )
    assert list(report.clients) == [0, 2]


class Silent(InProcessGrid):
    """Node 3 answers no second question."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        return [r for r in replies if "facts" not in r.content or r.metadata.src_node_id != 3]


def test_a_node_that_is_silent_or_not_there(base: list[str]) -> None:
    grid = Silent(3)
    report = check(grid, [*base, "runtime.round_timeout=1"])
    assert report.problems == ["client 2: no answer within runtime.round_timeout=1 s"]
    report = check(InProcessGrid(2), [*base, "runtime.join_timeout=0.2"])
    assert report.problems == ["no client holds partitions [2] of num_clients=3"]
    assert list(report.clients) == [0, 1]
    report = check(InProcessGrid(4), base)
    (problem,) = report.problems
    assert problem.startswith("node 4 holds partition 3, but num_clients=3")


def test_a_site_s_policy_holds_for_a_check(base: list[str], nodes_are: Any) -> None:
    sites = tuple(o for o in base if o.startswith(("model", "data")))
    nodes_are(partial(worker_answer, Policy(sites)))
    assert checked(base, "check=true").problems == []  # no site gets that key
    nodes_are(partial(worker_answer, Policy(sites, allow=["num_*", "runtime.*", "local_steps"])))
    (problem,) = checked(base).problems
    assert problem.startswith("clients 0-2: this site's policy does not let a server set ")


# --- flwr run ---------------------------------------------------------------------------------


def context_of(overrides: list[str]) -> Context:
    return Context(1, 0, {}, RecordDict(), {"overrides": join(overrides)})


def test_a_serverapp_checks(base: list[str], capsys: Any, nodes_are: Any, tmp_path: Path) -> None:
    overrides = [*base, "check=true", f"run_dir={tmp_path / 'run'}"]
    main(InProcessGrid(3), context_of(overrides))
    assert "no problem was found" in capsys.readouterr().out
    nodes_are(changed(1, fedpeft="0.0.9"))
    with pytest.raises(ValueError, match="^client 1: fedpeft is 0.0.9"):
        main(InProcessGrid(3), context_of(overrides))
    assert "problem: client 1: fedpeft is 0.0.9" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_is_no_check(base: list[str]) -> None:
    with pytest.raises(ValueError, match="check=true is for flwr run"):
        serve(InProcessGrid(3), [*base, "check=true"], quiet())
