"""Malformed replies and hostile configurations, a thousand each, drawn anew from one seed."""

import json
import logging
import math
import os
import shlex
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedpeft.client.app import app
from fedpeft.client.client import answer_all
from fedpeft.config.load import load_config
from fedpeft.deployment.policy import Policy
from fedpeft.deployment.worker import _answer
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.errors import public_text
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import sha256
from fedpeft.wire import number
from tests.conftest import TOPICS
from tests.data.conftest import decoder  # noqa: F401
from tests.data.files import write_file

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """Log nothing: tracebacks of hostile texts hold surrogates, which pytest-xdist cannot send."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


THOUSAND = settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MOST_SECONDS = 20  # seconds for one example; no reply and no configuration may keep anybody busy
EACH = 100  # examples between two checks that right messages are still answered
MOST_REASON = 500 + len("evaluation: ")

# --- replies --------------------------------------------------------------------------------------

# RIGHT must be accepted and change nothing. LIKE is accepted and changes nothing, or is refused.
# FREE is within all bounds or beyond them, which its numbers decide.
RIGHT, WRONG, LIKE, FREE = "right", "wrong", "like", "free"
ROWS, STEPS = 240, 2


@dataclass
class Parts:
    """A reply in parts that a test can change.

    Attributes:
        index: index of the arrays, unpacked; null if the reply has none.
        raw: takes the place of the packed index.
        more: records that are added or take the place of others; null leaves a record out.
        error: the reply is an error with this text.
        times: number of times that the reply comes.
    """

    arrays: dict[str, Array]
    index: Any
    metrics: dict[str, Any]
    config: dict[str, Any]
    raw: bytes | None = None
    more: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    times: int = 1

    @classmethod
    def of(cls, content: RecordDict) -> "Parts":
        """Take a reply apart."""
        arrays, config = content.array_records.get("arrays"), content.config_records["config"]
        packed: Any = config.get("index")
        index = None if packed is None else json.loads(zlib.decompress(packed))
        metrics = dict(content.metric_records["metrics"])
        return cls(dict(arrays or {}), index, metrics, dict(config))

    def content(self) -> RecordDict:
        """Put the parts together."""
        records: dict[str, Any] = {"metrics": MetricRecord(self.metrics)}
        if self.index is not None:
            text = json.dumps(self.index).encode()
            packed = zlib.compress(text) if self.raw is None else self.raw
            self.config.setdefault("index", packed)
            if self.raw is not None or text != zlib.decompress(self.config["index"]):
                self.config["index"] = packed
            records["arrays"] = ArrayRecord(self.arrays)
        records["config"] = ConfigRecord(self.config)
        records |= self.more
        return RecordDict({name: r for name, r in records.items() if r is not None})


Change = Callable[[Parts], str]  # changes the parts, and tells what the server must make of them
RECORDS = ("arrays", "config", "metrics")
KINDS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: ArrayRecord({"float32": Array(np.zeros(3, dtype=np.float32))}),
    "config": lambda: ConfigRecord({"index": b"", "num-examples": 3}),
    "metrics": lambda: MetricRecord({"num-examples": 3, "index": 2.0}),
}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["\x1b[31m", "[bold]x[/data]", "\U000e0001" * 600, "\ud800", "a\nb\r\0", "x" * 10**6]
    ),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, ROWS, ROWS + 1, 2**62, -(2**62), 10**9]),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 2.5, 2.0, 1e-320, 0.0]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from([[], [1], [1.0, math.nan], [7] * 20_000]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
DTYPES = st.one_of(
    st.sampled_from(
        ["float64", "int8", "bfloat16", "complex64", "load", "__class__", "nn", "float33"]
    ),
    TEXTS,
    JSON,
)
SHAPES = st.one_of(
    st.lists(st.integers(-40, 40), max_size=4),
    st.lists(st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**33), 0, 1]), max_size=4),
    st.lists(st.one_of(st.floats(), st.text(max_size=3), st.booleans()), min_size=1, max_size=3),
    JSON,
)


def without(name: str, parts: Parts) -> str:
    parts.more[name] = None
    return WRONG if parts.index is not None or name == "metrics" else RIGHT


def renamed(name: str, other: str, parts: Parts) -> str:
    parts.more[other] = parts.content().get(name)
    return without(name, parts) if other != name else RIGHT


def of_kind(name: str, kind: str, parts: Parts) -> str:
    parts.more[name] = KINDS[kind]()
    return WRONG if parts.index is not None or name == "metrics" else RIGHT


def empty(parts: Parts) -> str:
    parts.more |= dict.fromkeys(RECORDS)
    return WRONG


def extra(name: str, size: int, parts: Parts) -> str:
    parts.more[f"more {len(parts.more)} {name}"] = ArrayRecord(
        {"x": Array(np.zeros(size, dtype=np.float32))}
    )
    return RIGHT if size < 1 << 16 else WRONG


def extra_metric(name: str, value: Any, parts: Parts) -> str:
    if name in parts.metrics:
        return RIGHT
    parts.metrics[name] = value
    return RIGHT if not name.startswith(("validation_", "test_")) else FREE


def extra_config(value: Any, parts: Parts) -> str:
    parts.config |= {"overrides": value, "folder": "/", "restarted": value, "kept": value}
    return RIGHT


def failed(text: str, parts: Parts) -> str:
    parts.error = text
    return WRONG


def twice(parts: Parts) -> str:
    parts.times = 2
    return WRONG


def silent(parts: Parts) -> str:
    parts.times = 0
    return WRONG


def counted(key: str, value: Any, parts: Parts) -> str:
    parts.metrics[key] = value
    most = STEPS if key == "num-steps" else ROWS
    if type(value) is not int or not 1 <= value <= most:
        return WRONG
    return FREE


def lossy(value: Any, parts: Parts) -> str:
    parts.metrics["loss"] = value
    return FREE if type(value) is float and math.isfinite(value) else WRONG


def lacking(key: str, parts: Parts) -> str:
    parts.metrics.pop(key)
    return WRONG


def raw_index(index: bytes, parts: Parts) -> str:
    parts.raw = index
    return WRONG


def cut_index(share: float, parts: Parts) -> str:
    whole = parts.config["index"]
    parts.raw = whole[: int(share * len(whole))]
    return LIKE  # without its checksum alone, it still names all arrays


def flipped_index(share: float, bit: int, parts: Parts) -> str:
    whole = bytearray(parts.config["index"])
    whole[int(share * (len(whole) - 1))] ^= 1 << bit
    parts.raw = bytes(whole)
    return LIKE


def entry(place: int, part: int, value: Any, parts: Parts) -> str:
    chosen = parts.index[place % len(parts.index)]
    same, chosen[part] = json.dumps(chosen[part]) == json.dumps(value), value
    if same:
        return RIGHT
    return LIKE if part == 2 and _plain(value) == _plain(chosen[part]) else WRONG


def _plain(shape: Any) -> Any:
    return [float(n) for n in shape] if isinstance(shape, list) and _numbers(shape) else None


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def entries(change: str, value: Any, parts: Parts) -> str:
    index = parts.index
    match change:
        case "all":
            parts.index = value if value is not None else 0
        case "add":
            index.append(value)
        case "again":
            index.append(index[0])
        case "drop":
            index.pop()
        case "nothing":
            index.insert(0, [index[0][0], "float32", [0]])
            return LIKE
        case "unknown":
            index.append([str(value), "float32", [0]])
        case "deep":
            parts.raw = zlib.compress(b"[" * 100_000)
    return WRONG


def array(change: str, parts: Parts) -> str:
    flat = parts.arrays["float32"].numpy()
    if change in ("float64", "float16", "int32", "int8", "complex64", "U3", "datetime64[s]", ">f4"):
        parts.arrays["float32"] = Array(flat.astype(change))
    elif change == "objects":
        parts.arrays["float32"] = _saved(np.array([Trap()] * flat.size, dtype=object))
    elif change == "short":
        parts.arrays["float32"] = Array(flat[:-1].copy())
    elif change == "long":
        parts.arrays["float32"] = Array(np.append(flat, flat[:1]))
    elif change == "scalar":
        parts.arrays["float32"] = Array(np.array(flat[0]))
    elif change == "empty":
        parts.arrays["float32"] = Array(flat[:0].copy())
    elif change == "other name":
        parts.arrays["float64"] = parts.arrays.pop("float32")
    elif change == "one more":
        parts.arrays["float64"] = Array(np.zeros(2))
    elif change == "one more, empty":
        parts.arrays["nothing"] = Array(np.zeros(0))
        return LIKE
    elif change == "column":
        parts.arrays["float32"] = Array(flat.reshape(-1, 1))
        return LIKE
    elif change == "none":
        parts.arrays.clear()
    return WRONG


class Trap:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def _saved(value: np.ndarray) -> Array:
    file = BytesIO()
    np.save(file, value, allow_pickle=True)
    return Array("float32", tuple(value.shape), "numpy.ndarray", file.getvalue())


def array_bytes(share: float, more: bytes, stype: str, parts: Parts) -> str:
    old = parts.arrays["float32"]
    data = old.data[: int(share * len(old.data))] + more
    parts.arrays["float32"] = Array(old.dtype, old.shape, stype, data)
    return LIKE


def header(shape: list[int], dtype: str, parts: Parts) -> str:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
    parts.arrays["float32"] = Array("float32", (1,), "numpy.ndarray", data)
    return WRONG


def value(place: int, number: float, parts: Parts) -> str:
    flat = parts.arrays["float32"].numpy().copy()
    with np.errstate(over="ignore"):
        flat[place % flat.size] = number
    parts.arrays["float32"] = Array(flat)
    return FREE if abs(number) < 1e6 else WRONG


COMMON = st.one_of(
    st.builds(partial, st.just(without), st.sampled_from(RECORDS)),
    st.builds(partial, st.just(renamed), st.sampled_from(RECORDS), st.text(max_size=8)),
    st.builds(partial, st.just(of_kind), st.just("arrays"), st.sampled_from(("config", "metrics"))),
    st.builds(partial, st.just(of_kind), st.just("config"), st.sampled_from(("arrays", "metrics"))),
    st.builds(partial, st.just(of_kind), st.just("metrics"), st.sampled_from(("arrays", "config"))),
    st.sampled_from((empty, twice, silent)),
    st.builds(partial, st.just(failed), TEXTS),
)
HARMLESS = st.one_of(
    st.builds(partial, st.just(extra), st.text(max_size=9), st.sampled_from([0, 9, 999, 1 << 19])),
    st.builds(partial, st.just(extra_metric), st.text(max_size=9).map("a{}".format), NUMBERS),
    st.builds(partial, st.just(extra_config), st.sampled_from(["", "yes", 1, 0.5, b"", [2]])),
)
PLACES, SHARES = st.integers(0, 999), st.floats(0, 0.999)
TRAINING = st.one_of(
    COMMON,
    st.builds(partial, st.just(counted), st.sampled_from(("num-examples", "num-steps")), NUMBERS),
    st.builds(partial, st.just(lossy), NUMBERS),
    st.builds(partial, st.just(lacking), st.sampled_from(("num-examples", "num-steps", "loss"))),
    st.builds(partial, st.just(raw_index), st.binary(max_size=40)),
    st.builds(
        partial, st.just(raw_index), JSON.map(lambda v: zlib.compress(json.dumps(v).encode()))
    ),
    st.just(partial(raw_index, zlib.compress(b"[" + b" " * (1 << 24)))),
    st.builds(partial, st.just(cut_index), SHARES),
    st.builds(partial, st.just(flipped_index), SHARES, st.integers(0, 7)),
    st.builds(partial, st.just(entry), PLACES, st.just(0), st.one_of(TEXTS, JSON)),
    st.builds(partial, st.just(entry), PLACES, st.just(1), DTYPES),
    st.builds(partial, st.just(entry), PLACES, st.just(2), SHAPES),
    st.builds(
        partial,
        st.just(entries),
        st.sampled_from(("all", "add", "again", "drop", "nothing", "unknown", "deep")),
        JSON,
    ),
    st.builds(
        partial,
        st.just(array),
        st.sampled_from(
            ("float64", "float16", "int32", "int8", "complex64", "U3", "datetime64[s]", ">f4")
            + ("objects", "short", "long", "scalar", "empty", "other name", "one more")
            + ("one more, empty", "column", "none")
        ),
    ),
    st.builds(
        partial,
        st.just(array_bytes),
        st.floats(0, 1),
        st.binary(max_size=20),
        st.sampled_from(("numpy.ndarray", "torch", "pickle", "")),
    ),
    st.builds(
        partial,
        st.just(header),
        st.lists(st.sampled_from([0, 1, 2**31, 2**40, 2**62, -1]), max_size=3),
        st.sampled_from(["<f4", "<f8", "|O", "|V0", "<U9", "x"]),
    ),
    st.builds(
        partial,
        st.just(value),
        PLACES,
        st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -3e38, 1e6, 0.0, 0.5, -1.0]),
    ),
)
MEASURES = [f"{s}_{m}" for s in ("validation", "test") for m in ("loss", "accuracy", "baseline")]
ROW_COUNTS = ("validation-num-examples", "test-num-examples")


def measured(key: str, number: Any, parts: Parts) -> str:
    parts.metrics[key] = number
    if key in ROW_COUNTS:
        return counted(key, number, parts)
    least, most = (0, 1e6) if key.endswith("loss") else (-1, 1)
    return FREE if not isinstance(number, list) and least <= number <= most else WRONG


EVALUATION = st.one_of(
    COMMON,
    st.builds(partial, st.just(measured), st.sampled_from([*MEASURES, *ROW_COUNTS]), NUMBERS),
    st.builds(partial, st.just(lacking), st.sampled_from(ROW_COUNTS)),
)


class Server:
    """A server of three clients whose right replies are known.

    Args:
        base: overrides of a tiny run.
    """

    def __init__(self, base: list[str]) -> None:
        self.overrides = [*base, "evaluation.clients=always", "evaluation.interference=false"]
        self.engine = Engine(load_config(self.overrides))
        self.grid = InProcessGrid(3)
        self.right = {kind: self._right(kind) for kind in ("train", "evaluate")}
        self._expected: dict[object, object] = {}

    def begin(self, kind: str) -> tuple[FederatedPEFT, list[Message]]:
        """Return a new server and its messages of round 1."""
        strategy = FederatedPEFT(self.overrides, self.engine)
        configure = strategy.configure_train if kind == "train" else strategy.configure_evaluate
        strategy.nodes.join(self.grid)
        messages = list(configure(1, strategy.initial_arrays(), ConfigRecord(), self.grid))
        for client, message in enumerate(messages):
            number(message, str(client))
        return strategy, messages

    def _right(self, kind: str) -> list[RecordDict]:
        _, messages = self.begin(kind)
        contexts = [self.grid.context(m.metadata.dst_node_id) for m in messages]
        replies = answer_all(messages, contexts, self.engine)
        return [reply.content for reply in replies if isinstance(reply, Message)]

    def round(
        self, kind: str, replies: dict[int, list[RecordDict | Error]]
    ) -> tuple[FederatedPEFT, object]:
        """Run round 1 with these replies, in their order; return what the round made."""
        strategy, messages = self.begin(kind)
        came = [Message(r, reply_to=messages[c]) for c, some in replies.items() for r in some]
        if kind == "train":
            _, metrics = strategy.aggregate_train(1, came)
            return strategy, (sha256(strategy.state), dict(metrics or {}), strategy.seen.weights)
        return strategy, dict(strategy.aggregate_evaluate(1, came) or {})

    def expected(self, kind: str, clients: Iterable[int]) -> object:
        """Return what a round makes of these clients' right replies alone."""
        key = kind, *sorted(clients)
        if key not in self._expected:
            right: dict[int, list[RecordDict | Error]] = {
                c: [self.right[kind][c]] for c in sorted(clients)
            }
            self._expected[key] = self.round(kind, right)[1]
        return self._expected[key]


