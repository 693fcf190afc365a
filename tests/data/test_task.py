"""Features of every task: splits, rows that cannot be used, groups, and clear errors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.base import Task
from fedpeft.data.tasks.instruction import InstructionTuning
from fedpeft.data.tasks.language import LanguageModelling
from fedpeft.data.tasks.text import Regression, TextClassification
from fedpeft.engine.engine import Engine
from tests.conftest import Runner
from tests.data.files import Rows, write
from tests.data.shortcuts import error_of


def numbered(rows: int, start: int = 0) -> Rows:
    """Return rows with distinct texts and two labels in turn."""
    return [{"text": f"t{start + i}", "label": "ab"[i % 2]} for i in range(rows)]


def texts(task: Task, split: str) -> list[str]:
    return values(task.split_rows(split), "text")


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The path of tables with 12 rows that train, 4 that validate and 2 that test."""
    validation, test = numbered(4, 20), numbered(2, 30)
    return write(tmp_path / "small", train=numbered(12), validation=validation, test=test)


# --- measures ------------------------------------------------------------------------------------


def test_ranges_bound_each_measure() -> None:
    inf = float("inf")
    assert LanguageModelling(path="x").ranges["token_accuracy"] == (-1, 1)
    task = TextClassification(path="x", metrics=["accuracy", "evaluate:mse"])
    assert task.ranges["mse"] == (-inf, inf) and task.ranges["baseline"] == (-1, 1)
    task = TextClassification(path="x", metrics=["evaluate:mse", "accuracy"])
    assert task.ranges["baseline"] == (-inf, inf)  # it is a value of the headline
    assert task.ranges["accuracy"] == (-1, 1) and task.ranges["loss"] == (0, 1e6)
    assert InstructionTuning(path="x").ranges["rouge_l_generated"] == (-1, 1)


def test_a_task_without_texts_to_generate_says_so() -> None:
    task: Any = TextClassification(path="x")
    assert not task.generates(last=True)
    with pytest.raises(ValueError, match="TextClassification generates no text"):
        task.generate_batch(None, {}, None)
    with pytest.raises(ValueError, match="TextClassification generates no text"):
        task.score_generated([], None, None)


# --- splits -------------------------------------------------------------------------------------


def test_splits_that_are_there(small: str) -> None:
    task = TextClassification(path=small)
    assert texts(task, "train") == [f"t{i}" for i in range(12)]
    assert texts(task, "validation") == ["t20", "t21", "t22", "t23"]
    assert texts(task, "test") == ["t30", "t31"]
    assert task.split_rows("test") is task.split_rows("test")


# Numbers are rounded up: 0.003 of 240 rows is 0.72.
@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 24), (0.25, 60), (0.003, 1), (0.03, 8)])
def test_validation_out_of_train(table: Path, fraction: float, expected: int) -> None:
    fields: dict[str, Any] = {"validation_split": None, "validation_fraction": fraction}
    one, two = (TextClassification(path=str(table), **fields) for _ in range(2))
    whole = texts(TextClassification(path=str(table)), "train")
    assert len(set(whole)) == 240  # so texts name rows
    train, validation = texts(one, "train"), texts(one, "validation")
    assert len(validation) == expected and len(train) == 240 - expected
    assert sorted([*train, *validation]) == sorted(whole)
    assert train == [t for t in whole if t not in validation]  # in the tables' order
    assert validation == [t for t in whole if t in validation] != whole[:expected]
    assert (texts(two, "train"), texts(two, "validation")) == (train, validation)
    assert len(texts(one, "test")) == 40


