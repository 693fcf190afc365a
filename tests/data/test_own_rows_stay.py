"""No value of a client's own rows leaves it in the text of an error."""

import gc
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft.client.app import app as client_app
from fedpeft.config.overrides import join, split
from fedpeft.errors import PartlyPublic, public_text
from tests.conftest import TOPICS, Runner, Sent
from tests.data.files import Rows, image, write_file

SECRET, NUMBER = "SECRET-471193", 471193
FORMS = ("secret", "471193", "\\x53\\x45", "U0VDUkVU")  # as text, number, escapes, base64


def hides(text: str) -> bool:
    """Tell whether a text holds no form of the secret."""
    return not any(form.lower() in text.lower() for form in FORMS)


# --- the rule -----------------------------------------------------------------------------------

LOGGED = "this node's log has the text"
RULE = {
    "a sentence of ours": ("raise ValueError('row 0 is bad')", "row 0 is bad"),
    "through a with": (
        "import contextlib\nwith contextlib.ExitStack():\n  raise ValueError('row 0 is bad')",
        "row 0 is bad",
    ),
    "raised again": (
        "try:\n  raise ValueError('row 0 is bad')\nexcept ValueError:\n  raise",
        "row 0 is bad",
    ),
    "in place of a library's": (
        "try:\n  int(S)\nexcept ValueError as e:\n  raise ValueError('row 0 is bad') from e",
        "row 0 is bad",
    ),
    "a built-in function's": ("1\nint(S)", f"ValueError in fedpeft/x.py line 2; {LOGGED}"),
    "raised again, a built-in's": (
        "try:\n  int(S)\nexcept ValueError:\n  raise",
        f"ValueError in fedpeft/x.py line 2; {LOGGED}",
    ),
    "of a finally": (
        "try:\n  {}[S]\nfinally:\n  pass",
        f"KeyError in fedpeft/x.py line 2; {LOGGED}",
    ),
    "of a library": ("json.loads(S)", f"JSONDecodeError in fedpeft/x.py line 1; {LOGGED}"),
    "without a text": ("assert not S", f"AssertionError in fedpeft/x.py line 1; {LOGGED}"),
    "of codecs": (
        "S.encode().hex().encode('utf-16').decode()",
        f"UnicodeDecodeError in fedpeft/x.py line 1; {LOGGED}",
    ),
    "of two parts": ("raise PartlyPublic('row 0', S)", "row 0 (this node's log says more)"),
    "long": ("raise ValueError('x' * 600)", "x" * 497 + "..."),
}


@pytest.mark.parametrize("case", RULE)
def test_only_a_raise_of_this_package_tells_its_text(case: str) -> None:
    source, expected = RULE[case]
    names = {"__name__": "fedpeft.x", "S": SECRET, "json": json, "PartlyPublic": PartlyPublic}
    with pytest.raises(Exception) as caught:
        exec(compile(source, "x.py", "exec"), names)
    assert isinstance(caught.value, Exception)
    assert public_text(caught.value) == expected


def test_an_error_from_elsewhere_tells_its_type() -> None:
    assert public_text(ValueError(SECRET)) == f"ValueError; {LOGGED}"
    with pytest.raises(KeyError) as caught:
        raise KeyError(SECRET)
    assert public_text(caught.value) == f"KeyError; {LOGGED}"


# --- rows that cannot be used -------------------------------------------------------------------

Ask = Callable[..., str]
GOOD: dict[str, Rows] = {
    "text": [{"text": f"{SECRET} bread", "label": label} for label in TOPICS] * 3,
    "number": [{"text": f"{SECRET} bread", "label": i / 8} for i in range(12)],
    "choice": [
        {"premise": SECRET, "choice1": f"{SECRET} a", "choice2": f"{SECRET} b", "label": i % 2}
        for i in range(12)
    ],
    "answer": [{"instruction": f"{SECRET} {i}", "response": f"{SECRET} {i}"} for i in range(12)],
    "image": [{"image": image(i), "label": i % 2} for i in range(12)],
}
VIT = (
    "model.architecture={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32, image_size: 8, patch_size: 4}"
)
LABELS = f"data.labels=[{','.join(TOPICS)}]"