@pytest.fixture(scope="module")
def server(base: list[str]) -> Server:
    return Server(base)


def check_round(
    server: Server, kind: str, client: int, harmless: list[Change], change: Change
) -> None:
    """Change one of three replies, and compare the round with one of right replies alone."""
    parts, begun = Parts.of(server.right[kind][client]), time.monotonic()
    verdicts = {c(parts) for c in (*harmless, change)}
    replies: dict[int, list[RecordDict | Error]] = {c: [server.right[kind][c]] for c in range(3)}
    reply = parts.content() if parts.error is None else Error(0, parts.error)
    replies[client] = [reply] * parts.times
    strategy, made = server.round(kind, dict(sorted(replies.items(), key=lambda r: r[0] != client)))
    seen, two = strategy.seen, server.expected(kind, {0, 1, 2} - {client})
    assert seen.refused.keys() <= {client}
    if reason := seen.refused.get(client):
        assert reason.isprintable() and len(reason) <= MOST_REASON
        assert verdicts != {RIGHT} and made == two
        assert client not in seen.weights and seen.last.outcome(client) in ("refused", "late")
    else:
        assert WRONG not in verdicts, reason
        assert FREE in verdicts or made == server.expected(kind, range(3))
        assert all(bool(v.isfinite().all()) for v in strategy.state.values())
    line = {"metrics": made, "refused": {str(c): r for c, r in seen.refused.items()}}
    assert json.dumps(line | seen.traffic | seen.last.counts(), allow_nan=False)
    assert time.monotonic() - begun < MOST_SECONDS


