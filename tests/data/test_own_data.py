"""The first hour with one's own rows: what runs as it is, and what is said before round 0."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.choice import MultipleChoice
from fedpeft.data.tasks.images import ImageClassification
from fedpeft.data.tasks.instruction import InstructionTuning, QuestionAnswering
from fedpeft.data.tasks.text import Regression, TextClassification
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.reporting.progress import Display
from fedpeft.server.check import check
from fedpeft.simulation.grid import InProcessGrid
from tests.conftest import TOPICS, Runner
from tests.data.files import Rows, image, write, write_file
from tests.data.shortcuts import composed, error_of

# datasets leaves CSV files open until the garbage collector closes them, which then warns.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MEND = "mend it, or leave such rows out with data.bad_rows=skip"


@pytest.fixture(autouse=True)
def collected(tmp_path: Path) -> Iterator[None]:
    """Collect after tests with CSV files, so that no other test gets the warning."""
    yield
    if any(tmp_path.rglob("*.[ct]sv")):
        gc.collect()


def rows(count: int, label: Callable[[int], str] = lambda i: "ab"[i % 2]) -> Rows:
    """Return rows with distinct texts."""
    return [{"text": f"t{i}", "label": label(i)} for i in range(count)]


def texts(task: Any, split: str) -> list[str]:
    return values(task.split_rows(split), "text")


def test_rows_that_no_client_holds_are_counted(tmp_path: Path, run: Runner) -> None:
    table = [row | {"site": "abc"[min(i // 20, 2)]} for i, row in enumerate(rows(41))]
    path = write(tmp_path / "sites", train=table, validation=rows(4), test=rows(4))
    base = ("data=table", f"data.path={path}", "partition=natural", "partition.column=site")
    summary = run(*base, "partition.min_size=3", "num_clients=2", "num_rounds=1")
    assert summary["notes"] == ["no client holds 1 of the 41 training rows"]


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_single_table_is_divided_as_by_null(tmp_path: Path, kind: str) -> None:
    path = write_file(tmp_path / f"any.{kind}", rows(40))
    task = TextClassification(path=path)
    told = TextClassification(path=path, validation_split=None, test_split=None)
    for split, count in {"train": 32, "validation": 4, "test": 4}.items():
        assert texts(task, split) == texts(told, split) and len(texts(task, split)) == count
    assert task.notes() == [
        f"data set {path} has no split validation and no split test: of its 40 rows, 4 for "
        "validation and 4 for test are set aside (data.validation_fraction and data.test_fraction)"
    ]
    assert told.notes() == []


def test_only_the_missing_split_is_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path, train=rows(20), test=rows(3))
    task = TextClassification(path=path, validation_fraction=0.2)
    assert task.fingerprint()["rows"] == {"train": 16, "validation": 4, "test": 3}
    assert texts(task, "test") == ["t0", "t1", "t2"]
    assert task.notes() == [
        f"data set {path} has no split validation: of its 20 rows, 4 for validation are set aside "
        "(data.validation_fraction)"
    ]


@pytest.mark.parametrize(
    ("splits", "fields"),
    [
        (("train", "dev"), {}),  # which may be the one to validate on
        (("train",), {"validation_split": "dev"}),
        (("train",), {"missing_split": "error"}),
    ],
)
def test_splits_that_are_not_replaced(
    tmp_path: Path, splits: tuple[str, ...], fields: dict[str, Any]
) -> None:
    tables: dict[str, Any] = dict.fromkeys(splits, rows(20))
    path = write(tmp_path, **tables)
    task = TextClassification(path=path, **fields)
    name = fields.get("validation_split", "validation")
    assert error_of(lambda: task.split_rows("validation")) == (
        f"data set {path} has no split {name}: set data.validation_split or data.test_split to one "
        f"that it has, or to null to set rows of train aside; it has {', '.join(sorted(splits))}"
    )


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for i in range(20):
        file = tmp_path / "flat" / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(i))
    task = ImageClassification(path=str(tmp_path / "flat"))
    assert task.fingerprint()["rows"] == {"train": 16, "validation": 2, "test": 2}
    assert task.label_names == ["cat", "dog"] and len(task.notes()) == 1


@pytest.mark.parametrize("task", ["images", "instructions"])
def test_splits_that_are_there_are_read(task: str) -> None:
    """The YAML of somebody's own rows takes no rows of train in their place."""
    data = composed(f"data={task}").data
    assert (data.validation_split, data.test_split) == ("validation", "test")