def test_test_and_validation_out_of_train(tmp_path: Path) -> None:
    """First 10 of 95 rows test, rounded up; then 0.2 of the other 85 validate."""
    path = write(tmp_path, train=numbered(95))
    fields: dict[str, Any] = {"test_split": None, "validation_split": None}
    task = TextClassification(path=path, **fields, validation_fraction=0.2)
    parts = {split: texts(task, split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 68,
        "validation": 17,
        "test": 10,
    }
    assert sorted(sum(parts.values(), [])) == sorted(f"t{i}" for i in range(95))
    other = TextClassification(path=path, **fields, validation_fraction=0.5)
    assert texts(other, "test") == parts["test"]  # validation_fraction has no influence on it


def test_other_columns_and_splits(tmp_path: Path) -> None:
    rows = [{"body": f"s{i}", "more": "and rain", "about": "ab"[i % 2]} for i in range(6)]
    path = write(tmp_path, one=rows[:3], two=rows[3:5], three=rows[5:])
    task = TextClassification(
        path=path,
        text="body",
        text_pair="more",
        label="about",
        train_split="one",
        validation_split="two",
        test_split="three",
        extra_tests={"again": "two"},
    )
    parts = {split: values(task.split_rows(split), "body") for split in ("train", "test", "again")}
    assert parts == {"train": ["s0", "s1", "s2"], "test": ["s5"], "again": ["s3", "s4"]}
    assert task.fingerprint()["rows"] == {"train": 3, "validation": 2, "test": 1, "again": 2}


def test_limits(tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(50), dev=numbered(9, 60), more=numbered(9, 70))
    task = TextClassification(
        path=path,
        validation_split=None,
        validation_fraction=0.4,
        test_split="dev",
        extra_tests={"more": "more"},
        max_train_rows=5,
        max_validation_rows=3,
        max_test_rows=7,
    )
    assert task.fingerprint()["rows"] == {"train": 5, "validation": 3, "test": 7, "more": 7}
    whole = TextClassification(
        path=path, validation_split=None, validation_fraction=0.4, test_split="dev"
    )
    for split in ("train", "validation", "test"):
        part, everything = texts(task, split), texts(whole, split)
        assert part == [t for t in everything if t in part] and len(set(part)) == len(part)
    assert texts(task, "train") != texts(whole, "train")[:5]


def test_clients_and_server_agree_on_the_splits(opened: Callable[..., Engine]) -> None:
    """The run's seed divides training rows only, so no validation row reaches a client."""
    overrides = ["data.validation_split=null", "data.validation_fraction=0.2"]
    a, b = opened(*overrides, "seed=0"), opened(*overrides, "seed=1")
    assert a.task.fingerprint() == b.task.fingerprint()
    assert sum(map(len, a.rows.by_client)) == 192 and len(a.rows.examples("validation")) == 48


def test_fingerprint_sees_every_text_and_label(tmp_path: Path) -> None:
    tables = [numbered(4), numbered(4)[::-1], numbered(3), numbered(4), numbered(4)]
    tables[3][2]["text"] += "x"
    tables[4][2]["label"] = "b"
    digests = set()
    for i, rows in enumerate(tables):
        path = write(tmp_path / str(i), train=rows, validation=numbered(2), test=numbered(2))
        fingerprint = TextClassification(path=path).fingerprint()
        assert fingerprint["rows"] == {"train": len(rows), "validation": 2, "test": 2}
        digests.add(fingerprint["sha256"])
    assert len(digests) == 5


def test_fingerprint_does_not_depend_on_the_format(tmp_path: Path) -> None:
    splits: Any = {"train": numbered(4), "validation": numbered(2), "test": numbered(2)}
    paths = [write(tmp_path / kind, kind, **splits) for kind in ("jsonl", "parquet")]
    jsonl, parquet = (TextClassification(path=path).fingerprint() for path in paths)
    assert jsonl == parquet


# --- rows that cannot be used -------------------------------------------------------------------

BAD = [
    {"text": "fine", "label": "a"},
    {"text": " \n", "label": "b"},
    {"text": None, "label": "a"},
    {"text": "", "label": "b"},
    {"text": "fine too", "label": "b"},
]
NO_ROW = "mend it, or leave such rows out with data.bad_rows=skip"


def test_a_bad_row_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(4), validation=numbered(4), test=BAD)
    task = TextClassification(path=path)
    assert len(task.train_rows) == 4  # because bad rows of other splits do not matter
    error = error_of(lambda: task.split_rows("test"))
    assert error == f"row 2 of test (line 2) has an empty text (and 2 rows more): {NO_ROW}"


def test_a_row_without_a_text_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(4), validation=numbered(4), test=BAD[2:3])
    error = error_of(lambda: TextClassification(path=path).split_rows("test"))
    assert error == f"row 1 of test (line 1) has no text: {NO_ROW}"


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, train=BAD * 2, validation=numbered(4), test=BAD)
    task = TextClassification(path=path, bad_rows="skip")
    assert texts(task, "train") == ["fine", "fine too"] * 2
    assert texts(task, "test") == ["fine", "fine too"]
    fingerprint = task.fingerprint()
    assert fingerprint["rows"] == {"train": 4, "validation": 4, "test": 2}
    assert fingerprint["skipped"] == {"has an empty text": 6, "has no text": 3}
    assert TextClassification(path=path, train_split="validation").skipped == {}


