"""Trackers get each round once, survive what fails, and leave nothing running."""

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from fedpeft.config.compose import composed
from fedpeft.config.load import trackers
from fedpeft.config.message import for_clients
from fedpeft.config.schema import ConfigError
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_files import read_metrics
from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.reporting.trackers import mlflow
from fedpeft.reporting.trackers.base import Export, Numbers, Session, Tracker, Tracking
from fedpeft.reporting.trackers.tensorboard import TensorBoard
from fedpeft.simulation.launch import run as run_here
from tests.conftest import ROOT, Stopping

# --- the key ---------------------------------------------------------------------------------


def test_several_at_once_are_of_the_server_alone() -> None:
    given = ["seed=3", "logger=[tensorboard,wandb]", "logger.wandb.project=mine"]
    chosen = trackers(given)
    assert [type(tracker).__name__ for tracker in chosen] == ["TensorBoard", "WandB"]
    assert (chosen[1].project, chosen[1].mode) == ("mine", "offline")
    assert for_clients(given) == "seed=3"
    assert composed(given).seed == 3 and trackers(["seed=3"]) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("logger=zzz", "logger must be one of mlflow, tensorboard, wandb, got zzz"),
        ("logger=[wandb,zzz]", "logger has no zzz"),
        ("logger.wandb.mode=online", "logger.wandb is set, but not chosen: add logger=wandb"),
        (
            "logger=wandb logger.wandb.mode=x",
            "logger.wandb.mode must be offline or online, got x",
        ),
        (
            "logger=wandb logger.wandb.projct=x",
            "unknown key logger.wandb.projct: WandB has no such field: did you mean "
            "logger.wandb.project?",
        ),
        (
            "logger=wandb logger.wandb._target_=os.system",
            "logger.wandb._target_ must be a class of fedpeft, got os.system",
        ),
    ],
)
def test_a_wrong_key_is_one_sentence(given: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        trackers(given)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        trackers(f"logger={name}")
    assert str(raised.value) == (
        f"logger={name} needs the package {name}: pip install 'fedpeft[{name}]'"
    )


def test_a_missing_package_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['wandb'] = None\n"
        "from fedpeft.simulation.launch import run\n"
        f"try: run(['logger=[tensorboard,wandb]', 'run_dir={tmp_path / 'run'}'])\n"
        "except ValueError as error: print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == (
        "logger=wandb needs the package wandb: pip install 'fedpeft[wandb]' False\n"
    ), done.stderr
    assert not (tmp_path / "run").exists()


def no_export(run_dir: Path, to: Path) -> None:
    pytest.fail(f"{run_dir} was exported")


# --- what a tracker is told -------------------------------------------------------------------


@dataclass
class Noted(Tracker):
    """A tracker in memory, which fails where it is told to."""

    broken: set[str] = field(default_factory=set)
    ids: list[str | None] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)
    ended: tuple[Any, ...] = ()
    opened: int = 0

    name = "noted"
    module = "json"

    def open(self, run: SavedRun, folder: Path, id: str | None, done: int) -> Session:
        if "open" in self.broken:
            raise OSError("no server\nanswers")
        self.ids.append(id)
        self.opened += 1
        return _Noted(self)


class _Noted(Session):
    id = "run 7"

    def __init__(self, tracker: Noted) -> None:
        self.tracker = tracker

    def write(self, round: int, numbers: Numbers) -> None:
        if "write" in self.tracker.broken:
            raise OSError(28, "No space left on device")
        self.tracker.rounds.append(round)
        self.tracker.numbers = numbers

    def end(
        self, status: str, reason: str, summary: Mapping[str, Any] | None, export: Export
    ) -> str:
        self.tracker.ended = status, reason, summary
        return ""

    def close(self) -> None:
        self.tracker.opened -= 1
        if "close" in self.tracker.broken:
            raise OSError("closing failed too")


@dataclass
class Book:
    """A run's directory that grows by hand, and what its tracker is told."""

    path: Path
    tracker: Noted = field(default_factory=Noted)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.mkdir()
        (self.path / "config.yaml").write_text("seed: 0\nlr: 0.1\n")
        self.begin()

    def begin(self) -> None:
        """Begin as a new process does."""
        self.tracking = Tracking(self.tracker, str(self.path), self.notes.append, no_export)

    def round(self, number: int, **values: Any) -> None:
        line = {"round": number} | values
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracking.round_done(line)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "run")


