"""A client's unusable reply is left out with its reason; the other replies are averaged."""

import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedpeft.client.app import app as client_app
from fedpeft.config.overrides import split
from fedpeft.engine.engine import Engine
from fedpeft.engine.plan import Job
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server import strategy
from fedpeft.server.limits import FRAME
from fedpeft.server.seen import RoundFailed
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import State, payload_bytes
from fedpeft.wire import wire_bytes
from tests.conftest import Answer, Runner, state_of
from tests.grids import rewritten

HEAD = "classifier.bias"
Spoil = Callable[[Message, Message], Message]


def with_value(value: float) -> Spoil:
    def spoil(reply: Message, message: Message) -> Message:
        state = state_of(reply)
        state[HEAD][2] = value
        return rewritten(reply, message, state)

    return spoil


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(reply: Message, message: Message) -> Message:
        state = state_of(reply)
        return rewritten(reply, message, state | {HEAD: change(state[HEAD])})

    return spoil


def without_key(reply: Message, message: Message) -> Message:
    state = state_of(reply)
    del state[HEAD]
    return rewritten(reply, message, state)


def with_key(reply: Message, message: Message) -> Message:
    return rewritten(reply, message, state_of(reply) | {"bert.pooler.dense.bias": torch.zeros(32)})


def with_metrics(**metrics: Any) -> Spoil:
    return lambda reply, message: rewritten(reply, message, state_of(reply), **metrics)


def without_arrays(reply: Message, message: Message) -> Message:
    metrics = reply.content.metric_records["metrics"]
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def without_index(reply: Message, message: Message) -> Message:
    return Message(
        RecordDict(
            {
                "arrays": reply.content.array_records["arrays"],
                "metrics": reply.content.metric_records["metrics"],
            }
        ),
        reply_to=message,
    )


def with_index(index: bytes) -> Spoil:
    def spoil(reply: Message, message: Message) -> Message:
        content = without_index(reply, message).content
        content["config"] = ConfigRecord({"index": index})
        return Message(content, reply_to=message)

    return spoil