def test_all_rows_of_a_client_s_own_folder_train(base: list[str], tmp_path: Path) -> None:
    path = write_file(tmp_path / "own.jsonl", rows(40, lambda i: sorted(TOPICS)[i % 4]))
    open_engine.cache_clear()
    engine = open_engine(" ".join([*base, f"data.labels=[{','.join(TOPICS)}]"]), path)
    assert len(engine.rows.examples("train")) == 40


BROKEN: dict[str, tuple[Rows, str]] = {
    "a label that only test has": (
        [{"text": "x", "label": "chess"}],
        f"row 1 of test (line 1) has text in label, must be one of the 4 labels of train: {MEND}",
    ),
    "a label that is one but for a blank": (
        [{"text": "x", "label": "Music "}],
        "row 1 of test (line 1) "
        "has text in label, must be one of the 4 labels of train, and is one but for "
        f"blanks or case: {MEND}",
    ),
    "no label": ([{"text": "x"}], "data set {} has no column label in test, only text"),
    "an empty text": (
        [{"text": " ", "label": "food"}],
        f"row 1 of test (line 1) has an empty text: {MEND}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_test_split_ends_a_run_before_it_begins(
    run: Runner, base: list[str], tmp_path: Path, case: str
) -> None:
    test, expected = BROKEN[case]
    train = rows(40, lambda i: sorted(TOPICS)[i % 4])
    path = write(tmp_path / "d", train=train, validation=train[:4], test=test)
    error = error_of(lambda: run(f"data.path={path}"))
    assert error == expected.format(path)
    assert not run.run_dir.exists() and run.recorder.exchanges == []
    open_engine.cache_clear()
    assert error_of(lambda: check(InProcessGrid(3), [*base, f"data.path={path}"])) == error


def test_too_few_rows_to_set_aside_end_a_run_before_it_begins(run: Runner, tmp_path: Path) -> None:
    path = write_file(tmp_path / "two.jsonl", rows(2))
    error = error_of(lambda: run(f"data.path={path}"))
    assert error == f"1 rows of {path} are too few to set some aside for validation"
    assert not run.run_dir.exists()


# --- notes --------------------------------------------------------------------------------------


def test_a_column_of_numbers_that_are_hardly_labels(tmp_path: Path) -> None:
    rows = [{"text": "rain", "label": i / 7} for i in range(40)]
    (note,) = TextClassification(
        path=write(tmp_path, train=rows, validation=rows, test=rows)
    ).notes()
    assert note.startswith("column label has 40 labels in 40 rows: to learn a number, set data.")
    named = [str(i / 7) for i in range(40)]
    assert TextClassification(path=str(tmp_path), labels=named).notes() == []


def test_a_gap_among_whole_numbers_changes_no_class(tmp_path: Path) -> None:
    """A column of 1, 2 and a gap is read as 1.0, 2.0 and not a number."""
    whole = [{"text": f"t{i}", "label": i % 2 + 1} for i in range(6)]
    gap = [*whole, {"text": "u", "label": None}]
    path = write(tmp_path, "csv", train=gap, validation=gap[1:], test=whole)
    task = TextClassification(path=path, bad_rows="skip")
    assert task.label_names == ["1", "2"]
    for split, expected in (
        ("train", [0, 1] * 3),
        ("validation", [1, 0, 1, 0, 1]),
        ("test", [0, 1] * 3),
    ):
        assert task.class_numbers(task.split_rows(split)).tolist() == expected


def test_codes_with_zeros_in_front_stay_as_they_are_written(tmp_path: Path) -> None:
    """A reader that guesses takes 007 for the number 7."""
    codes, doses = ["007", "7", "12", ""], ["10", "0", "0.5", "1"]
    lines = [f"t{i},{codes[i % 4]},{doses[i % 4]},{i}" for i in range(8)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label,dose,age", *lines]) + "\n")
    whole = [f"t{i},{codes[1 + i % 2]},1,2" for i in range(4)]  # 7 and 12, so numbers here
    for split in ("validation", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label,dose,age", *whole]) + "\n")
    task = TextClassification(path=str(tmp_path), bad_rows="skip")
    assert task.label_names == ["007", "12", "7"]
    assert task.class_numbers(task.split_rows("train")).tolist() == [0, 2, 1] * 2
    assert task.class_numbers(task.split_rows("test")).tolist() == [2, 1] * 2
    assert values(task.tables["train"], "dose") == [10, 0, 0.5, 1] * 2
    assert values(task.tables["train"], "age") == list(range(8))


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["007", "7", "NA", ""], ["007", "7", "NA", None]),  # texts, as in a column of texts
        (["-007", "7", "1", "2"], ["-007", "7", "1", "2"]),
        (["7", "NA", "0", "0.5"], [7, None, 0, 0.5]),
    ],
)
def test_codes_are_texts_and_other_columns_stay(
    tmp_path: Path, cells: list[str], read: list[Any]
) -> None:
    lines = [
        f"{cell},{other}" for cell, other in zip(cells, ["true", "", "false", ""], strict=True)
    ]
    (tmp_path / "train.csv").write_text("\n".join(["code,smokes", *lines]) + "\n")
    table = TextClassification(path=str(tmp_path)).tables["train"]
    assert table.column_names == ["code", "smokes"]
    assert values(table, "code") == read
    assert values(table, "smokes") == [True, None, False, None]