def test_numbers_are_those_of_the_line_without_single_clients(book: Book) -> None:
    book.tracking.start("", 1)
    book.round(
        0,
        loss=0.5,
        rows=3,
        flag=True,
        cohort=[1, 2],
        weights={"0": 0.5},
        repeated="late",
        none=None,
    )
    assert book.tracker.numbers == {"round": 0, "loss": 0.5, "rows": 3}


def test_a_tracker_that_fails_in_the_middle_catches_up(book: Book) -> None:
    book.tracking.start("", 9)
    book.round(0)
    book.tracker.broken = {"write", "close"}
    book.round(1)
    book.tracker.broken = {"open"}
    book.round(2)
    assert book.tracker.rounds == [0]
    book.tracker.broken = set()
    book.round(3)
    book.tracking.stop("failed", "no client replied")
    assert book.tracker.rounds == [0, 1, 2, 3]
    assert book.tracker.ids == [None, "run 7"]
    assert book.tracker.ended == ("failed", "no client replied", None)
    assert book.notes == [
        "logger=noted failed: [Errno 28] No space left on device; the run goes on, and each "
        "further round tries again"
    ]
    assert book.tracker.opened == 0


def test_a_note_of_the_run_is_not_told_again(book: Book) -> None:
    book.tracking.note("a split was set aside")
    assert book.notes == []


def test_a_tracker_that_fails_at_the_end_ends_no_run(book: Book) -> None:
    book.tracking.start("", 9)
    book.tracker.broken = {"write", "close"}
    book.round(0)
    book.tracking.stop()
    assert book.tracker.ended == () and book.tracker.opened == 0
    assert book.notes[0].endswith("each further round tries again")
    error = "logger=noted failed: [Errno 28] No space left on device"
    assert book.notes[1:] == [f"{error}; it lacks the end of the run"]


def test_a_tracker_that_cannot_begin_ends_the_run_at_once(book: Book) -> None:
    book.tracker.broken = {"open"}
    with pytest.raises(ValueError, match=r"^logger=noted cannot begin: no server answers$"):
        book.tracking.start("", 9)
    book.tracker.broken = set()
    book.tracking.stop("failed", "logger=noted cannot begin")
    assert book.tracker.opened == 0 and book.tracker.ended == ()


def test_a_tracker_that_cannot_write_the_rounds_before_says_that_the_run_failed(book: Book) -> None:
    (book.path / "metrics.jsonl").write_text('{"round": 0}\n')
    book.tracker.broken = {"write"}
    reason = "logger=noted cannot begin: [Errno 28] No space left on device"
    with pytest.raises(ValueError, match=re.escape(reason)):
        book.tracking.start("", 9)
    assert book.tracker.ended == ("failed", reason, None) and book.tracker.opened == 0


class _Store:
    """A store of MLflow in which another run makes the experiment at the same time."""

    def __init__(self) -> None:
        self.experiments: dict[str, SimpleNamespace] = {}
        self.statuses: dict[str, str] = {}

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return self.experiments.get(name)

    def create_experiment(self, name: str, place: str | None) -> str:
        if name != "refused":
            self.experiments[name] = SimpleNamespace(experiment_id="of another run")
        raise OSError(f"{name} exists")

    def create_run(self, experiment: str, **_: Any) -> SimpleNamespace:
        self.statuses["7"] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def log_batch(self, id: str, **_: Any) -> None:
        raise OSError("no room")

    def set_terminated(self, id: str, status: str) -> None:
        self.statuses[id] = status


@pytest.fixture
def of_mlflow(book: Book) -> Any:
    """A run of MLflow on a store that fails."""
    groups = {g: {"_target_": "fedpeft.x.X"} for g in ("method", "data", "strategy")}
    tree = groups | {"seed": 0, "model": {"load_in": "4bit"}}
    (book.path / "config.yaml").write_text(json.dumps(tree))
    run = mlflow._Run.__new__(mlflow._Run)
    run._client, run._saved = _Store(), SavedRun(book.path)  # type: ignore[assignment]
    run._entities = SimpleNamespace(Param=lambda *words: words)  # type: ignore[assignment]
    return run


def test_two_runs_may_make_an_experiment_of_mlflow_at_once(of_mlflow: Any) -> None:
    assert of_mlflow._experiment("new", None) == "of another run"
    with pytest.raises(OSError, match="refused exists"):
        of_mlflow._experiment("refused", None)