def with_array(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Replace the flat array named float32; the index stays."""

    def spoil(reply: Message, message: Message) -> Message:
        array = reply.content.array_records["arrays"]["float32"].numpy()
        content = with_index(index_of(reply))(reply, message).content
        content["arrays"] = ArrayRecord({"float32": Array(change(array))})
        return Message(content, reply_to=message)

    return spoil


def with_record(name: str, record: Any) -> Spoil:
    def spoil(reply: Message, message: Message) -> Message:
        return Message(RecordDict({**reply.content, name: record}), reply_to=message)

    return spoil


def index_of(reply: Message) -> bytes:
    index = reply.content.config_records["config"]["index"]
    assert isinstance(index, bytes)
    return index


def raising(reply: Message, message: Message) -> Message:
    raise RuntimeError("the disk of this client is full")


CASES: dict[str, tuple[Spoil, str]] = {
    "NaN": (with_value(float("nan")), "classifier.bias holds values that are not finite"),
    "infinity": (with_value(float("inf")), "classifier.bias holds values that are not finite"),
    "shape": (
        with_tensor(lambda t: t[:3].clone()),
        "classifier.bias is torch.float32 (3,), expected torch.float32 (4,)",
    ),
    "transposed shape": (
        with_tensor(lambda t: t.reshape(2, 2)),
        "classifier.bias is torch.float32 (2, 2), expected torch.float32 (4,)",
    ),
    "dtype": (
        with_tensor(lambda t: t.double()),
        "classifier.bias is torch.float64 (4,), expected torch.float32 (4,)",
    ),
    "missing key": (without_key, "1 keys are missing, first classifier.bias"),
    "unknown key": (with_key, "1 keys are unknown, first bert.pooler.dense.bias"),
    "zero examples": (
        with_metrics(**{"num-examples": 0}),
        "num-examples must be a whole number >= 1, got 0",
    ),
    "negative examples": (
        with_metrics(**{"num-examples": -5}),
        "num-examples must be a whole number >= 1, got -5",
    ),
    "fractional examples": (
        with_metrics(**{"num-examples": 2.5}),
        "num-examples must be a whole number >= 1, got 2.5",
    ),
    "more examples than it has": (
        with_metrics(**{"num-examples": 10**18}),
        "num-examples is 1000000000000000000, but the client has ",
    ),
    "more steps than it was told": (
        with_metrics(**{"num-steps": 10**9}),
        "num-steps is 1000000000, but the round has 2",
    ),
    "finite but huge": (
        with_value(1e30),
        "its update's norm a step is 5e+29, more than strategy.max_norm_ratio=100 times the ",
    ),
    "largest float": (with_value(3e38), "more than strategy.max_norm_ratio=100 times"),
    "large record": (
        with_record("more", ArrayRecord({"x": Array(np.zeros(1 << 19, dtype=np.float32))})),
        "bytes, but at most",
    ),
    "index bomb": (
        with_index(zlib.compress(b"[" + b" " * (1 << 27))),
        "the index of the arrays cannot be read: it takes more than",
    ),
    "no loss": (with_metrics(loss=None), "loss must be a finite number, got None"),
    "NaN loss": (with_metrics(loss=float("nan")), "loss must be a finite number, got nan"),
    "exception": (raising, "the disk of this client is full"),
    "no arrays": (without_arrays, "the reply carries no arrays"),
    "no index": (without_index, "the reply carries no config"),
    "garbled index": (
        with_index(b"not what zlib wrote"),
        "the index of the arrays cannot be read: Error -3 while decompressing data",
    ),
    "index that is no index": (
        with_index(zlib.compress(b"[[1, 2], 3]")),
        "not enough values to unpack",
    ),
    "array of another dtype": (
        with_array(lambda a: a.astype("float64")),
        "the array of float32 holds float64",
    ),
    "short array": (with_array(lambda a: a[:-3].copy()), "the array of float32 is too short for"),
    "long array": (
        with_array(lambda a: np.append(a, a[:2])),
        "the array of float32 holds more than the index names",
    ),
}


def spoiling(spoil: Spoil, clients: set[int], rounds: set[int]) -> Answer:
    """Answer as the client app does, but spoil the replies of some clients in some rounds."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        config = message.content.config_records.get("config", {})
        if (
            message.metadata.message_type == "train"
            and context.node_config["partition-id"] in clients
            and config["round"] in rounds
        ):
            return spoil(reply, message)
        return reply

    return answer


def weighted(states: list[State], numbers: list[int]) -> State:
    """Compute sum of n_i theta_i / sum of n_i by hand."""
    weights = torch.tensor(numbers, dtype=torch.float64)
    return {
        name: (
            torch.stack([s[name].double() for s in states], dim=-1) @ weights / sum(numbers)
        ).float()
        for name in states[0]
    }


@pytest.mark.parametrize("case", CASES)
def test_a_bad_reply_is_left_out(case: str, run: Runner) -> None:
    spoil, reason = CASES[case]
    summary = run("num_rounds=1", answer=spoiling(spoil, {1}, {1}))
    line = run.lines()[1]
    assert list(line["refused"]) == ["1"] and reason in line["refused"]["1"]
    assert summary["refused"] == {"1": line["refused"]}
    assert line["cohort"] == [0, 1, 2]

    good = [e for e in run.recorder.of("train", 1) if e.client != 1]
    numbers: list[int] = [
        e.up.content.metric_records["metrics"]["num-examples"]  # type: ignore[misc]
        for e in good
    ]
    assert [e.client for e in good] == [0, 2] and numbers[0] != numbers[1]
    expected = weighted([e.up_state() for e in good], numbers)
    saved = run.saved()
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)
    losses: list[float] = [
        e.up.content.metric_records["metrics"]["loss"]  # type: ignore[misc]
        for e in good
    ]
    mean = sum(n * x for n, x in zip(numbers, losses, strict=True)) / sum(numbers)
    assert line["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_a_client_of_many_steps_is_no_attacker(run: Runner) -> None:
    """Norms are compared a step, because a client of many rows goes further in a round."""
    skewed = ("partition=quantity", "partition.alpha=0.2", "partition.min_size=3", "seed=4")
    epochs = ("local_epochs=1", "local_steps=null", "batch_size=1", "num_rounds=1", "lr=1e-4")
    assert run(*skewed, *epochs, "strategy.max_norm_ratio=10")["refused"] == {}
    steps = [e.up.content.metric_records["metrics"]["num-steps"] for e in run.recorder.of("train")]
    assert sorted(steps) == [1, 1, 188]


def test_three_clients_unequal_weights(run: Runner) -> None:
    """The mean by hand, with no client refused."""
    run("num_rounds=1")
    exchanges = run.recorder.of("train", 1)
    numbers: list[int] = [
        e.up.content.metric_records["metrics"]["num-examples"]  # type: ignore[misc]
        for e in exchanges
    ]
    assert len(set(numbers)) == 3
    expected = weighted([e.up_state() for e in exchanges], numbers)
    for name, value in run.saved().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


def test_a_line_has_the_clients_weights(run: Runner) -> None:
    run("num_rounds=1")
    sent = run.recorder.of("train", 1)
    rows: list[Any] = [e.up.content.metric_records["metrics"]["num-examples"] for e in sent]
    expected = {str(e.client): n / sum(rows) for e, n in zip(sent, rows, strict=True)}
    assert run.lines()[1]["weights"] == pytest.approx(expected)
    assert max(expected.values()) > 0.4
    run("num_rounds=1", "strategy.max_weight=0.4")
    assert max(run.lines()[1]["weights"].values()) == pytest.approx(0.4)


@pytest.mark.parametrize("more", [0, 1])
def test_a_client_says_no_more_rows_than_it_trains_on(
    more: int, run: Runner, opened: Callable[..., Engine]
) -> None:
    has = len(opened().rows.client_examples(1)["train"])

    def spoil(reply: Message, message: Message) -> Message:
        return rewritten(reply, message, state_of(reply), **{"num-examples": has + more})

    refused = run("num_rounds=1", answer=spoiling(spoil, {1}, {1}))["refused"]
    reason = f"num-examples is {has + 1}, but the client has {has}"
    assert refused == ({"1": {"1": reason}} if more else {})


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_client_says_no_more_rows_than_it_measures(split: str, more: int, run: Runner) -> None:
    """Client 1 has 8 rows or more of each split, of which it measures 5."""

    def change(reply: Message) -> Message:
        reply.content.metric_records["metrics"][f"{split}-num-examples"] = 5 + more
        return reply

    limit = "evaluation.max_client_rows=5"
    given = ("num_rounds=1", "evaluation.clients=always", limit)
    refused = run(*given, answer=measuring({1}, change))["refused"]
    reason = f"evaluation: {split}-num-examples is 6, but the client measures 5 rows at most"
    assert refused.get("1", {}) == ({"1": reason} if more else {})


def test_the_server_reads_a_reply_to_its_room(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment's grid reads no more than the strategy tells it, and the local one all."""
    rooms: list[int] = []
    exchange = strategy.exchange

    def noting(*arguments: Any) -> Any:
        rooms.append(arguments[6])
        return exchange(*arguments)

    monkeypatch.setattr(strategy, "exchange", noting)
    run("num_rounds=1", "evaluation.clients=never")
    assert rooms == [2 * payload_bytes(run.recorder.of("train")[0].up_state()) + FRAME]


def still(reply: Message, message: Message) -> Message:
    """Move hardly at all."""
    start, end = state_of(message), state_of(reply)
    moved = {name: start[name] + 1e-6 * (value - start[name]) for name, value in end.items()}
    return rewritten(reply, message, moved)


@pytest.mark.parametrize("resumed", [False, True])
def test_two_who_stand_still_make_no_attacker_of_the_third(resumed: bool, run: Runner) -> None:
    """In rounds 2 to 4 the median is theirs, but client 0 moves no more than in the good round 1.

    Clients whose rows have one label do so once they know it.
    """

    def stop(reply: Message, message: Message) -> Message:
        raise KeyboardInterrupt

    given = ["num_rounds=4", "strategy.max_norm_ratio=10", "resume=true"]
    given.append(f"run_dir={run.folder / 'run'}")
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            run(*given, answer=spoiling(stop, {0}, {2}))
    summary = run(*given, answer=spoiling(still, {1, 2}, {2, 3, 4}))
    assert summary["refused"] == {} and summary["final"]["round"] == 4


def test_a_client_s_text_is_cut_and_steers_nothing(run: Runner) -> None:
    """It may hold a path in brackets, which rich would read as markup, or a terminal's codes."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            raise ValueError("no [/data/ward-7] \x1b[31m\n" + "x" * 10**6)
        return client_app(message=message, context=context)

    reason = run("num_rounds=1", answer=answer)["refused"]["1"]["1"]
    assert reason.startswith(r"no [/data/ward-7] \x1b[31m\nxxx") and reason.endswith("x...")
    assert len(reason) < 520 and reason.isprintable()


def test_a_round_that_is_not_finite_is_dropped(run: Runner) -> None:
    """All clients are huge alike, so the median says nothing; a step of 100 overflows."""
    honest = run("num_rounds=1", "strategy=fedavgm")["shared_state_sha256"]

    def spoil(reply: Message, message: Message) -> Message:
        state = state_of(reply)
        return rewritten(reply, message, {n: torch.full_like(v, 1e38) for n, v in state.items()})

    given = ["strategy=fedavgm", "strategy.server_lr=100", "num_rounds=1"]
    summary = run(*given, answer=spoiling(spoil, {0, 1, 2}, {1}))
    (reason,) = summary["refused"]["1"].values()
    assert reason.startswith("the round is dropped, because its aggregate is not finite in ")
    assert run.lines()[1]["unchanged"] == 1.0
    assert run.lines()[1]["validation_loss"] == run.lines()[0]["validation_loss"]
    assert summary["shared_state_sha256"] != honest and run.saved() == {}


@pytest.mark.parametrize("method", ["lora", "fedsa_lora"])
def test_a_dropped_round_leaves_no_trace(method: str, run: Runner) -> None:
    """Momentum of the spoiled round would spoil the next; clients go on from what they had."""

    def spoil(reply: Message, message: Message) -> Message:
        state = {name: torch.full_like(value, 1e38) for name, value in state_of(reply).items()}
        spoiled = rewritten(reply, message, state)
        spoiled.content.config_records["config"]["kept"] = True
        return spoiled

    given = [f"method={method}", "strategy=fedavgm", "strategy.server_lr=100", "num_rounds=2"]
    run(*given, answer=spoiling(spoil, {0, 1, 2}, {1}))
    lines = run.lines()
    assert lines[1]["unchanged"] == 1.0
    assert "unchanged" not in lines[2] and "refused" not in lines[2]
    configs = [e.down.content.config_records["config"] for e in run.recorder.of("train", 2)]
    assert [config["generation"] for config in configs] == [0, 0, 0]


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"foo": 1.0, "my_seconds": 0.3, "validation_foo": 7.0}, None),
        ({"validation_accuracy": 99.0}, "validation_accuracy must be from -1 to 1, got 99"),
        ({"test_loss": 1e308}, "test_loss must be from 0 to 1e+06, got 1e+308"),
        ({"validation_loss": float("nan")}, "validation_loss must be a finite number, got nan"),
        (
            {"validation-num-examples": 10**18},
            "validation-num-examples is 1000000000000000000, but",
        ),
        ({"test-num-examples": -1}, "test-num-examples must be from 1 to inf, got -1"),
        ({"test-num-examples": 2.5}, "num-examples of validation and test must be >= 1"),
    ],
)
def test_a_client_s_measures_are_bounded(
    metrics: dict[str, Any], reason: str | None, run: Runner
) -> None:
    """They choose the best round, so nobody may set them at will."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            record = MetricRecord({**reply.content.metric_records["metrics"], **metrics})
            return Message(RecordDict({**reply.content, "metrics": record}), reply_to=message)
        return reply

    plain = run("num_rounds=1", "method=fedsa_lora")
    summary = run("num_rounds=1", "method=fedsa_lora", answer=answer)
    if reason is None:
        assert summary["final"] == plain["final"] and summary["refused"] == {}
        return
    assert summary["refused"].keys() == {"0", "1"}
    assert f"evaluation: {reason}" in summary["refused"]["1"]["1"]
    assert summary["final"]["client_test_loss"] != plain["final"]["client_test_loss"]


def measuring(clients: set[int], change: Callable[[Message], Message]) -> Answer:
    """Answer as the client app does, but change the replies of some clients' evaluations."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        is_one = context.node_config["partition-id"] in clients
        return change(reply) if is_one and message.metadata.message_type == "evaluate" else reply

    return answer


def test_a_large_evaluation_is_refused_as_it_arrives(run: Runner) -> None:
    def large(reply: Message) -> Message:
        reply.content["more"] = ConfigRecord({"bytes": bytes(FRAME)})
        return reply

    summary = run("num_rounds=1", "method=fedsa_lora", answer=measuring({1}, large))
    assert re.search(r"^evaluation: the reply has \d+ bytes, but", summary["refused"]["1"]["1"])
    assert summary["refused"]["1"].keys() == {"1"}


def test_too_few_measures_choose_no_round(run: Runner) -> None:
    """One of three clients alone could choose the best round."""

    def failing(reply: Message) -> Message:
        raise RuntimeError("no power")

    summary = run("num_rounds=1", "method=fedsa_lora", answer=measuring({0, 2}, failing))
    for line in run.lines():
        assert line["unmeasured"] == (
            "only 1 of 3 clients measured, and runtime.min_replies=0.5 asks for 2"
        )
        assert not any(key.startswith("client_") for key in line)
    assert sorted(summary["refused"]["1"]) == ["0", "2"]


def test_a_refused_client_takes_part_again(run: Runner) -> None:
    summary = run(answer=spoiling(CASES["NaN"][0], {1}, {1}))
    assert list(summary["refused"]) == ["1"]
    assert "refused" not in run.lines()[2]
    again = run.recorder.of("train", 2)
    assert [e.client for e in again] == [0, 1, 2]
    received = [e.down_state() for e in again]
    assert all(torch.equal(received[0][n], received[1][n]) for n in received[0])


@pytest.mark.parametrize("case", ["NaN", "exception", "no arrays"])
def test_when_all_fail_the_run_ends(case: str, run: Runner) -> None:
    spoil, reason = CASES[case]
    with pytest.raises(RoundFailed, match="no client's reply was usable; client 0: ") as caught:
        run("num_rounds=3", answer=spoiling(spoil, {0, 1, 2}, {2}))
    assert reason in str(caught.value)
    text = (run.run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n") and text.count("\n") == 2
    assert [json.loads(line)["round"] for line in text.splitlines()] == [0, 1]
    assert run.lines() == [json.loads(line) for line in text.splitlines()]
    assert not (run.run_dir / "summary.json").exists()


def test_a_line_that_was_cut_off_is_not_read(run: Runner) -> None:
    run()
    path = run.run_dir / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    assert [line["round"] for line in read_metrics(run.run_dir)] == [0, 1]


def test_a_client_whose_loss_is_not_finite(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    train_client = Engine.train_client

    def with_nan(engine: Engine, job: Job) -> Any:
        if job.client == 2:
            weight = job.start["classifier.weight"].clone()
            weight[0, 0] = float("nan")
            job = job._replace(start=job.start | {"classifier.weight": weight})
        return train_client(engine, job)

    monkeypatch.setattr(Engine, "train_client", with_nan)
    summary = run("num_rounds=1")
    assert summary["refused"] == {
        "1": {"2": "training loss is nan: lower lr, or set precision=fp32"}
    }
    assert all(torch.isfinite(value).all() for value in run.saved().values())


class Deaf(InProcessGrid):
    """Loses messages of a kind to node 2."""

    kind = "train"

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = iter(super().push_messages([m for m in messages if not self._lost(m)]))
        return [f"lost {i}" if self._lost(m) else next(ids) for i, m in enumerate(messages)]

    def _lost(self, message: Message) -> bool:
        return message.metadata.message_type == self.kind and message.metadata.dst_node_id == 2


def test_a_late_client_is_left_out(run: Runner) -> None:
    summary = run("num_rounds=1", "runtime.round_timeout=1.5", grid=Deaf)
    assert summary["refused"] == {"1": {"1": "no reply within runtime.round_timeout=1.5 s"}}
    assert [e.client for e in run.recorder.of("train")] == [0, 2]


class DeafInEvaluation(Deaf):
    kind = "evaluate"


def test_a_client_that_is_late_in_evaluation_is_named(run: Runner) -> None:
    overrides = ("evaluation.clients=always", "num_rounds=1", "runtime.round_timeout=1.5")
    late = "evaluation: no reply within runtime.round_timeout=1.5 s"
    assert run(*overrides, grid=DeafInEvaluation)["refused"] == {"0": {"1": late}, "1": {"1": late}}

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            raise ValueError("no training")
        return client_app(message=message, context=context)

    refused = run(*overrides, grid=DeafInEvaluation, answer=answer)["refused"]
    assert refused["1"] == {"1": f"no training; {late}"}


def test_only_a_node_names_its_folder(run: Runner, tmp_path: Path) -> None:
    """A node writes to no folder that a message names."""
    folder = tmp_path / "elsewhere"
    expected = run("method=fedsa_lora")["shared_state_sha256"]

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            named = {"clients": [0, 1], "folder": str(folder), "state-folder": str(folder)}
            config = dict(message.content.config_records["config"])
            content = RecordDict({**message.content, "clients": ConfigRecord({**named})})
            content["config"] = ConfigRecord({**config, **named})
            changed = Message(content, message.metadata.dst_node_id, "train")
            changed.metadata.__dict__ |= message.metadata.__dict__
            return client_app(message=changed, context=context)
        return client_app(message=message, context=context)

    summary = run("method=fedsa_lora", answer=answer)
    assert summary["refused"] == {} and summary["shared_state_sha256"] == expected
    assert not folder.exists()


def test_a_client_that_fails_in_evaluation(run: Runner) -> None:
    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 0:
            raise ValueError("client 0 cannot evaluate")
        return client_app(message=message, context=context)

    summary = run("method=fedsa_lora", "num_rounds=1", answer=answer)
    assert summary["refused"] == {
        str(round): {"0": "evaluation: client 0 cannot evaluate"} for round in (0, 1)
    }
    assert len(run.recorder.of("evaluate", 1)) == 2  # after round 0: what round 1 sends
    last = run.recorder.of("evaluate", 2)
    numbers: list[Any] = [e.up.content.metric_records["metrics"] for e in last]
    mean = sum(m["test-num-examples"] * m["test_loss"] for m in numbers) / sum(
        m["test-num-examples"] for m in numbers
    )
    assert summary["final"]["client_test_loss"] == pytest.approx(mean, rel=1e-12)


def test_traffic_of_a_refused_reply_is_counted(run: Runner) -> None:
    """A refused reply was sent too."""
    run("num_rounds=1", answer=spoiling(CASES["NaN"][0], {1}, {1}))
    sent = [wire_bytes(e.up.content) for e in run.recorder.of("train")]
    assert len(sent) == 3 and run.lines()[1]["uplink_bytes"] == sum(sent)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            [0, 1, 5],
            r"partitions \[2\] of num_clients=3; node 3 holds partition 5, but num_clients=3",
        ),
        (
            [0, 1, 1],
            r"partitions \[2\].*; node 3 holds partition 1, as node 2 does, which came first",
        ),
        (
            [0, None, 2],
            r"partitions \[1\].*; node 2 could not be asked: this node has no partition-id",
        ),
        ([0, 2], r"no client holds partitions \[1\] of num_clients=3"),
    ],
)
def test_nodes_that_cannot_join(configs: list[int | None], message: str, run: Runner) -> None:
    class Named(InProcessGrid):
        def node_config(self, node: int) -> dict[str, Any]:
            partition = configs[node - 1]
            known = {} if partition is None else {"partition-id": partition}
            return known | {"state-folder": str(self.state_folder)}

    def grid(_: int, answer_all: Any) -> InProcessGrid:
        return Named(len(configs), answer_all)

    with pytest.raises((ValueError, TimeoutError), match=message):
        run("runtime.join_timeout=0.3", grid=grid)  # type: ignore[arg-type]


# --- what a server may ask of a client -----------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("'precision=${oc.env:SECRET_TOKEN}'", "must not hold an interpolation"),
        ('precision=$"{oc.env:SECRET_TOKEN}"', "must not hold an interpolation"),
        (r"precision=$\{oc.env:SECRET_TOKEN}", "must not hold an interpolation"),
        (r"'precision=$\{oc.env\:SECRET_TOKEN\}'", "must not hold an interpolation"),
        ("model=../../hunter2", "must not name a path in model"),
        ("+experiment@_global_=../../hunter2", r"must not name a path in experiment"),
        ("lr='" + "x" * (1 << 16) + "'", "must have at most 65536 characters"),
    ],
)
def test_a_message_reads_nothing_of_the_node(
    override: str, rule: str, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that resolved it would send the value back in its error."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")

    def asking(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            config = message.content.config_records["config"]
            config["overrides"] = f"{config['overrides']} {override}"
        return client_app(message=message, context=context)

    with pytest.raises(RoundFailed, match=rule) as failed:
        run("num_rounds=1", answer=asking)
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("round", 10**9, "round in a message must be from 0 to 2, got 1000000000"),
        ("round", -1, "round in a message must be from 0 to 2, got -1"),
        ("round", 1.0, "round in a message must be from 0 to 2, got 1.0"),
        ("generation", 2, "generation in a message must be from 0 to 1, got 2"),
        ("oldest", 10**9, "oldest in a message must be from 0 to 1, got 1000000000"),
        ("best", -1, "best in a message must be from 0 to 1, got -1"),
    ],
)
def test_numbers_of_a_message_are_the_run_s(key: str, value: Any, rule: str, run: Runner) -> None:
    """A round of 10^9 would keep a node busy for hours, and fill its memory with roles."""

    def asking(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            message.content.config_records["config"][key] = value
        return client_app(message=message, context=context)

    with pytest.raises(RoundFailed, match=re.escape(rule)):
        run("num_rounds=1", answer=asking)


def test_a_message_s_index_takes_a_bounded_room(run: Runner) -> None:
    """Two million tensors without numbers take a few kilobytes of a message, and gigabytes here."""
    text = json.dumps([[f"{i:x}", "float32", [0]] for i in range(50_000)])

    def asking(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            message.content.config_records["config"]["index"] = zlib.compress(text.encode())
        return client_app(message=message, context=context)

    with pytest.raises(RoundFailed, match="the index of the arrays cannot be read: it takes more"):
        run("num_rounds=1", answer=asking)


def test_the_server_resolves_its_own(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERS", "last:1")
    expected = run("num_rounds=1", "layers=last:1")["shared_state_sha256"]
    summary = run("num_rounds=1", "layers=${oc.env:LAYERS}", "lr=${oc.decode:'3e-3'}")
    assert summary["shared_state_sha256"] == expected
    for exchange in run.recorder.of("train"):
        overrides = split(str(exchange.down.content.config_records["config"]["overrides"]))
        assert {"layers='last:1'", "lr=0.003"} <= set(overrides)