def test_a_split_of_bad_rows_alone(tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(4), validation=BAD[1:4], test=numbered(2))
    task = TextClassification(path=path, bad_rows="skip")
    error = error_of(lambda: task.split_rows("validation"))
    assert error == f"split validation of data set {path} has no rows"


def test_columns_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    rows = [row | {"more": None, "note": ""} for row in numbered(4)]
    path = write(tmp_path, train=rows, validation=rows, test=rows)
    assert len(TextClassification(path=path).train_rows) == 4
    task = TextClassification(path=path, text_pair="note")
    error = error_of(lambda: task.train_rows)
    assert error == f"row 1 of train (line 1) has an empty note (and 3 rows more): {NO_ROW}"


# --- errors -------------------------------------------------------------------------------------

ADVICE = "set data.validation_split or data.test_split to one that it has, or to null to set rows "
ADVICE += "of train aside"
SPLITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "validation": ({"validation_split": "dev"}, "dev", ADVICE),
    "test": ({"test_split": "dev"}, "dev", ADVICE),
    "train": ({"train_split": "dev"}, "dev", "set data.train_split to one that it has"),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_split(small: str, split: str) -> None:
    fields, name, advice = SPLITS[split]
    task = TextClassification(path=small, **fields)
    expected = f"data set {small} has no split {name}: {advice}; it has test, train, validation"
    assert error_of(lambda: task.split_rows(split)) == expected
    if split == "train":  # a run reads num_labels first, for the model's head
        assert error_of(lambda: task.num_labels) == expected


@pytest.mark.parametrize(
    ("fields", "column"),
    [({"text": "body"}, "body"), ({"label": "class"}, "class"), ({"text_pair": "two"}, "two")],
)
def test_a_missing_column(small: str, fields: dict[str, Any], column: str) -> None:
    expected = f"data set {small} has no column {column} in train, only text, label"
    assert error_of(lambda: TextClassification(path=small, **fields).train_rows) == expected
    assert error_of(lambda: TextClassification(path=small, **fields).num_labels) == expected


def test_too_few_rows_to_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(2))
    task = TextClassification(path=path, test_split=None, validation_split=None)
    error = error_of(lambda: task.split_rows("validation"))
    assert error == f"1 rows of {path} are too few to set some aside for validation"


@pytest.mark.parametrize(
    "task", [TextClassification(), LanguageModelling(label=None)], ids=lambda t: type(t).__name__
)
def test_texts_that_are_numbers(tmp_path: Path, task: Task) -> None:
    rows = [{"text": i, "label": "ab"[i % 2]} for i in range(4)]
    numbers = replace(task, path=write(tmp_path, train=rows))
    error = error_of(lambda: numbers.train_rows)
    assert error == "column text of train must hold texts, got int64"