def test_a_number_to_learn_is_no_code(tmp_path: Path) -> None:
    lines = [f"{code},t{i},{score}" for i, (code, score) in enumerate([("01", "05"), ("1", "7.5")])]
    (tmp_path / "train.csv").write_text("\n".join(["site,text,label", *lines]) + "\n")
    table = Regression(path=str(tmp_path)).tables["train"]
    assert values(table, "label") == [5, 7.5] and values(table, "site") == ["01", "1"]


def test_two_stray_quotes_swallow_no_rows(tmp_path: Path) -> None:
    lines = [f"t{i},{'ab'[i % 2]}" for i in range(30)]
    lines[4], lines[20] = '"begins with a quote,a', '"so does this,b'
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    says = "has text behind a closing quote near line 22, so a quote"
    with pytest.raises(ValueError, match=says):
        TextClassification(path=str(tmp_path)).tables["train"]
    quoted = ['"over\ntwo lines, with a ""word""",a', *lines[:4]]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *quoted]) + "\n")
    assert len(TextClassification(path=str(tmp_path)).tables["train"]) == 5


def test_labels_that_differ_by_blanks_or_case(tmp_path: Path) -> None:
    names = ["heart", "lung", "Lung", "heart ", "skin in", "skin  in", "heart"]
    path = write(tmp_path, train=rows(7, lambda i: names[i]), validation=rows(1), test=rows(1))
    task = TextClassification(path=path)
    assert task.num_labels == 6  # as they are written
    assert task.notes() == [
        "labels of column label differ by blanks or case only: 'Lung' (1 rows), 'lung' (1 rows)",
        "labels of column label differ by blanks or case only: 'heart' (2 rows), 'heart ' (1 rows)",
        "labels of column label differ by blanks or case only: 'skin  in' (1 rows), 'skin in' "
        "(1 rows)",
    ]


def test_notes_are_shown_once_checked_and_kept(
    run: Runner, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*sorted(TOPICS), "food "]
    path = write_file(tmp_path / "trail.jsonl", rows(60, lambda i: names[i % 5]))
    shown: list[str] = []
    monkeypatch.setattr(Display, "note", lambda _, text: shown.append(text))
    notes = run(f"data.path={path}", "num_rounds=1")["notes"]
    assert shown == notes and len(notes) == 2
    assert notes[1].endswith("only: 'food' (12 rows), 'food ' (12 rows)")
    assert check(InProcessGrid(3), [*base, f"data.path={path}"]).notes == notes


def test_a_display_shows_names_with_brackets_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display()
    display.start("LoRA: study/method.targets=[q,k,v]/seed=0", 3)
    display.note("label '[b]' differs")
    assert capsys.readouterr().out.splitlines() == [
        "LoRA: study/method.targets=[q,k,v]/seed=0",
        "note: label '[b]' differs",
    ]