@pytest.fixture(scope="module")
def messages(
    base: list[str], decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Sent]:
    """``messages(task, "train")`` gives a message of a server that is honest."""
    folder = tmp_path_factory.mktemp("messages")
    copa = ["data=copa", "data.prompt='{{ premise }}'", "data.subset=null", "data.revision=null"]
    tasks = {
        "text": [LABELS, "evaluation.clients=always"],
        "number": ["data._target_=fedpeft.data.tasks.text.Regression", "data.test_split=null"],
        "choice": [*copa, "data.test_split=null"],
        "answer": [f"model.path={decoder}", "data=instructions", "data.generate=never"],
        "image": [
            *("model=vit_base", "model.path=null", "model.random=true", VIT, "method.rank=4"),
            *("data=images", "data.labels=[a,b]", "data.test_split=null"),
        ],
    }
    runs: dict[str, list[Sent]] = {}

    def message(task: str, kind: str) -> Sent:
        if task not in runs:
            run, data = Runner(base, folder / task), folder / f"{task}.parquet"
            own = [] if task == "text" else [f"data.path={write_file(data, GOOD[task])}"]
            own += [] if task == "text" else ["data.validation_split=null"]
            run(*tasks[task], *own, "num_rounds=1", "partition=iid")
            runs[task] = run.recorder.exchanges
        return next(sent for sent in runs[task] if sent.kind == kind)

    return message


@pytest.fixture
def ask(messages: Callable[[str, str], Sent]) -> Ask:
    """``ask(task, path)`` gives the text that a client with its rows at a path answers with."""

    def answer(task: str, path: Path, *overrides: str, kind: str = "train") -> str:
        sent = messages(task, kind)
        config = dict(sent.down.content.config_records["config"])
        config["overrides"] = join([*split(str(config["overrides"])), *overrides])
        content = RecordDict({**sent.down.content, "config": ConfigRecord(config)})
        message = Message(content, 1, kind)
        message.metadata.__dict__ |= sent.down.metadata.__dict__
        node = {"partition-id": sent.client, "data-path": str(path)}
        with pytest.raises(RuntimeError) as caught:
            client_app(message=message, context=Context(1, 1, node, RecordDict(), {}))
        error = caught.value
        assert error.__cause__ is None and error.__context__ is None
        assert hides("".join(traceback.format_exception_only(error)))
        return str(error)

    return answer


def known(label: str, end: str) -> str:
    """Return the sentence on the thirteenth row of a file, whose line is known in files of text."""
    place = {"csv": "line 14", "jsonl": "line 13"}.get(end, "counted from 1")
    return f"row 13 of train ({place}) has {label} in label, must be one of the 4 labels of data."


def bad(task: str, **cells: Any) -> Rows:
    """Return good rows, and after them one with other cells."""
    return [*GOOD[task], GOOD[task][0] | cells]