CLIENTS, FEW = st.integers(0, 2), st.lists(HARMLESS, max_size=1)


@THOUSAND
@given(client=CLIENTS, harmless=FEW, change=TRAINING | HARMLESS)
@example(1, [], twice)
@example(1, [], partial(entry, 0, 1, "\x1b[31m"))
@example(1, [], partial(failed, "\U000e0001" * 600))
def test_a_malformed_reply_to_training(
    server: Server, client: int, harmless: list[Change], change: Change
) -> None:
    check_round(server, "train", client, harmless, change)


@THOUSAND
@given(client=CLIENTS, harmless=FEW, change=EVALUATION | HARMLESS)
@example(2, [], partial(failed, "\U000e0001" * 600))
def test_a_malformed_reply_to_evaluation(
    server: Server, client: int, harmless: list[Change], change: Change
) -> None:
    check_round(server, "evaluate", client, harmless, change)


# --- configurations -------------------------------------------------------------------------------

SECRET = "Zq7secret"  # each place has one of its own, which begins so
VARIABLE = "FEDPEFT_TEST_PASSWORD"


class Site:
    """A node with secrets in its environment, in files, in each of its rows and in its policy.

    Of five labels no row has the last one. Its name is a secret where the site has its own list.

    Args:
        base: overrides of a tiny run.
        folder: takes rows, secrets and kept states; empty.
        llama: folder of a tiny causal language model.
    """

    def __init__(self, base: list[str], folder: Path, llama: Path) -> None:
        self.llama = llama
        self.folder, self.rows, self.state = folder, folder / "rows", folder / "state"
        self.rows.mkdir()
        for split, count in (("train", 60), ("validation", 12), ("test", 12)):
            labels = [list(TOPICS)[i % 4] for i in range(count)]
            rows = [{"text": f"{SECRET}row{i} bread", "label": v} for i, v in enumerate(labels)]
            write_file(self.rows / f"{split}.parquet", rows)
        for end, text in FILES.items():
            (folder / f"password{end}").write_text(text)
        path, labels = f"data.path={self.rows}", ",".join(TOPICS)
        self.overrides = [*base, "method=fedsa_lora", path, f"data.labels=[{labels},other]"]
        own = [*(o for o in base if o.startswith(("model", "data"))), path]
        self.policy = Policy([*own, f"data.labels=[{labels},{SECRET}label]"])
        self.count = 0
        self.right = self._right()
        self.files = self._files()
        self.answers = {door: self._answers(door) for door in DOORS}

    def _right(self) -> dict[str, RecordDict]:
        """Return a right message of each kind."""
        strategy = FederatedPEFT(self.overrides)
        strategy.nodes.of = dict.fromkeys(range(3), 1)
        strategy.nodes.join = lambda *_: None  # type: ignore[method-assign]
        arrays, config, grid = strategy.initial_arrays(), ConfigRecord(), InProcessGrid(3)
        train, *_ = strategy.configure_train(1, arrays, config, grid)
        evaluate, *_ = strategy.configure_evaluate(1, arrays, config, grid)
        query = {"config": ConfigRecord({"overrides": strategy.overrides})}
        return {
            "train": train.content,
            "evaluate": evaluate.content,
            "query": RecordDict({**query}),
        }

    def ask(self, door: str, kind: str, content: RecordDict) -> Message:
        """Return the reply to a message, which comes through one of the doors."""
        message = Message(content, 1, kind)
        number(message, "1")
        node = {"partition-id": 0, "state-folder": str(self.state / door)}
        if door == "own rows":
            node["data-path"] = str(self.rows)
        context = Context(1, 1, {**node}, RecordDict(), {})
        if door == "policy":
            return _answer(self.policy, message, context)
        return app(message, context)

    def _answers(self, door: str) -> dict[str, bytes]:
        """Return all bytes of the replies to right messages; free memory changes a query's."""
        kinds = ("train", "evaluate")
        replies = {kind: self.ask(door, kind, copied(self.right[kind])) for kind in kinds}
        for reply in replies.values():
            del reply.content.metric_records["metrics"]["seconds"]  # seconds differ each time
        return {kind: sent_bytes(reply) for kind, reply in replies.items()}

    def unchanged(self, door: str) -> bool:
        """Tell whether right messages are still answered with the same bits."""
        return self._answers(door) == self.answers[door]

    def _files(self) -> dict[str, int]:
        """Return time of change by path, of all files but kept states."""
        here = [p for f in (self.folder, Path.cwd()) for p in f.rglob("*")]
        return {str(p): p.stat().st_mtime_ns for p in here if p.is_file() and self._other(p)}

    def _other(self, path: Path) -> bool:
        return self.state not in path.parents

    def left_nothing(self) -> bool:
        """Tell whether no file was made or changed outside of the folder for kept states."""
        return self._files() == self.files


