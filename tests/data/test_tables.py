"""Loading tables: formats, layouts, and an error for each way in which they can be missing."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedpeft.data.rows.tables import load_tables, subsample, values
from fedpeft.data.tasks.text import TextClassification
from fedpeft.errors import named_row
from tests.data.files import image, write, write_file
from tests.data.shortcuts import error_of

ROWS: list[dict[str, Any]] = [
    {"text": "sun, and rain", "label": 1},
    {"text": 'a "goal"', "label": 0},
    {"text": "snow\nfell", "label": 1},
]
KINDS = ["parquet", "csv", "jsonl"]
# datasets leaves CSV files open until the garbage collector closes them, which then warns.
leaves_files = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected(tmp_path: Path) -> Iterator[None]:
    """Collect after tests with CSV files, so that no other test gets the warning."""
    yield
    if any(tmp_path.rglob("*.csv")):
        gc.collect()


def load(path: str | Path, subset: str | None = None, revision: str | None = None) -> Any:
    return load_tables(str(path), subset, revision)


def sizes(path: str | Path) -> dict[str, int]:
    return {split: len(rows) for split, rows in load(path).items()}


@leaves_files
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_a_split(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, train=ROWS, validation_matched=ROWS[:2], test=ROWS[2:])
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / ".hidden.parquet").write_text("what it is not")
    tables = load(tmp_path)
    assert {split: len(rows) for split, rows in tables.items()} == {
        "train": 3,
        "validation_matched": 2,
        "test": 1,
    }
    assert values(tables["train"], "text") == [row["text"] for row in ROWS]
    assert values(tables["test"], "label") == [1]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_a_single_file_is_train(tmp_path: Path, kind: str) -> None:
    file = write_file(tmp_path / f"any-name.{kind}", ROWS)
    tables = load(file)
    assert list(tables) == ["train"]
    assert values(tables["train"], "text") == [row["text"] for row in ROWS]


def test_a_list_in_one_json_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(ROWS, indent=1))
    assert values(load(tmp_path)["train"], "label") == [1, 0, 1]


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_hub_s_layout(tmp_path: Path, folder: str) -> None:
    """``hf download`` leaves files in the subset's folder, or in data/ beside a card."""
    write(tmp_path / folder, "parquet", "-00000-of-00001", train=ROWS, validation=ROWS[:2])
    (tmp_path / "README.md").write_text("# A data set\n")
    assert sizes(tmp_path) == {"train": 3, "validation": 2}


def test_splits_whose_names_contain_another_s(tmp_path: Path) -> None:
    """MNLI has two dev sets, validation_matched and validation_mismatched."""
    matched = {"validation_matched": ROWS[:1], "validation_mismatched": ROWS[:2]}
    write(tmp_path, "parquet", "-00000-of-00001", train=ROWS, **matched)
    assert sizes(tmp_path) == {"train": 3, "validation_matched": 1, "validation_mismatched": 2}


def test_a_split_in_several_files(tmp_path: Path) -> None:
    write(tmp_path, "parquet", "-00000-of-00002-0a1b2c", train=ROWS, test=ROWS[:1])
    write(tmp_path, "parquet", "-00001-of-00002-3d4e5f", train=ROWS[:2])
    tables = load(tmp_path)
    assert values(tables["train"], "label") == [1, 0, 1, 1, 0] and len(tables["test"]) == 1


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
    rows = load(tmp_path)["train"]
    assert rows.features["label"].names == ["cat", "dog"]
    assert values(rows, "label") == [0, 1, 1]


def test_values_of_a_selection(tmp_path: Path) -> None:
    rows = load(write(tmp_path, train=ROWS))["train"]
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


@pytest.mark.parametrize(
    "path",
    ["/nowhere/at/all", "./nowhere", "~/nowhere", "../nowhere", "nope.csv", "a/b/c", "my rows"],
)
def test_a_path_that_is_not_there(path: str) -> None:
    assert error_of(lambda: load(path)) == f"data.path={path} is no folder or file"


