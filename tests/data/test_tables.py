"""Where tables come from: formats, layouts, and one sentence for each way they can be missing."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedpeft.data.rows.tables import load_tables, subsample, values
from fedpeft.data.tasks.text import TextClassification
from tests.data.made import image, write, write_file

ROWS: list[dict[str, Any]] = [
    {"text": "sun, and rain", "label": 1},
    {"text": 'a "goal"', "label": 0},
    {"text": "snow\nfell", "label": 1},
]
KINDS = ["parquet", "csv", "jsonl"]
# datasets leaves CSV files to the garbage collector, which then warns
leaves_files = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected(tmp_path: Path) -> Iterator[None]:
    """So that no other test gets the warning."""
    yield
    if any(tmp_path.rglob("*.csv")):
        gc.collect()


def sizes(path: str | Path) -> dict[str, int]:
    return {split: len(rows) for split, rows in load_tables(str(path), None, None).items()}


def said(path: str | Path, **given: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_tables(str(path), given.get("subset"), given.get("revision"))
    return str(error.value)


@leaves_files
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_a_split(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, train=ROWS, validation_matched=ROWS[:2], test=ROWS[2:])
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / ".hidden.parquet").write_text("what it is not")
    found = load_tables(str(tmp_path), None, None)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 3,
        "validation_matched": 2,
        "test": 1,
    }
    assert values(found["train"], "text") == [row["text"] for row in ROWS]
    assert values(found["test"], "label") == [1]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_a_single_file_is_train(tmp_path: Path, kind: str) -> None:
    file = write_file(tmp_path / f"any-name.{kind}", ROWS)
    found = load_tables(file, None, None)
    assert list(found) == ["train"]
    assert values(found["train"], "text") == [row["text"] for row in ROWS]


def test_a_list_in_one_json_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(ROWS, indent=1))
    found = load_tables(str(tmp_path), None, None)
    assert values(found["train"], "label") == [1, 0, 1]


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_hub_s_layout(tmp_path: Path, inside: str) -> None:
    """As ``hf download`` leaves it: in the subset's folder, or in data/ beside a card."""
    write(tmp_path / inside, "parquet", "-00000-of-00001", train=ROWS, validation=ROWS[:2])
    (tmp_path / "README.md").write_text("# A data set\n")
    assert sizes(tmp_path) == {"train": 3, "validation": 2}


def test_splits_whose_names_hold_another_s(tmp_path: Path) -> None:
    """MNLI's two dev sets, by the hub's file names."""
    matched = {"validation_matched": ROWS[:1], "validation_mismatched": ROWS[:2]}
    write(tmp_path, "parquet", "-00000-of-00001", train=ROWS, **matched)
    assert sizes(tmp_path) == {"train": 3, "validation_matched": 1, "validation_mismatched": 2}


def test_a_split_in_several_files(tmp_path: Path) -> None:
    write(tmp_path, "parquet", "-00000-of-00002-0a1b2c", train=ROWS, test=ROWS[:1])
    write(tmp_path, "parquet", "-00001-of-00002-3d4e5f", train=ROWS[:2])
    found = load_tables(str(tmp_path), None, None)
    assert values(found["train"], "label") == [1, 0, 1, 1, 0] and len(found["test"]) == 1


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "notes", train=ROWS)
    assert sizes("~/notes") == {"train": 3}
    assert sizes("~/notes/train.jsonl") == {"train": 3}


def test_a_folder_of_images(tmp_path: Path) -> None:
    for i, name in enumerate(["cat", "dog", "dog"]):
        file = tmp_path / "train" / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(i))
    rows = load_tables(str(tmp_path), None, None)["train"]
    assert rows.features["label"].names == ["cat", "dog"]
    assert values(rows, "label") == [0, 1, 1]


def test_values_of_a_selection(tmp_path: Path) -> None:
    rows = load_tables(write(tmp_path, train=ROWS), None, None)["train"]
    assert values(rows.select([2, 0]), "text") == ["snow\nfell", "sun, and rain"]


def test_subsample() -> None:
    whole = Dataset.from_dict({"row": list(range(100))})
    part = values(subsample(whole, 10, "x"), "row")
    assert part == values(subsample(whole, 10, "x"), "row") == sorted(part)
    assert len(set(part)) == 10 and part != list(range(10))
    assert part != values(subsample(whole, 10, "y"), "row")
    assert subsample(whole, None, "x") is whole and subsample(whole, 100, "x") is whole


# --- errors -------------------------------------------------------------------------------------


def test_no_path() -> None:
    with pytest.raises(ValueError) as error:
        _ = TextClassification().tables
    assert str(error.value) == "data.path is not set: give a folder of tables or a hub name"


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere", "../nowhere"])
def test_a_path_that_is_not_there(path: str) -> None:
    assert said(path) == f"data.path={path} is no folder or file"


def test_a_hub_name_without_network() -> None:
    why = (
        "data set nobody/nothing is no folder here and cannot be had from the hub "
        "(ConnectionError: Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)): "
        "where there is a network, run `hf download nobody/nothing{} --repo-type dataset "
        "{}--local-dir FOLDER`, then give data.path=FOLDER{}"
    )
    assert said("nobody/nothing") == why.format("", "", "")
    given = said("nobody/nothing", subset="cola", revision="0a1b2c")
    assert given == why.format(" --revision 0a1b2c", "--include 'cola/*' ", "/cola")


UNREADABLE = {
    "parquet": (
        "hello",
        "Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)",
    ),
    "jsonl": ("hello", "JSON parse error: Invalid value. in row 0"),
    "csv": ("", "No columns to parse from file"),
}


@leaves_files
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_is_something_else(tmp_path: Path, kind: str) -> None:
    text, reason = UNREADABLE[kind]
    file = tmp_path / f"train.{kind}"
    file.write_text(text)
    for path in (tmp_path, file):
        assert said(path) == (
            f"data.path={path} cannot be read as parquet, CSV, JSON lines or images: {reason}"
        )


def test_mixed_kinds(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", train=ROWS)
    write(tmp_path, "parquet", test=ROWS)
    assert said(tmp_path) == (
        f"data.path={tmp_path} holds .jsonl, .parquet: give files of one kind, one of .parquet, "
        ".csv, .jsonl, .json"
    )


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("hello")
    assert said(file) == (
        f"data.path={file} holds .txt: give files of one kind, one of .parquet, .csv, .jsonl, .json"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert said(tmp_path) == (
        f"data.path={tmp_path} cannot be read as parquet, CSV, JSON lines or images: The directory "
        f"at {tmp_path} doesn't contain any data files"
    )


def test_splits_may_differ_in_their_columns(tmp_path: Path) -> None:
    """A test without labels, and a column that is null in one split alone."""
    more = [{"text": None, "other": 1.5}]
    task = TextClassification(path=write(tmp_path, train=ROWS, validation=ROWS[:1], test=more))
    assert len(task.train_rows) == 3 and len(task.split_rows("validation")) == 1
    with pytest.raises(ValueError) as error:
        task.split_rows("test")
    assert str(error.value) == (
        f"data set {tmp_path} has no column label in test, only text, other"
    )