TWO = '{"text": "SECRET-471193", "label": "food"}\n'
BROKEN_LINE = "because line 2 of a file is broken (this node's log"
NO_UTF_8 = "because line 2 of a file is no UTF-8: it looks like cp1252, so give data.encoding="
LONG_ROW = "because line 3 of a file is broken (this node's log"
# a column of several kinds is read as JSON
SEVERAL = "row 1 of train (line 1) has text in label, must be"
ROWS: dict[str, tuple[str, str, Rows | bytes, str]] = {
    **{
        f"a label of {end}": ("text", end, bad("text", label=SECRET), known("text", end))
        for end in ("csv", "json", "jsonl", "parquet")
    },
    "a number for a label": ("text", "jsonl", bad("text", label=NUMBER), SEVERAL),
    "no label": ("text", "csv", bad("text", label=None), known("nothing", "csv")),
    "a nested label": ("text", "jsonl", bad("text", label={SECRET: SECRET}), SEVERAL),
    "no text": (
        "text",
        "csv",
        bad("text", text=None),
        "row 13 of train (line 14) has no text",
    ),
    "a blank text": (
        "text",
        "jsonl",
        bad("text", text=" "),
        "row 13 of train (line 13) has an empty text",
    ),
    "no header": (
        *("text", "csv"),
        b"SECRET-471193,food\nSECRET-471193 a,food\n",
        "has no column text in train (this node's log",
    ),
    "semicolons": (
        *("text", "csv"),
        b"SECRET-471193;label\nSECRET-471193;food\n",
        "a file has semicolons between its cells: give \"data.separator=';'\" (this node's log",
    ),
    "keys that are values": (
        *("text", "jsonl"),
        [{SECRET: SECRET, "label": "food"}],
        "has no column text in train (this node's log",
    ),
    "numbers for texts": (
        *("text", "parquet"),
        [{"text": NUMBER, "label": "food"}],
        "column text of train must hold texts, got int64",
    ),
    "nested texts": (
        *("text", "jsonl"),
        [{"text": {SECRET: SECRET}, "label": "food"}] * 12,
        "column text of train must hold texts, got ",
    ),
    "a long row": ("text", "csv", b"text,label\na,food\nSECRET-471193,food,SECRET\n", LONG_ROW),
    "a row cut off": ("text", "csv", b'text,label\n"SECRET-471193,food\n', "images (this node's"),
    "no CSV in UTF-8": ("text", "csv", b"text,label\nSECRET-471193\xe9,food\n", NO_UTF_8),
    "no line in UTF-8": (
        "text",
        "jsonl",
        TWO.encode() + b'{"text": "SECRET\xe9"}',
        "column text is no UTF-8 in row 2 (counted from 1)",
    ),
    "a line cut off": ("text", "jsonl", (TWO + TWO[:20]).encode(), BROKEN_LINE),
    "JSON cut off": ("text", "json", b'[{"text": "SECRET-471193", "lab', "images (this node's log"),
    "JSON of a text": ("text", "json", b'"SECRET-471193"', "images (this node's log"),
    "no parquet": ("text", "parquet", b"PAR1SECRET-471193PAR1", "images (this node's log"),
    "another split": ("text", "jsonl", bad("text"), "has no split train: set data.train_split"),
    "a text for a number": (
        *("number", "jsonl"),
        [{"text": SECRET, "label": SECRET}] * 12,
        "row 1 of train (line 1) has text in label, must be a finite number (and 11 rows more)",
    ),
    "no number": (
        *("number", "parquet"),
        bad("number", label=float("inf")),
        "row 13 of train (counted from 1) "
        "has a number that is not finite in label, must be a finite number",
    ),
    "a choice out of range": (
        *("choice", "parquet"),
        bad("choice", label=NUMBER),
        "row 13 of train (counted from 1) "
        "has a whole number in label, must be the number of a candidate",
    ),
    "an empty choice": (
        *("choice", "csv"),
        bad("choice", choice1=""),
        "row 13 of train (line 14) has no choice1",
    ),
    "no answer": ("answer", "jsonl", bad("answer", response=""), "has an empty response"),
    "an image that is none": (
        *("image", "parquet"),
        bad("image", image=SECRET.encode()),
        "row 13 of train (counted from 1) has a broken image",
    ),
    "a class out of range": (
        *("image", "parquet"),
        bad("image", image=image(13), label=NUMBER),
        "row 13 of train (counted from 1) "
        "has a whole number in label, must be one of the 2 labels of data.labels",
    ),
}


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect files that ``datasets`` leaves open, so that no other test gets the warning."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row(ask: Ask, tmp_path: Path, case: str) -> None:
    task, end, rows, expected = ROWS[case]
    name = "SECRET_471193" if case == "another split" else "train"
    folder = tmp_path / "ward"
    folder.mkdir()
    file = folder / f"{name}.{end}"
    file.write_bytes(rows) if isinstance(rows, bytes) else write_file(file, rows)
    text = ask(task, folder)
    assert hides(text) and expected in text


CHAT = (
    "{% if 'SECRET' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
)
ASKED: dict[str, tuple[str, str, str]] = {
    "a key": (
        "answer",
        "data.prompt='{{ {}[instruction] }}'",
        "fails in row 1 (counted from 1) with UndefinedError",
    ),
    "a filter": (
        "answer",
        "data.prompt='{{ [1] | map(instruction) | list }}'",
        "fails in row 1 (counted from 1) with TemplateRuntimeError",
    ),
    "a candidate": (
        "choice",
        "data.candidate='{{ {}[choice] }}'",
        "fails in row 1 (counted from 1) with UndefinedError",
    ),
    "a chat": (
        "answer",
        f"model.chat_template={json.dumps(CHAT)}",
        "the tokenizer's chat template fails in row 1 (counted from 1) with TemplateError",
    ),
    "a column": ("answer", "data.prompt='{{ nothing }}'", "has no column nothing in train"),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_server_s_template(ask: Ask, tmp_path: Path, case: str) -> None:
    """A template can fail with any text of a row as its error's text."""
    task, override, expected = ASKED[case]
    write_file(tmp_path / "train.jsonl", GOOD[task])
    text = ask(task, tmp_path, override)
    assert hides(text) and expected in text


def test_a_metric_s_own_error(
    ask: Ask,
    messages: Callable[[str, str], Sent],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log of the node has what the server does not get."""
    messages("text", "evaluate")  # the run that sends it has a metric that works

    def refuse(*_: Any, **__: Any) -> Any:
        raise KeyError(SECRET)

    write_file(tmp_path / "train.jsonl", GOOD["text"])
    monkeypatch.setattr("fedpeft.data.tasks.classification.measure", refuse)
    text = ask("text", tmp_path, kind="evaluate")
    assert hides(text) and text.startswith("KeyError in fedpeft/") and text.endswith(LOGGED)
    assert f"KeyError: '{SECRET}'" in caplog.text
