"""Whole runs of every method in conf/method: messages, their bytes, and equal bits every time."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from omegaconf import OmegaConf
from torch import Tensor

from fedpeft.client.app import app as client_app
from fedpeft.client.client import Client
from fedpeft.config.compose import CONF
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.engine.plan import Job
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.server.app import serve
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.simulation.launch import run as run_here
from fedpeft.state import State, snapshot
from tests.conftest import ROOT, Recorder, Runner, Sent, quiet, without_time
from tests.expected.methods import EXPECTED, PERSONAL, Expected, names_of
from tests.grids import one_by_one

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SUMMARY = {
    "method": str,
    "selected_by": str,
    "headline": str,
    "higher_is_better": bool,
    "stopped_early": type(None),
    "final": dict,
    "best": dict,
    "initial": dict,
    "baseline": dict,
    "parameters": dict,
    "bytes": dict,
    "interference": list,
    "initial_error": dict,
    "refused": dict,
    "restarted": dict,
    "seconds": float,
    "shared_state_sha256": str,
    "weights_sha256": str,
    "weights": str,
    "labels": list,
    "data": dict,
    "partition_sha256": str,
    "notes": list,
    "seed": int,
    "versions": dict,
    "commit": str if (ROOT / ".git").exists() else type(None),
    "command": str,
    "working_directory": str,
    "run_dir": str,
}


def serialised(message: Message) -> int:
    return sum(len(part.deflate()) for part in get_all_nested_objects(message.content).values())


def test_every_method_has_its_row() -> None:
    assert set(EXPECTED) == set(METHODS)


class Watched:
    """Stands in the client app's place, and notes what each training changes.

    Attributes:
        seen: client, round, all tensors of the model before the training, and after.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, State, State]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return client_app(message=message, context=context)  # type: ignore[call-arg]
        overrides = str(message.content.config_records["config"]["overrides"])
        engine = open_engine(overrides, None)
        client = Client(message, context, engine)
        engine.replica.load(client.begin().job.start)
        before = self._tensors(engine)
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        self.seen.append((client.number, client.round, before, self._tensors(engine)))
        return reply

    def _tensors(self, engine: Engine) -> State:
        return {k: v.detach().clone() for k, v in engine.replica.model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_two_rounds(method: str, run: Runner, opened: Callable[..., Engine]) -> None:
    watched = Watched()
    summary = run(f"method={method}", "compression=none", answer=watched)
    engine, lines = opened(f"method={method}"), run.lines()
    assert [line["round"] for line in lines] == [0, 1, 2]
    for round, line in enumerate(lines[1:], start=1):
        check_messages(engine, EXPECTED[method], line, run.recorder.of("train", round))
    check_trained(engine, EXPECTED[method], watched)
    check_summary(EXPECTED[method], summary, lines)
    assert summary == json.loads((run.run_dir / "summary.json").read_text())
    assert summary["run_dir"] == str(run.run_dir)


def check_messages(
    engine: Engine, expected: Expected, line: dict[str, Any], exchanges: list[Sent]
) -> None:
    """Check the names, numbers and bytes that clients receive and send in a round.

    Args:
        engine: an engine of the run's configuration.
        expected: the expected names and counts of the run's method.
        line: the round's line in metrics.jsonl.
        exchanges: trainings of the round.
    """
    at = line["round"] - 1
    up, down = (names_of(engine.replica.model, pattern) for pattern in expected.sent[at])
    assert [e.client for e in exchanges] == [0, 1, 2] == line["cohort"]
    for exchange in exchanges:
        assert list(exchange.up_state()) == up
        assert list(exchange.down_state()) == down
    numbers = {
        way: sum(engine.replica.initial[name].numel() for name in names)
        for way, names in (("up", up), ("down", down))
    }
    assert (len(up), numbers["up"]) == expected.counts[at]
    for way, messages in (
        ("up", [e.up for e in exchanges]),
        ("down", [e.down for e in exchanges]),
    ):
        payload = 4 * numbers[way]
        assert line[f"{way}link_bytes"] == sum(map(serialised, messages))
        assert line[f"{way}link_payload_bytes"] == 3 * payload
        assert all(payload < serialised(m) < payload + 4000 for m in messages)


def check_trained(engine: Engine, expected: Expected, watched: Watched) -> None:
    """Check that each training changes the parameters that are sent or personal, and no others."""
    assert [(client, round) for client, round, _, _ in watched.seen] == [
        (client, round) for round in (1, 2) for client in (0, 1, 2)
    ]
    for _, round, before, after in watched.seen:
        pattern = expected.sent[round - 1][0] + "|" + (expected.personal or "^$")
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert sorted(changed) == sorted(names_of(engine.replica.model, pattern))


def check_summary(expected: Expected, summary: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Check a summary against the lines of metrics.jsonl and the counts by hand."""
    assert {key: type(value) for key, value in summary.items()} == SUMMARY
    totals = {k: sum(line.get(k, 0) for line in lines) for k in summary["bytes"]}
    assert summary["bytes"] == totals
    assert set(totals) >= {
        f"{way}link{kind}" for way in ("up", "down") for kind in ("_bytes", "_payload_bytes")
    }
    assert summary["parameters"]["sent_up"] == sorted(number for _, number in expected.counts)
    assert summary["data"]["rows"] == {"train": 240, "validation": 40, "test": 40}
    assert summary["refused"] == {} and summary["seed"] == 0
    metrics = summary["final"]
    prefix = "client_test" if expected.personal else "test"
    assert 0 <= metrics[f"{prefix}_accuracy"] <= 1 and metrics[f"{prefix}_loss"] > 0


def test_the_numbers_are_those_of_the_last_line_and_the_saved_state(run: Runner) -> None:
    summary = run()
    assert summary["final"]["validation_loss"] == run.lines()[-1]["validation_loss"]
    assert summary["initial"]["validation_loss"] == run.lines()[0]["validation_loss"]
    assert summary["final"]["validation_loss"] != summary["initial"]["validation_loss"]
    sent = run.recorder.of("train", 2)
    weights = torch.tensor([e.up.content.metric_records["metrics"]["num-examples"] for e in sent])
    weights = weights.double() / weights.sum()
    for name, value in run.saved().items():
        states = torch.stack([e.up_state()[name].double() for e in sent], dim=-1)
        torch.testing.assert_close(value, (states @ weights).float(), rtol=1e-6, atol=1e-8)


def test_the_next_round_starts_from_the_aggregate(run: Runner) -> None:
    run("num_rounds=1", "seed=3")
    after_one = run.saved()
    run("num_rounds=2", "seed=3")
    for exchange in run.recorder.of("train", 2):
        received = exchange.down_state()
        assert received.keys() == after_one.keys()
        assert all(torch.equal(received[n], after_one[n]) for n in after_one)


def test_training_learns_the_topics(run: Runner) -> None:
    summary = run("num_rounds=4", "local_steps=20", "lr=0.01", "partition=iid")
    assert summary["baseline"]["test_baseline"] == 0.25
    assert summary["final"]["test_accuracy"] >= 0.55
    assert summary["final"]["test_loss"] < 0.75 * summary["initial"]["validation_loss"]


# --- bytes -----------------------------------------------------------------------------------


def test_payload_doubles_with_the_rank(run: Runner) -> None:
    """Bytes count the numbers sent, not Python objects. FedSA-LoRA sends A alone."""
    small = run("method=fedsa_lora", "method.rank=4")["bytes"]
    large = run("method=fedsa_lora", "method.rank=8")["bytes"]
    for key in ("uplink_payload_bytes", "downlink_payload_bytes"):
        assert small[key] == 2 * 3 * 512 * 4
        assert large[key] == 2 * small[key]
    for key in ("uplink_bytes", "downlink_bytes"):
        assert abs((large[key] - small[key]) - 2 * 3 * 512 * 4) < 200  # the index differs a little


def test_evaluation_is_counted_apart(run: Runner) -> None:
    without = run("evaluation.clients=never")["bytes"]
    assert not any(key.startswith("evaluation") for key in without)
    assert run.recorder.of("evaluate") == []
    sent = run("evaluation.clients=always")["bytes"]
    exchanges = run.recorder.of("evaluate")
    assert len(exchanges) == 3 * 3
    assert sent["evaluation_uplink_bytes"] == sum(serialised(e.up) for e in exchanges)
    assert sent["evaluation_downlink_bytes"] == sum(serialised(e.down) for e in exchanges)
    # "always" is a letter longer than "never" in the configuration that each message carries
    assert sent["downlink_bytes"] == without.pop("downlink_bytes") + 2 * 3
    assert {key: sent[key] for key in without} == without


# --- the same again ----------------------------------------------------------------------------


class Reversed(InProcessGrid):
    """Answers the newest message first."""

    def _work(self) -> None:
        self._queue.rotate(1)
        super()._work()


class Shuffled(InProcessGrid):
    """Answers in a random order, some messages at once, from nodes numbered the other way round."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._rng = random.Random(11)

    def node_config(self, node: int) -> dict[str, Any]:
        return super().node_config(node) | {"partition-id": self.num_clients - node}

    def _work(self) -> None:
        for _ in range(self._rng.randint(0, 2)):
            self._rng.shuffle(self._queue)
            super()._work()


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(method: str, run: Runner) -> None:
    """A run has the same bits if replies come in another order, from nodes of other numbers."""
    overrides = [f"method={method}", "evaluation.clients=always"]
    first, lines = run(*overrides), run.lines()
    again = run(*overrides, grid=Shuffled)
    assert run.run_dir != Path(first["run_dir"])
    assert without_time(again) == without_time(first)
    assert without_time(run.lines()) == without_time(lines)


def test_any_order_of_replies_gives_the_same_bits(run: Runner) -> None:
    """The grids of this test and the one above answer in different orders."""
    results, orders = [], []
    for grid in (InProcessGrid, Reversed, Shuffled):
        results.append(without_time(run(grid=grid)))
        orders.append([e.client for e in run.recorder.of("train")])
    assert results[0] == results[1] == results[2]
    assert orders[0] == [0, 1, 2, 0, 1, 2] and orders[1] == [2, 1, 0, 2, 1, 0]
    assert orders[2] not in orders[:2]
    nodes = {e.client: e.down.metadata.dst_node_id for e in run.recorder.of("train")}
    assert nodes == {0: 3, 1: 2, 2: 1}


def test_another_seed_another_run(run: Runner) -> None:
    first, second = run("seed=0"), run("seed=1")
    assert first["shared_state_sha256"] != second["shared_state_sha256"]
    assert first["initial"] != second["initial"]  # the head's start
    assert first["data"] == second["data"]
    assert first["partition_sha256"] != second["partition_sha256"]


def test_the_python_function_gives_the_same_as_the_grid(
    run: Runner, base: list[str], tmp_path: Path
) -> None:
    expected = run("method.rank=4")["shared_state_sha256"]
    overrides = ["method.rank=4", "runtime.clients_per_pass=1", f"run_dir={tmp_path / 'launched'}"]
    assert run_here([*base, *overrides], quiet())["shared_state_sha256"] == expected


def test_cohorts(run: Runner) -> None:
    overrides = ["num_clients=5", "clients_per_round=2", "num_rounds=6", "local_steps=1"]
    cohorts = []
    for seed in (0, 0, 1):
        run(*overrides, f"seed={seed}", "partition=iid")
        cohorts.append([line["cohort"] for line in run.lines()[1:]])
        worked = [[e.client for e in run.recorder.of("train", r)] for r in range(1, 7)]
        assert worked == cohorts[-1]
    assert cohorts[0] == cohorts[1] != cohorts[2]
    assert all(len(set(c)) == 2 and c == sorted(c) for c in cohorts[0])
    assert len({tuple(c) for c in cohorts[0]}) > 2
    assert {client for c in cohorts[0] for client in c} == {0, 1, 2, 3, 4}


# --- the run's directory -------------------------------------------------------------------------


def test_a_directory_holds_one_run(run: Runner, tmp_path: Path) -> None:
    run(f"run_dir={tmp_path / 'mine'}")

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir() if p.is_file()}

    before = files()
    assert set(before) == {
        ".lock",
        "config.yaml",
        "overrides.yaml",
        "partition.parquet",
        "metrics.jsonl",
        "clients.parquet",
        "summary.json",
        "shared_state.safetensors",
        "best_shared_state.safetensors",
    }
    with pytest.raises(ValueError, match=r"run_dir=.*/mine already holds a run"):
        run(f"run_dir={tmp_path / 'mine'}", "seed=5")
    assert files() == before


def test_a_refused_run_leaves_no_directory_of_its_own(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has no split nosuch"):
        run_here([*base, "data.test_split=nosuch"], quiet())
    assert not list(Path("runs").iterdir())

    def refuse(*_: object) -> None:
        raise ValueError("no such strategy")

    monkeypatch.setattr(FederatedPEFT, "__init__", refuse)
    for path in ("new", "empty"):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="no such strategy"):
            run_here([*base, f"run_dir={path}"], quiet())
    with pytest.raises(ValueError, match="no such strategy"):
        run_here(base, quiet())
    assert not Path("new").exists() and not list(Path("empty").iterdir())
    assert not list(Path("runs").iterdir())


def test_a_refused_run_leaves_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(str(tmp_path), OmegaConf.create({"seed": 1})).discard()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    begun = RunDirectory(str(tmp_path / "run"), OmegaConf.create({"seed": 1}))
    begun.append({"round": 0})
    begun.discard()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl"} <= names


def test_evaluation_every(run: Runner) -> None:
    run("num_rounds=5", "evaluation.every=2", "local_steps=1")
    assert [line["round"] for line in run.lines() if "validation_loss" in line] == [0, 2, 4, 5]
    assert [line["round"] for line in run.lines() if "interference" in line] == [2, 4, 5]


def test_clients_get_no_path_of_the_server(run: Runner) -> None:
    run()
    for exchange in run.recorder.of("train"):
        overrides = exchange.down.content.config_records["config"]["overrides"]
        assert "run_dir" not in str(overrides)


def test_personal_method_without_client_evaluation(run: Runner) -> None:
    """Nothing is measured, so the last round stands for the best; the run still ends well."""
    summary = run("method=fedsa_lora", "evaluation.clients=never")
    assert summary["best"]["round"] == summary["final"]["round"] == 2
    best, last = run.saved("best_shared_state"), run.saved()
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_uniform_weights(run: Runner) -> None:
    run("num_rounds=1", "strategy.weights=uniform")
    sent = [e.up_state() for e in run.recorder.of("train", 1)]
    for name, value in run.saved().items():
        mean = torch.stack([state[name].double() for state in sent]).mean(0)
        torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=1e-8)