DOORS = ("app", "policy", "own rows")
FILES = {
    "": f"{SECRET}file\n",
    ".txt": f"{SECRET}file\n" * 9,
    ".json": json.dumps([{"text": f"{SECRET}file", "label": f"{SECRET}file"}] * 9),
    ".yaml": f"_target_: {SECRET}file\nprecision: {SECRET}file\n{SECRET}file: 1\n",
    ".csv": f"text,label\n{SECRET}file,{SECRET}file\n",
}


def copied(content: RecordDict) -> RecordDict:
    """Copy a content so far that its configuration can be changed."""
    config = dict(content.config_records["config"])
    return RecordDict({**content, "config": ConfigRecord({**config})})


def sent_bytes(reply: Message) -> bytes:
    """Return all bytes of a reply, its index unpacked."""
    if reply.has_error():
        return str(reply.error).encode(errors="surrogatepass")
    index: Any = reply.content.config_records.get("config", {}).get("index")
    parts = [part.deflate() for _, part in sorted(get_all_nested_objects(reply.content).items())]
    return b"".join([*parts, zlib.decompress(index) if index else b""])


@pytest.fixture(scope="module")
def site(
    base: list[str],
    decoder: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{SECRET}environment")
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        open_engine.cache_clear()
        yield Site(base, tmp_path_factory.mktemp("site"), decoder)
        open_engine.cache_clear()


KEYS = st.sampled_from(
    ["lr", "seed", "num_rounds", "num_clients", "local_steps", "local_epochs", "batch_size"]
    + ["clients_per_round", "accumulate", "precision", "layers", "personal", "frozen", "bucketing"]
    + ["method.rank", "method.alpha", "method.dropout", "data.path", "data.text", "data.label"]
    + ["data.labels", "data.metrics", "data.max_length", "data.train_split", "data.pair"]
    + ["model.path", "model.sha256", "model.random", "model.architecture", "model.settings"]
    + ["partition.alpha", "partition.min_size", "partition.file", "strategy.max_weight"]
    + ["strategy.max_norm_ratio", "runtime.device", "runtime.threads", "runtime.kind", "runtime"]
    + ["evaluation.batch_size", "evaluation.max_tokens", "evaluation.clients", "optimizer.name"]
    + ["optimizer.warmup", "optimizer", "model", "data", "partition", "strategy", "compression"]
    + ["method", "experiment", "checkpoint", "run_dir", "nothing", "method._target_"]
    + ["data._target_", "model._target_", "partition._target_", "strategy._target_"]
    + ["data.prompt", "data.answer", "model.chat_template", "data.labels.x", "data.labels.0"]
    + ["data.path.x", "data.text.0", "model.path.x"]
)
HOSTILE = st.sampled_from(
    [str(10**30), str(10**18), "-1", "0", "1e999", "-1e308", "nan", "inf", "null", "true", "''"]
    + ["[]", "{}", "[[]]", "{a:{b:c}}", "[1,x,null]", "1,2", "range(1,9)", "glob(*)", "choice(1,2)"]
    + ["builtins.exec", "os.system", "subprocess.Popen", "fedpeft.cli.main", "fedpeft.cli.sys.exit"]
    + ["fedpeft.deployment.worker.os.system", "fedpeft.files.Path", "fedpeft..x", "fedpeft."]
    + ["fedpeft.server.app.app", "fedpeft.methods.lora.LoRA", "fedpeft.deployment.policy.Policy"]
    + ["'{{ self.__init__.__globals__ }}'", "'{{ cycler.__init__.__globals__.os.environ }}'"]
    + ["'{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}'"]
    + [
        "/proc/self/environ",
        "/etc/hostname",
        "/",
        "~",
        ".",
        "..",
        "$HOME",
        f"${VARIABLE}",
        "[" * 90,
    ]
)
ENDS = st.sampled_from([*FILES, "/", "/..", "/x"])
SOUP = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="${}[]()=,.:+~@/\\'\" ab01\n", max_size=40),
    st.sampled_from(
        ["(" * 400, "{a:" * 400, "\0", "\ud800", "x" * 10**6, "[" * 10**6, "1" * 10**6]
    ),
)
BETWEEN = st.sampled_from(["", "", "", "\\", "''", '""', " ", "\\\\"])
RESOLVED = st.sampled_from(["oc.env", "oc.decode", "oc.select", "oc.dict.values", "now", "hydra"])
QUOTES: list[Callable[[str], str]] = [
    *(shlex.quote, str, "'{}'".format, '"{}"'.format),
    lambda text: shlex.quote(f"'{text}'") if "=" not in text else text,
]