def test_a_run_of_mlflow_that_cannot_begin_is_not_left_running(of_mlflow: Any) -> None:
    with pytest.raises(OSError, match="no room"):
        of_mlflow._begin("1")
    assert of_mlflow._client.statuses == {"7": "FAILED"}


def test_mlflow_loads_no_quantised_base_to_keep_a_model(of_mlflow: Any) -> None:
    assert of_mlflow._model(no_export) == (
        "logger=mlflow keeps no model, because with model.load_in=4bit its export loads the whole "
        f"base model on the CPU: fedpeft export {of_mlflow._saved.path} does"
    )


def test_a_run_that_goes_on_writes_no_round_twice(book: Book) -> None:
    book.tracking.start("", 9)
    for round in range(3):
        book.round(round)
    book.tracking.stop("stopped", "stopped after round 2")
    (book.path / "metrics.jsonl").write_text('{"round": 0}\n')  # the last checkpoint's
    book.begin()
    book.tracking.start("", 9)
    for round in range(1, 5):
        book.round(round)
    assert book.tracker.rounds == [0, 1, 2, 3, 4]
    assert book.tracker.ids == [None, "run 7"]


def test_a_tracker_that_joins_later_gets_the_rounds_before(book: Book) -> None:
    (book.path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    book.tracking.start("", 9)
    book.round(2)
    assert book.tracker.rounds == [0, 1, 2]


def test_another_configuration_is_another_run(book: Book) -> None:
    book.tracking.start("", 9)
    book.tracking.stop("failed")
    for text, id in (("seed: 0\nlr: 0.1\nlogs: json\n", "run 7"), ("seed: 0\nlr: 0.2\n", None)):
        (book.path / "config.yaml").write_text(text)
        book.begin()
        book.tracking.start("", 9)
        assert book.tracker.ids[-1] == id


# --- runs ------------------------------------------------------------------------------------


@dataclass
class Done:
    """A run that was stopped once and then came to its end."""

    path: Path
    summary: dict[str, Any]

    @property
    def points(self) -> dict[str, list[tuple[int, float]]]:
        """The numbers in metrics.jsonl by name, each with its round."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in read_metrics(self.path):
            for name, value in line.items():
                if isinstance(value, int | float):
                    found.setdefault(name, []).append((line["round"], value))
        return found


def done(base: list[str], path: Path, logger: str, *more: str) -> Done:
    """Run, stop after round 1, and go on."""
    given = [*base, *more, f"logger={logger}", f"run_dir={path}", "resume=true"]
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        run_here(given, Stopping(1))
    summary = run_here(given, Display(Console(quiet=True)))
    assert set(threading.enumerate()) <= threads
    return Done(path, summary)


def same(found: Mapping[str, list[tuple[int, float]]], done: Done, rel: float = 1e-12) -> None:
    """Compare numbers with metrics.jsonl, but not seconds, because the first try's stay."""
    assert found.keys() == done.points.keys()
    for name, points in done.points.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        if name != "seconds":
            values = [value for _, value in points]
            assert [value for _, value in found[name]] == pytest.approx(values, rel=rel), name


def test_tensorboard(base: list[str], tmp_path: Path) -> None:
    run = done(base, tmp_path / "run", "tensorboard")
    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    events: dict[str, list[tuple[int, Any]]] = {
        tag: [(e.step, make_ndarray(e.tensor_proto)) for e in read.Tensors(tag)]
        for tag in read.Tags()["tensors"]
    }
    texts = {
        tag: [(step, value.item().decode()) for step, value in events.pop(tag)]
        for tag in ("configuration", "status", "summary")
    }
    assert len(events.pop("_hparams_/session_start_info")) == 1
    found = {tag: [(step, value.item()) for step, value in e] for tag, e in events.items()}
    same(found, run, rel=1e-7)  # TensorBoard's numbers are of single precision
    ((_, configuration),) = texts["configuration"]
    assert "| method.rank | `8` |" in configuration and "| method | `lora` |" in configuration
    assert f"| run_hash | `{SavedRun(run.path).hash}` |" in configuration
    assert texts["status"][-1] == (2, "completed")
    assert json.loads(texts["summary"][0][1].replace("\n    ", "\n")) == run.summary


def test_tensorboard_drops_what_a_killed_process_wrote_last(tmp_path: Path) -> None:
    """It had written a round, but not yet noted it."""
    folder = tmp_path / "run"
    folder.mkdir()
    target = {"_target_": "a.B"}
    config = {"seed": 0} | dict.fromkeys(("method", "data", "strategy"), target)
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"round": 0, "x": 1}\n{"round": 1, "x": 2}\n')
    for value in (2, 3):
        tracking = Tracking(TensorBoard(), str(folder), pytest.fail, no_export)
        tracking.start("", 9)
        tracking.stop("stopped")
        (folder / "metrics.jsonl").write_text('{"round": 0, "x": 1}\n{"round": 1, "x": 3}\n')
        state = folder / "tensorboard" / "tracked.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"round": 0}))
        read = EventAccumulator(str(folder / "tensorboard")).Reload()
        points = [(e.step, make_ndarray(e.tensor_proto).item()) for e in read.Tensors("x")]
        assert points == [(0, 1), (1, value)]


