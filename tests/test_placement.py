"""``personal``, ``frozen`` and ``layers`` choose the roles of any method's parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType
from omegaconf import OmegaConf

from fedpeft.client.app import app as client_app
from fedpeft.client.client import Client, Kept
from fedpeft.config.load import load_config
from fedpeft.config.schema import Checkpointing
from fedpeft.engine.engine import Engine, Result, open_engine
from fedpeft.methods.base import At
from fedpeft.methods.lora import LoRA
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server.run import Run
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import Role, State
from tests.conftest import Runner, job_of, newest, quiet

HEAD = ["classifier.weight", "classifier.bias"]
TINY_RANK = "method.rank=4"


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watched:
    """Stands in the client app's place, and notes what each client starts from and keeps.

    Attributes:
        starts: the head before training, by round and client.
        ends: all personal parameters after training, by round and client.
    """

    def __init__(self) -> None:
        self.starts: dict[tuple[int, int], State] = {}
        self.ends: dict[tuple[int, int], State] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        overrides, client = str(config["overrides"]), int(context.node_config["partition-id"])  # type: ignore[arg-type]
        at: Any = (config["round"], client)
        training = message.metadata.message_type == MessageType.TRAIN
        if training:
            begun = Client(message, context, open_engine(overrides, None)).begin()
            self.starts[at] = {name: begun.job.start[name] for name in HEAD}
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        if training:
            self.ends[at] = newest(context, message).personal
        return reply

    def check(self, cohorts: Sequence[Sequence[int]], first: int, before: State) -> None:
        """Check that each client goes on from the head that it kept.

        Args:
            cohorts: the clients of each round, from round 1 on.
            first: round in which the head becomes personal.
            before: the head from which a client starts that has kept none.
        """
        heads: dict[int, State] = {}
        rested = set()
        for round, cohort in enumerate(cohorts, start=1):
            if round < first:
                continue
            for client in cohort:
                assert equal(self.starts[round, client], heads.get(client, before))
                heads[client] = self.ends[round, client]
                assert list(heads[client]) == HEAD
                assert not equal(heads[client], self.starts[round, client])
            rested |= {client for client in heads if client not in cohort}
        weights = [head["classifier.weight"] for head in heads.values()]
        assert len(weights) == 3 and rested
        assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


# --- personal ------------------------------------------------------------------------------------


def test_a_personal_head_of_lora_stays_with_each_client(
    run: Runner, opened: Callable[..., Engine]
) -> None:
    watched = Watched()
    overrides = ("personal=head", TINY_RANK, "clients_per_round=2", "num_rounds=4", "seed=2")
    summary = run(*overrides, answer=watched)
    assert summary["refused"] == {}
    for exchange in run.recorder.of("train"):
        assert len(exchange.up_state()) == len(exchange.down_state()) == 8
    for exchange in run.recorder.exchanges:
        for state in (exchange.up_state(), exchange.down_state()):
            assert all(".lora_" in name for name in state)
    engine = opened(*overrides)
    cohorts = [line["cohort"] for line in run.lines()[1:]]
    watched.check(cohorts, 1, {name: engine.replica.initial[name] for name in HEAD})
    assert not set(HEAD) & set(run.saved())
    # each client is measured with its own head
    assert summary["selected_by"] == "client_validation_accuracy"
    total, rows = 0.0, 0
    for client in range(3):
        head = [state for (_, c), state in watched.ends.items() if c == client][-1]
        engine.replica.load(run.saved(), head)
        test = engine.rows.client_examples(client)["test"]
        total += len(test) * engine.evaluate(test)["loss"]
        rows += len(test)
    assert summary["final"]["client_test_loss"] == pytest.approx(total / rows, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("fedsa_lora", "personal=[head,'*.lora_B.*']"), ("ffa_lora", "frozen='*.lora_A.*'")],
)
def test_a_pattern_makes_one_method_of_another(method: str, pattern: str, run: Runner) -> None:
    """FedSA-LoRA is LoRA whose B and head are personal, FFA-LoRA is LoRA whose A is frozen."""
    expected = run(f"method={method}", "lr=3e-3")
    summary = run("method=lora", pattern, "lr=3e-3")
    for key in ("shared_state_sha256", "final", "initial", "selected_by"):
        assert summary[key] == expected[key], key
    assert summary["bytes"]["uplink_bytes"] == expected["bytes"]["uplink_bytes"]


@dataclass(frozen=True)
class LateHead(LoRA):
    """LoRA whose head is personal from round 2 on."""

    def role(self, name: str, at: At) -> Role:
        return Role.PERSONAL if name in HEAD and at.round >= 2 else Role.SHARED


class OnEngine:
    """Answers messages on one engine, whose configuration no override can name.

    Attributes:
        watched: notes each client's head before training, and its personal parameters after it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.watched = engine, Watched()

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        return [
            self.one(message, Client(message, context, self.engine))
            for message, context in zip(messages, contexts, strict=True)
        ]

    def one(self, message: Message, client: Client) -> Message:
        if message.metadata.message_type == MessageType.EVALUATE:
            return Message(client.evaluate(), reply_to=message)
        begun = client.begin()
        result = self.engine.train_client(begun.job)
        assert isinstance(result, Result)
        content = client.finish(begun, result)
        at = client.round, client.number
        self.watched.starts[at] = {name: begun.job.start[name] for name in HEAD}
        kept = client.store.load(max(client.store.generations, default=0))
        self.watched.ends[at] = Kept.parted(kept).personal
        return Message(content, reply_to=message)