# --- personal parameters -------------------------------------------------------------------------


def test_each_client_keeps_its_own_personal_tensors(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One resident model serves all clients, yet each client has its own B and head."""
    last: dict[int, State] = {}
    initial: State = {}
    checked: list[tuple[str, int, int]] = []
    train_client, evaluate = Engine.train_client, Engine.evaluate

    def personal(engine: Engine) -> State:
        model = engine.replica.model
        return snapshot(model, names_of(model, PERSONAL["fedsa_lora"]))

    def check(engine: Engine) -> None:
        initial.update({name: engine.replica.initial[name] for name in personal(engine)})
        expected = last.get(run.recorder.client, initial)
        for name, value in personal(engine).items():
            assert torch.equal(value, expected[name]), (run.recorder.client, name)
        checked.append((run.recorder.kind, run.recorder.round, run.recorder.client))

    def train_and_check(engine: Engine, job: Job) -> Any:
        assert job.client == run.recorder.client
        engine.replica.load(job.start)
        check(engine)
        result = train_client(engine, job)
        last[job.client] = personal(engine)
        return result

    def evaluate_and_check(engine: Engine, *args: Any, **options: Any) -> dict[str, float]:
        check(engine)
        return evaluate(engine, *args, **options)

    monkeypatch.setattr(Engine, "train_client", train_and_check)
    monkeypatch.setattr(Engine, "evaluate", evaluate_and_check)
    summary = run("method=fedsa_lora", "clients_per_round=2", "num_rounds=4", "seed=2")
    assert summary["refused"] == {}  # a check that fails in a client shows here

    assert len(initial) == 4 + 2
    assert all(not value.any() for name, value in initial.items() if "lora_B" in name)
    assert initial["classifier.weight"].any()
    cohorts = [line["cohort"] for line in run.lines()[1:]]
    assert sorted(last) == [0, 1, 2] and len({tuple(c) for c in cohorts}) > 1
    # One training in each cohort, and validation and test of every client in rounds 0 to 4.
    trained = [(round, client) for kind, round, client in checked if kind == "train"]
    assert trained == [(r, c) for r, cohort in enumerate(cohorts, start=1) for c in cohort]
    assert len(checked) == len(trained) + 2 * 3 * 5
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert all(not torch.equal(last[a][name], last[b][name]) for name in initial)
    for exchange in run.recorder.exchanges:
        for state in (exchange.down_state(), exchange.up_state()):
            assert all(".lora_A." in name for name in state)


def test_a_fresh_client_starts_from_zero_b_and_the_initial_head(run: Runner) -> None:
    watched = Watched()
    run("method=fedsa_lora", "clients_per_round=1", "num_rounds=6", "seed=2", answer=watched)
    first: dict[int, tuple[int, State]] = {}
    for client, round, before, _ in watched.seen:
        first.setdefault(client, (round, before))
    assert len(first) == 3 and max(round for round, _ in first.values()) > 1
    heads: list[Tensor] = []
    for _, before in first.values():
        assert all(not v.any() for name, v in before.items() if ".lora_B." in name)
        heads.append(before["classifier.weight"])
    assert all(torch.equal(a, b) for a, b in pairwise(heads))
    # while A is what other clients have trained
    a = [name for name in first[0][1] if ".lora_A." in name]
    starts = [before for _, before in first.values()]
    assert not torch.equal(starts[0][a[0]], starts[1][a[0]])


def test_shared_head_of_fedsa_lora(run: Runner) -> None:
    run("method=fedsa_lora", "personal=null", "num_rounds=1")
    for exchange in run.recorder.of("train"):
        assert {n for n in exchange.up_state() if ".lora_" not in n} == {
            "classifier.weight",
            "classifier.bias",
        }


def test_runs_of_one_process_do_not_share_personal_values(base: list[str], tmp_path: Path) -> None:
    """``fedpeft compare`` serves several configurations to the same nodes in turn."""
    recorder = Recorder()
    grid = InProcessGrid(3, one_by_one(recorder))  # type: ignore[arg-type]
    shas = []
    for rank in (4, 2, 4):
        overrides = [*base, "method=fedsa_lora", f"method.rank={rank}", "num_rounds=1", "seed=9"]
        folder = tmp_path / str(len(shas))
        shas.append(serve(grid, [*overrides, f"run_dir={folder}"], quiet())["shared_state_sha256"])
    assert shas[0] != shas[1]
    assert len(recorder.of("train")) == 3 * 3


def test_files_that_are_shared_name_no_folder_of_this_machine(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("num_rounds=1", "run_dir=out/run")["run_dir"] == "out/run"
    assert "run_dir: out/run\n" in (tmp_path / "out/run/config.yaml").read_text()
    assert str(tmp_path / "out") not in (tmp_path / "out/run/summary.json").read_text()


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_run_without_rounds_measures_the_untrained_model(run: Runner, strategy: str) -> None:
    """It is what another run starts from, and it sends nothing that trains."""
    given = ["method=lora", f"strategy={strategy}", "evaluation.clients=always"]
    floor, trained = run(*given, "num_rounds=0"), run(*given, "num_rounds=1")
    assert floor["initial"] == trained["initial"]
    assert (floor["final"]["round"], floor["best"]["round"]) == (0, 0)
    key = "client_test_accuracy"
    assert floor["final"][key] == trained["initial"][key] and "test_accuracy" in floor["final"]
    assert (floor["bytes"]["uplink_bytes"], floor["bytes"]["downlink_bytes"]) == (0, 0)
    assert floor["interference"] == [] and floor["parameters"]["trained"] == [0, 0]


def test_without_rounds_a_personal_model_is_measured_on_its_clients(run: Runner) -> None:
    floor = run("method=fedsa_lora", "num_rounds=0")
    assert floor["selected_by"] == "client_validation_accuracy"
    assert floor["final"]["client_test_accuracy"] == floor["initial"]["client_test_accuracy"]
    assert "test_accuracy" not in floor["final"]