def records(file: Path) -> list[Any]:
    """Read a file that W&B writes offline: 7 bytes of head, then LevelDB's log of records."""
    from wandb.proto import wandb_internal_pb2

    internal: Any = wandb_internal_pb2  # without types
    data, whole, found, at = file.read_bytes(), b"", [], 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no record begins at the end of a block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            found.append(internal.Record.FromString(whole))
            whole = b""
    return found


@pytest.fixture(scope="module")
def wandb_and_mlflow(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run with both, which takes some seconds to import and begin."""
    run = done(base, tmp_path_factory.mktemp("runs") / "run", "[wandb,mlflow]")
    assert not [p for p in psutil.Process().children() if "wandb" in p.name()]
    return run


@pytest.mark.slow
def test_wandb_writes_offline(wandb_and_mlflow: Done) -> None:
    run = wandb_and_mlflow
    files = sorted((run.path / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    parts = [records(file) for file in files]
    first, second = (next(r.run for r in part if r.HasField("run")) for part in parts)
    assert first.run_id == second.run_id
    assert first.run_group == SavedRun(run.path).hash_but_seed
    assert sorted(first.tags) == ["data=table", "method=lora", "seed=0", "strategy=fedavg"]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["method.rank"] == 8 and config["run_hash"] == SavedRun(run.path).hash
    found: dict[str, list[tuple[int, float]]] = {}
    for record in (r for part in parts for r in part if r.HasField("history")):
        for item in record.history.item:
            point = record.history.step.num, json.loads(item.value_json)
            found.setdefault(".".join(item.nested_key), []).append(point)
    same({name: points for name, points in found.items() if name[0] != "_"}, run)
    assert [r.exit.exit_code for part in parts for r in part if r.HasField("exit")] == [255, 0]
    last = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in parts[1]
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert last["status"] == "completed"
    assert last["shared_state_sha256"] == run.summary["shared_state_sha256"]


@pytest.mark.slow
def test_mlflow_keeps_numbers_and_the_model(wandb_and_mlflow: Done) -> None:
    from mlflow import MlflowClient

    run = wandb_and_mlflow
    client = MlflowClient(f"sqlite:///{run.path / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedpeft"]
    (found,) = client.search_runs([experiment.experiment_id])
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    summary = {name: history.pop(name) for name in list(history) if name.startswith("summary.")}
    same(history, run)
    assert summary["summary.final.test_loss"] == [(2, run.summary["final"]["test_loss"])]
    assert found.data.params["method.rank"] == "8"
    hash = SavedRun(run.path).hash
    assert found.data.tags.items() >= {"method": "lora", "seed": "0", "run_hash": hash}.items()
    assert (found.info.status, found.data.tags["reason"]) == ("FINISHED", "")
    folder = Path(unquote(urlparse(found.info.artifact_uri).path))
    assert json.loads((folder / "summary.json").read_text()) == run.summary
    exported = load_file(folder / "model" / "adapter_model.safetensors")
    state = load_file(run.path / "shared_state.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.lora_A"
    (ours,) = [value for key, value in state.items() if key.startswith(name)]
    assert torch.equal(exported[f"base_model.model.{name}.weight"], ours)


@pytest.mark.slow
def test_mlflow_says_why_it_keeps_no_model(base: list[str], tmp_path: Path) -> None:
    output = io.StringIO()
    given = [*base, "method=fedsa_lora", "method.rank=4", "logger=mlflow"]
    run_here([*given, f"run_dir={tmp_path / 'run'}"], Display(Console(file=output, width=400)))
    assert "note: logger=mlflow keeps no model: " in output.getvalue()
    assert "stay on the clients in this run" in output.getvalue()