def test_a_head_that_becomes_personal_is_measured_on_the_clients_in_every_round(
    base: list[str], tmp_path: Path
) -> None:
    overrides = [*base, "clients_per_round=2", "num_rounds=4", "seed=2"]
    engine = Engine(replace(load_config(overrides), method=LateHead(rank=4)))
    assert engine.replica.roles.has_personal
    assert [set(HEAD) <= set(engine.replica.roles.shared(r)) for r in (1, 2, 3)] == [1, 0, 0]
    directory, display = RunDirectory(str(tmp_path / "run"), OmegaConf.create({})), quiet()
    display.start("x", 4)
    worker = OnEngine(engine)
    run = Run(FederatedPEFT("", engine), directory, Checkpointing(), display)
    summary = run.serve(InProcessGrid(3, worker))

    assert summary["selected_by"] == "client_validation_accuracy"
    assert summary["refused"] == {}
    lines = read_metrics(tmp_path / "run")
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        assert 0 <= line["client_validation_accuracy"] <= 1 and line["client_validation_loss"] > 0
        assert not any(key.startswith("validation_") for key in line)
    best = max(lines, key=lambda line: line["client_validation_accuracy"])
    assert summary["best"]["client_validation_accuracy"] == best["client_validation_accuracy"]

    watched = worker.watched
    cohorts = [line["cohort"] for line in lines[1:]]
    initial = {name: engine.replica.initial[name] for name in HEAD}
    shared = {name: run.strategy.state[name] for name in HEAD}  # since round 1 no client sends it
    assert not equal(shared, initial)
    assert all(equal(watched.starts[1, c], initial) and not watched.ends[1, c] for c in cohorts[0])
    watched.check(cohorts, 2, shared)


# --- frozen --------------------------------------------------------------------------------------


def test_a_frozen_head_never_changes_and_is_not_sent(
    run: Runner, opened: Callable[..., Engine]
) -> None:
    overrides = ("frozen=head", TINY_RANK, "evaluation.clients=always")
    watched = Watched()
    summary = run(*overrides, answer=watched)
    assert summary["refused"] == {} and summary["selected_by"] == "validation_accuracy"
    engine = opened(*overrides)
    initial = {name: engine.replica.initial[name] for name in HEAD}
    assert len(watched.starts) == 6 and not any(watched.ends.values())
    assert all(equal(start, initial) for start in watched.starts.values())
    for exchange in run.recorder.exchanges:
        for state in (exchange.up_state(), exchange.down_state()):
            assert not set(HEAD) & set(state)
    assert len(run.saved()) == 8 and not set(HEAD) & set(run.saved())
    assert summary["parameters"]["sent_up"] == [2 * 2 * 4 * (32 + 32)] * 2
    # it does not change on a client either, though the loss has a gradient there
    engine.replica.load(run.saved())
    after = engine.train_client(job_of(engine, 0)).after
    assert equal({name: after[name] for name in HEAD}, initial)
    assert not equal(after, engine.replica.initial)
    # without the pattern it changes
    run(TINY_RANK)
    assert all(not torch.equal(run.saved()[name], initial[name]) for name in HEAD)