def test_a_hub_name_without_network() -> None:
    error = (
        "data set nobody/nothing is no folder here and cannot be had from the hub "
        "(ConnectionError): where there is a network, run `hf download nobody/nothing{} "
        "--repo-type dataset {}--local-dir FOLDER`, then give data.path=FOLDER{}; Couldn't reach "
        "'nobody/nothing' on the Hub (OfflineModeIsEnabled)"
    )
    assert error_of(lambda: load("nobody/nothing")) == error.format("", "", "")
    parts = (" --revision 0a1b2c", "--include 'cola/*' ", "/cola")
    assert error_of(lambda: load("nobody/nothing", "cola", "0a1b2c")) == error.format(*parts)


def test_a_misspelt_folder_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables/sst2").mkdir(parents=True)
    rule = r"sst3 is no folder here \(the folder tables is here, but holds no sst3\) and cannot be"
    with pytest.raises(ValueError, match=rule):
        load("tables/sst3")


UNREADABLE = {
    "parquet": (
        "hello",
        ": Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)",
    ),
    "jsonl": (
        '{"text": "a"}\nhello',
        ", because line 2 of a file is broken (train.jsonl): JSON parse error: Invalid value. in "
        "row 1",
    ),
}


@leaves_files
@pytest.mark.parametrize("path", ["folder", "file"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_is_something_else(tmp_path: Path, kind: str, path: str) -> None:
    text, reason = UNREADABLE[kind]
    file = tmp_path / f"train.{kind}"
    file.write_text(text)
    table = tmp_path if path == "folder" else file
    assert error_of(lambda: load(table)) == (
        f"data.path={table} cannot be read as parquet, CSV, JSON lines or images{reason}"
    )


def test_mixed_kinds(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", train=ROWS)
    write(tmp_path, "parquet", test=ROWS)
    assert error_of(lambda: load(tmp_path)) == (
        f"data.path={tmp_path} holds .jsonl, .parquet: give files of one kind, one of .parquet, "
        ".csv, .tsv, .jsonl, .json"
    )


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("hello")
    assert error_of(lambda: load(file)) == (
        f"data.path={file} holds .txt: give files of one kind, one of .parquet, "
        ".csv, .tsv, .jsonl, .json"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert error_of(lambda: load(tmp_path)) == (
        f"data.path={tmp_path} cannot be read as parquet, CSV, JSON lines or images: The directory "
        f"at {tmp_path} doesn't contain any data files"
    )


def test_splits_may_differ_in_their_columns(tmp_path: Path) -> None:
    """The test split has no labels, and its text is null alone."""
    test = [{"text": None, "other": 1.5}]
    task = TextClassification(path=write(tmp_path, train=ROWS, validation=ROWS[:1], test=test))
    assert len(task.train_rows) == 3 and len(task.split_rows("validation")) == 1
    with pytest.raises(ValueError) as error:
        task.split_rows("test")
    assert str(error.value) == (
        f"data set {tmp_path} has no column label in test, only text, other"
    )


CSV = 'text,label\n"rain\nand snow",a\n\nsun,b\n,a\n'  # a cell of two lines, and an empty line


@leaves_files
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.csv", CSV, "row 3 of train (line 6) has no text"),
        ("notes.tsv", CSV.replace(",", "\t"), "row 3 of train (line 6) has no text"),
        (
            "notes.jsonl",
            '{"text": "a", "label": "a"}\n\n{"text": "", "label": "b"}\n',
            "row 2 of train (line 3) has an empty text",
        ),
        (
            "train.json",
            '[{"text": "a", "label": "a"}, {"text": "", "label": "b"}]',
            "row 2 of train (counted from 1) has an empty text",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_the_line_of_its_file(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    assert error_of(lambda: TextClassification(path=str(file)).train_rows).startswith(says)


@leaves_files
def test_rows_of_several_files_are_counted_from_1(tmp_path: Path) -> None:
    for shard in range(2):
        text = "text,label\nrain,a\nsun,b\n" if not shard else "text,label\n,a\n"
        (tmp_path / f"train-0000{shard}-of-00002.csv").write_text(text)
    error = error_of(lambda: TextClassification(path=str(tmp_path)).train_rows)
    assert error.startswith("row 3 of train (counted from 1) has no text")


def test_words_for_a_row_count_from_1() -> None:
    assert named_row(17) == "row 18 (counted from 1)"
    assert named_row(17, "test") == "row 18 of test (counted from 1)"
    assert named_row(17, "test", 20) == "row 18 of test (line 20)"