# --- CSV ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["None", "NA", "null", "nan", "N/A", "NULL"])
def test_a_class_with_the_name_of_nothing(tmp_path: Path, name: str) -> None:
    labels = ["heart", name, "lung"]
    table = write_file(tmp_path / "x.csv", rows(30, lambda i: labels[i % 3]))
    task = TextClassification(path=table, bad_rows="skip")
    assert task.label_names == sorted(labels)
    assert len(task._table("train")) == 30 and task.skipped == {}


def test_a_split_of_that_class_alone(tmp_path: Path) -> None:
    only = rows(2, lambda _: "None")
    train = rows(10, lambda i: ["None", "lung"][i % 2])
    path = write(tmp_path, "csv", train=train, validation=only, test=only)
    task = TextClassification(path=path)
    assert task.class_numbers(task.split_rows("test")).tolist() == [0, 0]


def test_an_empty_cell_is_missing(tmp_path: Path) -> None:
    table = write_file(tmp_path / "x.csv", rows(10, lambda i: ["a", "", "None"][i % 3]))
    task = TextClassification(path=table, bad_rows="skip")
    assert task.label_names == ["None", "a"] and len(task._table("train")) == 7
    assert list(task.skipped.values()) == [3]


def test_in_a_column_of_numbers_na_is_missing(tmp_path: Path) -> None:
    cells: list[Any] = [0.5, "NA", 2, ""]
    table = [{"text": f"NA {i}" if i else "NA", "label": cells[i % 4]} for i in range(12)]
    task = Regression(path=write_file(tmp_path / "x.csv", table), bad_rows="skip")
    usable = task._table("train")
    assert values(usable, "label") == [0.5, 2.0] * 3 and values(usable, "text")[0] == "NA"


def test_blank_lines_may_begin_a_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows(10, lambda i: "ab"[i % 2]))
    for suffix, content in (("jsonl", f"\n\n \n{lines}"), ("csv", "\n\ntext,label\nx,a\ny,b\n")):
        (file := tmp_path / f"x.{suffix}").write_text(content)
        assert TextClassification(path=str(file)).label_names == ["a", "b"]