@st.composite
def interpolation(draw: st.DrawFn) -> str:
    """Spell a reference to a secret, with quotes and escapes in between."""
    inner = draw(st.sampled_from([VARIABLE, f"{VARIABLE},x", "${oc.env:" + VARIABLE + "}"]))
    parts = ["$", "{", draw(RESOLVED), ":", inner, "}"]
    return "".join(part + draw(BETWEEN) for part in parts)


@st.composite
def path(draw: st.DrawFn) -> str:
    """Name a planted file, also from the folder of a group of the configuration."""
    up = draw(st.sampled_from(["", "..", "../..", "../" * 12, "file://", "/proc/self/cwd/"]))
    return f"{up}PLANTED/password{draw(ENDS)}"


@st.composite
def override(draw: st.DrawFn) -> str:
    """Write one override as it stands in a message."""
    key = draw(KEYS)
    if draw(st.integers(0, 9)) == 0:
        key = draw(
            st.sampled_from(
                ["hydra.searchpath", "hydra/launcher", "hydra", "model@hydra", "@", "~"]
            )
        )
    sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    package = draw(st.sampled_from(["", "", "", "", "@_global_", "@a.b", "@"]))
    value = draw(HOSTILE | interpolation() | path() | interpolation() | path() | SOUP)
    return draw(st.sampled_from(QUOTES))(f"{sign}{key}{package}={value}")


