"""A tiny BERT, a table that it can learn, runs on both, and helpers of several test files."""

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of the hub's clients: no network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from flwr.app import Context, Message
from rich.console import Console

from fedpeft import cli
from fedpeft.client.app import app as client_app
from fedpeft.client.client import Kept
from fedpeft.client.store import store_of
from fedpeft.config.load import load_config
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.engine.plan import Job
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server.app import serve
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import State
from fedpeft.wire import unpack
from tests.expected.methods import TINY
from tests.grids import one_by_one

# A shell that starts the tests in the background lets them, and their programs, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FEDPEFT_TEST_DATA") or ROOT.parent / "shared")
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} with real data is not there (FEDPEFT_TEST_DATA names it)"
)
TOPICS = {
    "food": "bread cheese apple soup salt oven plate spoon",
    "music": "violin song drum choir melody piano concert rhythm",
    "sport": "goal team runner match referee stadium medal race",
    "weather": "rain cloud storm wind snow sunny frost thunder",
}
COMMON = (
    "the a an of to in on with and then was were is are very quite old new small large first last "
    "near far after before people saw heard made found took gave day night week year city house"
)
ROWS = {"train": 240, "validation": 40, "test": 40}
Answer = Callable[[Message, Context], Message]
MOST_TENSORS = 1000  # tensors of a message of the tiny models