def test_fewer_rows_than_clients_need(run: Runner, tmp_path: Path) -> None:
    path = write(tmp_path, train=numbered(8), validation=numbered(2), test=numbered(2))
    with pytest.raises(Exception) as error:
        run(f"data.path={path}", "partition.min_size=3")
    assert "8 training rows cannot give num_clients=3 at least 3 each" in str(error.value)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"validation_fraction": 0.0}, "data.validation_fraction must be in (0, 1), got 0.0"),
    ({"test_fraction": 1.0}, "data.test_fraction must be in (0, 1), got 1.0"),
    ({"max_train_rows": 0}, "data.max_train_rows must be >= 1 or null, got 0"),
    ({"max_test_rows": -1}, "data.max_test_rows must be >= 1 or null, got -1"),
    ({"bad_rows": "drop"}, "data.bad_rows must be error or skip, got drop"),
    ({"metrics": []}, "data.metrics must name at least one, got []"),
    ({"extra_tests": {"test": "x"}}, "data.extra_tests must not be named test"),
    ({"labels": ["a"]}, "data.labels must name two classes or more, got a"),
    ({"max_length": 1}, "data.max_length must be >= 2, got 1"),
    (
        {"metrics": ["accuracy", "spearman"]},
        "data.metrics of TextClassification must be of accuracy, f1, f1_macro, f1_weighted, "
        "matthews, or a module of evaluate, such as /folder/my_metric or evaluate:NAME, got "
        "spearman",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_fields_are_checked(fields: dict[str, Any], expected: str) -> None:
    assert error_of(lambda: TextClassification(**fields)) == expected


# --- groups -------------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path: Path) -> InstructionTuning:
    """A task with ten training rows and columns of all kinds."""
    kinds = ["b", "a", "b", "c", "a", "b", "a", "a", "b", "b"]
    columns: dict[str, Any] = {
        "instruction": [f"i{i}" for i in range(10)],
        "response": ["yes"] * 10,
        "kind": kinds,
        "named": [1, 0, 1, 1, 1, 0, 0, 0, 0, 1],
        "score": [0.2, 4.8, 2.6, -1.4, 5.0, 2.6, 0.4, 0.0, 5.0, 3.0],
        "gap": [7, 3, None, 3, 3, 3, 3, 3, 3, 3],
        "nan": [7.0, float("nan"), *[3.0] * 8],
        "lists": [["x"]] * 10,
        "year": [1999, 2001, 1999, 2000, *[1999] * 6],
    }
    features = Features(
        {"instruction": Value("string"), "response": Value("string"), "kind": Value("string")}
        | {"named": ClassLabel(names=["no", "yes"]), "score": Value("float64")}
        | {"gap": Value("int64"), "nan": Value("float64"), "lists": List(Value("string"))}
        | {"year": Value("int64")}
    )
    Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "train.parquet"))
    Dataset.from_dict({k: v[:1] for k, v in columns.items()}, features).to_parquet(
        str(tmp_path / "test.parquet")
    )
    return InstructionTuning(path=str(tmp_path), label="kind", validation_split="test")


def test_groups_of_texts(groups: InstructionTuning) -> None:
    for column in ("kind", None):  # null stands for the label's column
        numbers, names = groups.grouped(column)
        assert names == ["a", "b", "c"]
        assert numbers.tolist() == [1, 0, 1, 2, 0, 1, 0, 0, 1, 1] and numbers.dtype == "int64"


def test_groups_by_name_and_number(groups: InstructionTuning) -> None:
    numbers, names = groups.grouped("named")
    assert (names, numbers.tolist()) == (["no", "yes"], [1, 0, 1, 1, 1, 0, 0, 0, 0, 1])
    numbers, names = groups.grouped("year")
    assert (names, numbers.tolist()) == (["1999", "2000", "2001"], [0, 2, 0, 1, *[0] * 6])


def test_groups_of_rounded_numbers(groups: InstructionTuning) -> None:
    numbers, names = replace(groups, label="score").grouped(None)
    assert names == ["-1", "0", "3", "5"]
    assert [names[n] for n in numbers] == ["0", "5", "3", "-1", "5", "3", "0", "0", "5", "3"]


def test_groups_of_a_regression(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": v} for v in (0.2, 1.8, 2.4)]
    task = Regression(path=write(tmp_path, train=rows), missing_split="error")
    numbers, names = task.grouped(None)
    assert (names, numbers.tolist()) == (["0", "2"], [0, 1, 1])


def test_no_label_is_one_group(small: str) -> None:
    numbers, names = LanguageModelling(path=small, label=None).grouped(None)
    assert (names, numbers.tolist()) == (["all"], [0] * 12)


GROUPLESS = {
    "score": "partition.column=score must hold texts or whole numbers, got a fractional number in "
    "row 1 of train (counted from 1): write codes such as 1.1 as texts",
    "gap": "row 3 of train (counted from 1) has no gap to partition by",
    "nan": "row 2 of train (counted from 1) has no nan to partition by",
    "lists": "partition.column=lists must hold texts or numbers, got a list in row 1 (counted from "
    "1)",
    "else": "partition.column=else is no column of {}, only instruction, response, kind, named, "
    "score, gap, nan, lists, year",
}


@pytest.mark.parametrize("column", GROUPLESS)
def test_columns_that_make_no_groups(groups: InstructionTuning, column: str) -> None:
    assert error_of(lambda: groups.grouped(column)) == GROUPLESS[column].format(groups.path)