# An instruction task on the site's rows, which a decoder of its own learns.
TEMPLATED = (
    "model.path=DECODER data=instructions data.path=PLANTED/rows data.answer=label "
    "'data.prompt={{ text }}' num_clients=1 partition=iid"
)
RENDERED = st.sampled_from(
    ["{{ text }}", "{{ text }}{{ 1 / 0 }}", "{{ text.x.y }}", "{{ text | int / 0 }}", "{{ other }}"]
    + ["{{ text[99999] + 1 }}", "{{ text.__class__.__mro__ }}", "{{ raise_exception(text) }}"]
    + ["{{ [][text] }}", "{{ text.format(x=1) }}", "{{ text % text }}", "{% include text %}"]
    + ["{{ messages[0].content }}{{ {}[messages[0].content] }}", "{{ text", "{% for %}"]
)
TEMPLATES = st.builds(
    lambda key, template: f"{TEMPLATED} {shlex.quote(f'{key}={template}')}",
    st.sampled_from(["data.prompt", "data.prompt", "data.answer", "model.chat_template"]),
    RENDERED,
)
NO_MODEL = "model=local model.path=/nowhere"  # because the default's is large
FIELDS = ("round", "generation", "oldest", "best", "run", "index", "overrides")
VALUES = st.one_of(
    st.sampled_from([-1, 0, 2, 3, 10**6, 2**62, -(2**62), 1.5, math.nan, True, "", "1", b"1"]),
    st.sampled_from(["../../x", "/x", "0" * 16, "../" * 9 + "x", ".", "a" * 15 + "/", "\0" * 16]),
    st.sampled_from([[], [1], ["x"], [b"x"], [1.5], b"\0" * 99, "0" * 17, "A" * 16, "ff\n" * 5]),
    st.text(max_size=16),
    st.sampled_from([zlib.compress(b"[" * 9999), zlib.compress(b" " * (1 << 24))]),
)
# Overrides after or in place of the right ones, or other values of other fields.
ADDED = st.lists(override() | SOUP, min_size=1, max_size=3).map(" ".join)
SENT = st.one_of(
    st.tuples(st.just("add"), ADDED),
    st.tuples(st.just("add"), ADDED),
    st.tuples(st.just("add"), ADDED),
    st.tuples(st.just("all"), ADDED | TEMPLATES),
    st.tuples(st.sampled_from(FIELDS), VALUES),
)