def sentences(label: str, rows: int, rng: random.Random) -> list[str]:
    """Draw texts of 4 to 24 words; a third of the words are the label's."""
    topic, common = TOPICS[label].split(), COMMON.split()
    return [
        " ".join(rng.choice(topic if rng.random() < 0.35 else common) for _ in range(length - 1))
        + " "
        + rng.choice(topic)
        for length in (rng.randint(4, 24) for _ in range(rows))
    ]


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let nothing be read from or left in this machine's caches.

    All processes of a session share one cache, because the docstrings take half a minute to build.
    """
    import datasets.config
    from transformers.utils import logging

    folder = tmp_path_factory.getbasetemp()
    session = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["FEDPEFT_CACHE"] = str(session / "cache")
    os.environ["FEDPEFT_STATE"] = str(tmp_path_factory.mktemp("state"))
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of hidden size 32, two layers, with random weights and a tokenizer of whole words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({w for text in (*TOPICS.values(), COMMON) for w in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files of train, validation and test: a text and its topic, one of four."""
    import datasets

    folder, rng = tmp_path_factory.mktemp("table"), random.Random(3)
    for split, count in ROWS.items():
        rows = [(t, label) for label in TOPICS for t in sentences(label, count // 4, rng)]
        rng.shuffle(rows)
        columns = {"text": [t for t, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture(scope="session")
def base(checkpoint: Path, table: Path) -> list[str]:
    """The overrides of a run that takes well under a second."""
    return [
        "model=local",
        f"model.path={checkpoint}",
        "data=table",
        f"data.path={table}",
        "runtime=inprocess",
        "num_clients=3",
        "num_rounds=2",
        "local_steps=2",
        "batch_size=8",
        "method=lora",
    ]


@dataclass
class Sent:
    """One message and its reply, as the client's node saw them."""

    kind: str
    client: int
    round: int
    down: Message
    up: Message

    def down_state(self) -> State:
        """Return the tensors that the client received."""
        return state_of(self.down)

    def up_state(self) -> State:
        """Return the tensors that the client sent."""
        return state_of(self.up)


@dataclass
class Recorder:
    """Stands before the client app: notes each exchange, and lets a test answer in its place.

    Args:
        answer: answers a node's messages; the client app by default.
    """

    answer: Answer = client_app
    exchanges: list[Sent] = field(default_factory=list)
    client: int = -1  # the client that is working now
    round: int = -1
    kind: str = ""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message and note both; the grid answers queries without it."""
        self.kind = message.metadata.message_type
        self.client = int(context.node_config.get("partition-id", -1))
        config = message.content.config_records.get("config")
        self.round = -1 if config is None else int(config["round"])  # type: ignore[arg-type]
        reply = self.answer(message=message, context=context)  # type: ignore[call-arg]
        self.exchanges.append(Sent(self.kind, self.client, self.round, message, reply))
        return reply

    def of(self, kind: str, round: int | None = None) -> list[Sent]:
        """Return the exchanges of a kind, in the order in which they ran."""
        return [e for e in self.exchanges if e.kind == kind and round in (None, e.round)]


def state_of(message: Message) -> State:
    """Return the tensors that a message carries; empty if it carries none."""
    content = message.content
    if "arrays" not in content.array_records:
        return {}
    index = content.config_records["config"]["index"]
    assert isinstance(index, bytes)
    return unpack(content.array_records["arrays"], index, MOST_TENSORS)


def value_of(key: str, overrides: Iterable[str]) -> str:
    """Return the last value that overrides give a key."""
    return [o for o in overrides if o.startswith(f"{key}=")][-1].removeprefix(f"{key}=")


def with_fields(base: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Join overrides, and put what the tiny model needs for their method in the middle.

    Args:
        base: first overrides; they name a method.
        overrides: last overrides; they may name another method.
    """
    return [*base, *TINY.get(value_of("method", [*base, *overrides]), []), *overrides]


@dataclass
class Runner:
    """Runs configurations in this process, each on an engine of its own."""

    base: list[str]
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)
    count: int = 0

    def __call__(
        self, *overrides: str, answer: Answer = client_app, grid: type = InProcessGrid
    ) -> dict[str, Any]:
        """Run a configuration and return its summary; ``recorder`` then holds the messages.

        Args:
            overrides: come after ``base`` and after the overrides that the method needs.
            answer: takes the client app's place.
            grid: a kind of ``InProcessGrid``.
        """
        if not any(o.startswith("run_dir=") for o in overrides):
            self.count += 1
            overrides = (*overrides, f"run_dir={self.folder / f'run{self.count}'}")
        whole = with_fields(self.base, overrides)
        self.run_dir = Path(value_of("run_dir", whole))
        self.recorder = Recorder(answer)
        open_engine.cache_clear()
        nodes = grid(int(value_of("num_clients", whole)), one_by_one(self.recorder))
        return serve(nodes, whole, quiet())

    def lines(self) -> list[dict[str, Any]]:
        """Read the last run's metrics.jsonl."""
        return read_metrics(self.run_dir)

    def saved(self, name: str = "shared_state") -> State:
        """Load a state that the last run saved."""
        from safetensors.torch import load_file

        return load_file(self.run_dir / f"{name}.safetensors")


def newest(context: Context, message: Message) -> Kept:
    """Return what the client of a message last kept; empty if nothing was."""
    client = int(context.node_config["partition-id"])
    store = store_of(context, str(message.content.config_records["config"]["run"]), client)
    return Kept.parted(store.load(store.generations[-1]) if store.generations else {})


def job_of(engine: Engine, client: int, round: int = 1) -> Job:
    """Return a client's job in a round that starts from the initial values."""
    at = engine.replica.roles.at(round, client)
    start = engine.replica.values(at=at)
    return Job(at, start, (engine.config.method.term(at, start, {}),))


def without_time(value: Any) -> Any:
    """Drop what may differ between equal runs."""
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k not in ("seconds", "run_dir")}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def quiet() -> Display:
    """Return a display on no terminal."""
    return Display(Console(file=io.StringIO()))


class Stopping(Display):
    """Stops a run when a round ends, before its checkpoint, as Ctrl-C does."""

    def __init__(self, round: int) -> None:
        super().__init__(Console(quiet=True))
        self.stop_at = round

    def round_done(self, line: Any) -> None:
        if line["round"] == self.stop_at:
            raise KeyboardInterrupt


def cut(file: Path) -> None:
    """Leave out the end of a file, as a crash of the machine may."""
    file.write_bytes(file.read_bytes()[:-3])


@pytest.fixture
def run(base: list[str], tmp_path: Path) -> Runner:
    """``run("method=scl", ...)`` gives the summary of a run in process."""
    return Runner(base, tmp_path)


@pytest.fixture
def opened(base: list[str]) -> Callable[..., Engine]:
    """``opened("method=scl", ...)`` gives a new engine."""
    return lambda *overrides: Engine(load_config(with_fields(base, overrides)))


@pytest.fixture
def fedpeft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """``fedpeft("run", ...)`` gives what the command prints, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["fedpeft", *arguments])
        cli.main()
        return capsys.readouterr().out

    return main


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in the project's folder.

    Args:
        arguments: the program's name and its arguments.
        environment: variables that are set beside this process's own.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        env=os.environ | {"PATH": path} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def mixed() -> State:
    """Return tensors of every dtype that a state can have, out of order."""
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4),
        "a.half": torch.randn(2, 5).to(torch.bfloat16),
        "count": torch.tensor([[-(2**40)], [7]]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "a.weight": torch.randn(4).double(),
        "half": torch.randn(2).half(),
        "extremes": torch.tensor([0.0, -0.0, 3.4e38, 1e-45]),
    }