# --- layers --------------------------------------------------------------------------------------


def blocks_of(names: Sequence[str]) -> set[int]:
    """Return the numbers of the blocks that hold these parameters."""
    return {int(n.partition(".layer.")[2].partition(".")[0]) for n in names if ".layer." in n}


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt", "bitfit", "full", "adapter"])
def test_the_last_block_alone(method: str, run: Runner, opened: Callable[..., Engine]) -> None:
    """Parameters outside of the blocks, such as the head's, train as ever."""
    everywhere = opened(f"method={method}").replica.roles.names
    assert blocks_of(everywhere) == {0, 1}
    expected = [name for name in everywhere if ".layer.0." not in name]
    assert blocks_of(expected) == {1} and set(HEAD) <= set(expected)
    summary = run(f"method={method}", "layers=last:1", "num_rounds=1", "local_steps=1")
    assert summary["refused"] == {}
    for exchange in run.recorder.of("train"):
        assert list(exchange.up_state()) == list(exchange.down_state()) == expected
    assert sorted(run.saved()) == sorted(expected)
    replica = opened(f"method={method}", "layers=last:1").replica
    assert replica.roles.names == expected
    parameters = dict(replica.model.named_parameters())
    first = [name for name in parameters if ".layer.0." in name]
    assert len(first) == 16  # the base model's: the method added none
    assert not any(parameters[name].requires_grad for name in first)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("first:1", {0}),
        ("last:2", {0, 1}),
        ("[-1]", {1}),
        ("[0]", {0}),
        ("[0,-1]", {0, 1}),
        ("all", {0, 1}),
    ],
)
def test_blocks_by_name_and_number(
    layers: str, blocks: set[int], opened: Callable[..., Engine]
) -> None:
    assert blocks_of(opened(f"layers={layers}").replica.roles.names) == blocks


@pytest.mark.parametrize(
    ("method", "name"), [("prompt", "Prompt"), ("fedprompt", "Prompt"), ("p_tuning", "PTuning")]
)
def test_a_method_outside_of_the_blocks_cannot_choose_them(
    method: str, name: str, opened: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError) as refused:
        opened(f"method={method}", "layers=last:1")
    assert str(refused.value) == (
        f"layers=last:1 chooses blocks, but method {name} trains nothing inside of blocks: set "
        "layers=all"
    )


# --- patterns that match nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        *(
            (
                f"{key}={pattern}",
                f"{key}={named} matches no trained parameter: give head, or a pattern of names "
                "such as bert.encoder.layer.0.attention.self.query.lora_A.default.weight",
            )
            for key in ("personal", "frozen")
            for pattern, named in (
                ("'*.lora_C.*'", "*.lora_C.*"),
                ("[head,nobody]", "nobody"),
                # it is there, but does not train
                ("bert.pooler.dense.weight", "bert.pooler.dense.weight"),
            )
        ),
        (
            "layers=last:3",
            "layers must be all, first:N, last:N with N from 1 to 2, or a list of numbers, "
            "got last:3",
        ),
        ("layers=[2]", "layers must be from -2 to 1 here, got 2"),
        ("layers=[-3]", "layers must be from -2 to 1 here, got -3"),
    ],
)
def test_patterns_that_match_nothing_are_refused(
    override: str, says: str, opened: Callable[..., Engine]
) -> None:
    with pytest.raises(ValueError) as refused:
        opened(override)
    assert str(refused.value) == says