FILES: dict[str, tuple[str, bytes, str]] = {
    "no rows": ("csv", b"text,label\n\n", "has a header and no rows"),
    "nothing": ("csv", b"\n", "is empty"),
    "no lines": ("jsonl", b"", "is empty"),
    "blank lines": ("jsonl", b"\n" * 70_000, "is empty"),
    "semicolons": (
        "csv",
        b"text;label\nrain, snow;a\n",
        "has semicolons between its cells: give \"data.separator=';'\"",
    ),
    "tabs": (
        "csv",
        b"text\tlabel\nx\ta\n",
        'has tabs between its cells: give "data.separator=tab"',
    ),
    "UTF-16": (
        "csv",
        "text,label\nx,é\n".encode("utf-16"),
        "is in UTF-16: save it as UTF-8, or give data.encoding=utf-16",
    ),
    "lines in UTF-16": (
        "jsonl",
        '{"text": "x", "label": "é"}'.encode("utf-16"),
        "is in UTF-16: save it as UTF-8, or give data.encoding=utf-16",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_as_expected(tmp_path: Path, case: str) -> None:
    suffix, content, problem = FILES[case]
    file = tmp_path / f"notes.{suffix}"
    file.write_bytes(content)
    error = error_of(lambda: TextClassification(path=str(file)).num_labels)
    assert error == f"data.path={file}: a file {problem} (notes.{suffix})"


@pytest.mark.parametrize("content", ["text,label\nx,é\n", "téxt,label\nx,a\n"])
def test_latin_1(tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes(content.encode("latin-1"))
    line = 1 if content.startswith("té") else 2
    error = error_of(lambda: TextClassification(path=str(file)).num_labels)
    assert error == (
        f"data.path={file} cannot be read as parquet, CSV, JSON lines or images, because line "
        f"{line} of a file is no UTF-8: it looks like cp1252, so give data.encoding=cp1252, or "
        "save it as UTF-8 (notes.csv)"
    )


@pytest.mark.parametrize(
    ("encoded", "given", "advice"),
    [
        ("utf-8", "ascii", "is no ascii: it looks like utf-8, so give data.encoding=utf-8"),
        ("latin-1", "ascii", "is no ascii: it looks like cp1252, so give data.encoding=cp1252"),
        ("utf-8", "utf-16", "is no utf-16: it looks like utf-8, so give data.encoding=utf-8"),
    ],
)
def test_the_encoding_that_a_file_looks_like(
    tmp_path: Path, encoded: str, given: str, advice: str
) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes("text,label\nmany words and then é,a\n".encode(encoded))
    error = error_of(lambda: TextClassification(path=str(file), encoding=given).num_labels)
    assert advice in error and "codec" not in error and "BOM" not in error


def test_a_text_mostly_beyond_ascii_looks_like_no_encoding(tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes("text,label\nдождь и снег,a\nсолнце,b\n".encode("cp1251"))
    error = error_of(lambda: TextClassification(path=str(file)).num_labels)
    assert error.endswith(
        "because line 2 of a file is no UTF-8: save it as UTF-8, or name its encoding, such as "
        "data.encoding=cp1252 (notes.csv)"
    )


READ: dict[str, tuple[str, str, dict[str, str]]] = {
    "semicolons": ("notes.csv", "text;label\nrain, é;b\nsun;a\n", {"separator": ";"}),
    "tabs": ("notes.csv", "text\tlabel\nrain, é\tb\nsun\ta\n", {"separator": "tab"}),
    "a tsv": ("notes.tsv", "text\tlabel\nrain, é\tb\nsun\ta\n", {}),
    "cp1252": ("notes.csv", 'text,label\n"rain, é",b\nsun,a\n', {"encoding": "cp1252"}),
    "utf-16": ("notes.csv", 'text,label\n"rain, é",b\nsun,a\n', {"encoding": "utf-16"}),
    "lines": (
        "notes.jsonl",
        '{"text": "rain, é", "label": "b"}\n{"text": "sun", "label": "a"}\n',
        {"encoding": "latin-1"},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_the_separator_and_the_encoding_of_a_file(tmp_path: Path, case: str) -> None:
    name, content, fields = READ[case]
    file = tmp_path / name
    file.write_bytes(content.encode(fields.get("encoding", "utf-8")))
    rows = TextClassification(path=str(file), **fields).as_given("train")  # type: ignore[arg-type]
    assert values(rows, "text") == ["rain, é", "sun"] and values(rows, "label") == ["b", "a"]


def test_a_separator_on_the_command_line() -> None:
    assert composed("data=table", "data.separator=';'").data.separator == ";"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"separator": ";;"}, "data.separator must be one character or tab, got ;;"),
        (
            {"encoding": "latin-0"},
            "data.encoding=latin-0 is no encoding that Python knows, such as utf-8, utf-16, cp1252 "
            "or latin-1",
        ),
        ({"missing_split": "no"}, "data.missing_split must be aside or error, got no"),
    ],
)
def test_fields_are_checked(fields: dict[str, str], expected: str) -> None:
    assert error_of(lambda: TextClassification(**fields)) == expected  # type: ignore[arg-type]


def test_a_table_without_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": [], "label": []}).to_parquet(str(tmp_path / "train.parquet"))
    task = TextClassification(path=str(tmp_path))
    assert error_of(lambda: task.num_labels) == f"data.path={tmp_path}: a file has no rows"


# --- prompts, answers and conversations ---------------------------------------------------------


@pytest.mark.parametrize(("prompt", "form"), [("question", "question"), ("Say it!", "column")])
def test_a_prompt_that_uses_no_column(prompt: str, form: str) -> None:
    expected = f"data.prompt={prompt} uses no column, so all prompts would be the same: give "
    expected += f"\"data.prompt='{{{{ {form} }}}}'\""
    assert error_of(lambda: InstructionTuning(prompt=prompt)) == expected
    if prompt == "question":  # a constant sentence may stand before candidates
        assert error_of(lambda: MultipleChoice(prompt=prompt)) == expected


def test_candidates_that_would_all_be_the_same() -> None:
    expected = "data.candidate={{ premise }} does not use {{ choice }}, so all candidates of a row "
    expected += "would be the same"
    assert error_of(lambda: MultipleChoice(candidate="{{ premise }}")) == expected


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Return messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_an_answer_that_is_a_list(tmp_path: Path) -> None:
    path = write_file(tmp_path / "chat.jsonl", [{"q": "x", "chat": turns("a", "b")}] * 3)
    task = InstructionTuning(path=path, label=None, prompt="{{ q }}", answer="chat")
    assert error_of(lambda: task.train_rows) == (
        "row 1 of train (line 1) "
        "has a list in chat, must be a text; data.messages=chat reads conversations "
        f"(and 2 rows more): {MEND}"
    )


def test_a_prompt_that_prints_a_list(tmp_path: Path) -> None:
    path = write_file(tmp_path / "chat.jsonl", [{"a": "x", "chat": turns("a", "b")}] * 3)
    task = InstructionTuning(path=path, label=None, prompt="{{ chat }}", answer="a")
    assert error_of(lambda: task.train_rows) == (
        "the template '{{ chat }}' fails in row 1 (counted from 1) "
        "with TypeError: it prints a list or a nested "
        "value: join it, or name a text in it"
    )


BAD_CHATS: dict[str, tuple[Any, str]] = {
    "text": ("hello", "has text, must be a list of messages"),
    "no answer": ([{"role": "user", "content": "a"}], "has no message whose role is assistant"),
    "no question": (turns("a", first="assistant"), "has no message before the assistant's"),
    "blank": (turns("a", " "), "has an empty answer"),
    "no content": (
        [{"role": "user", "content": None}],
        "has a message without a role or a content of text",
    ),
    "other keys": (
        [{"from": "human", "value": "a"}],
        "has a message without a role or a content of text",
    ),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_conversations_that_cannot_be_learnt(tmp_path: Path, case: str) -> None:
    chat, reason = BAD_CHATS[case]
    path = write_file(tmp_path / "chat.jsonl", [{"chat": chat}])
    task = InstructionTuning(path=path, label=None, messages="chat")
    assert error_of(lambda: task._table("train")) == (
        f"row 1 of train (line 1) {reason} in chat: {MEND}"
    )


def test_messages_stand_in_place_of_prompt_and_answer() -> None:
    expected = "data.messages stands in place of data.prompt and data.answer"
    assert error_of(lambda: InstructionTuning(messages="chat", answer="chat")) == expected
    assert QuestionAnswering(messages="chat").columns() == ["chat"]


def test_the_loss_is_on_the_assistant_s_last_answer(
    base: list[str], decoder: Path, tmp_path: Path
) -> None:
    """Earlier answers are part of the prompt, and what comes after the last one is left out."""
    system = {"role": "system", "content": "because"}
    chats = [
        [system, *turns("rain", "snow", "goal", "team race", "match")],
        turns("wind", "cloud"),
    ]
    path = write(tmp_path, train=[{"chat": c} for c in chats], validation=[{"chat": chats[1]}])
    task = InstructionTuning(
        path=path, label=None, messages="chat", test_split="validation", metrics=["exact_match"]
    )
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}so{% endif %}"
    config = composed(*base, f"model.path={decoder}", "method.rank=4")
    model = replace(config.model, chat_template=template)
    engine = Engine(replace(config, data=task, model=model))
    tokenizer, examples = engine.replica.processor, engine.rows.examples("train")
    found = []
    for row in range(2):
        batch = examples.batch(np.array([row]))
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        start = int(batch["prompts"][0])
        found.append((tokens[:start], tokens[start:]))
    assert found == [
        (["<s>", "because", "rain", "snow", "goal", "so"], ["team", "race", "</s>"]),
        (["<s>", "wind", "so"], ["cloud", "</s>"]),
    ]
    assert task.references(task.train_rows) == [["team race"], ["cloud"]]
    assert task.prompts(task.train_rows)[1] == "user: wind"


def test_answers_of_another_script_are_noted(tmp_path: Path) -> None:
    answers = ["休息和喝水", "rest", "отдых"]
    table = [{"q": f"{i}", "a": answers[i % 3]} for i in range(6)]
    path = write(tmp_path, train=table, validation=table[:3], test=table[:2])
    fields: dict[str, Any] = {"path": path, "label": None, "prompt": "{{ q }}", "answer": "a"}
    assert InstructionTuning(**fields).notes() == [
        "3 of the 5 answers of validation and test are mainly of another script than Latin: for "
        "them rouge_l and bleu4 take letters of any script, and each character of a script without "
        "spaces as a word"
    ]
    assert InstructionTuning(**fields, metrics=["exact_match"]).notes() == []


def test_identical_chinese_texts_score_1() -> None:
    task = InstructionTuning()
    text = "休息和喝水 0"
    assert task.scored([text], [[text]]) == {"rouge_l": 1, "bleu4": 1}