def spoiled(site: Site, kind: str, change: str, value: Any) -> RecordDict:
    """Return a message that one change makes hostile."""
    content = copied(site.right[kind])
    config: Any = content.config_records["config"]
    if change in ("add", "all"):
        text = value.replace("PLANTED", str(site.folder)).replace("DECODER", str(site.llama))
        start = NO_MODEL if change == "all" else config["overrides"]
        config["overrides"] = f"{start} {text}"
    else:
        config[change] = NO_MODEL if change == "overrides" and not str(value).strip() else value
    return content


@THOUSAND
@given(door=st.sampled_from(DOORS), kind=st.sampled_from(["train", "evaluate", "query"]), sent=SENT)
@example("app", "train", ("add", f'precision=$"{{oc.env:{VARIABLE}}}"'))
@example("app", "train", ("add", f"precision=$\\{{oc.env:{VARIABLE}}}"))
@example("app", "train", ("add", f"'precision=$\\{{oc.env\\:{VARIABLE}\\}}'"))
@example("policy", "train", ("add", f"'strategy=$\\{{oc.env\\:{VARIABLE}\\}}'"))
@example("app", "evaluate", ("add", "model=" + "../" * 12 + "PLANTED/password"))
@example("app", "train", ("add", "+experiment@_global_=" + "../" * 12 + "PLANTED/password"))
@example("policy", "train", ("add", "+experiment@_global_=" + "../" * 12 + "PLANTED/password"))
@example("policy", "train", ("add", "data.labels.x=1"))
@example("policy", "evaluate", ("add", "+data.labels.0=9"))
@example("policy", "query", ("add", "data.path.x=1 ~data"))
@example("own rows", "query", ("all", TEMPLATED))
@example("own rows", "query", ("all", f"{TEMPLATED} 'data.prompt={{{{ text | int / 0 }}}}'"))
@example("own rows", "query", ("all", f"{TEMPLATED} 'model.chat_template={{{{ [][text] }}}}'"))
@example("policy", "query", ("all", TEMPLATED))
@example("app", "train", ("add", "lr='" + "x" * 10**6 + "'"))
@example("app", "train", ("round", 10**9))
@example("app", "evaluate", ("round", 10**9))
def test_a_hostile_configuration(site: Site, door: str, kind: str, sent: tuple[str, Any]) -> None:
    begun = time.monotonic()
    try:
        leaves = sent_bytes(site.ask(door, kind, spoiled(site, kind, *sent)))
    except Exception as error:  # as the worker of a site does, or as Flower does with the app's
        assert door == "policy" or error.__cause__ is None
        shown = [public_text(error)] if door == "policy" else traceback.format_exception_only(error)
        leaves = "".join(shown).encode(errors="replace")
    assert SECRET.lower().encode() not in leaves.lower()
    assert site.left_nothing()
    assert time.monotonic() - begun < MOST_SECONDS
    site.count += 1
    if site.count % EACH == 0:
        assert site.unchanged(door)


@pytest.mark.parametrize("door", DOORS)
def test_right_messages_are_answered_as_before(site: Site, door: str) -> None:
    assert site.unchanged(door)
