"""Encoded data on disk: reused for equal contents, built once, written whole or not at all."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedpeft.cache import cache_folder, cached, cached_folder, naming_the_cache, remembered
from fedpeft.data.partitions.base import Dirichlet
from fedpeft.data.rows.cache import content_sha256, datasets_cached
from fedpeft.data.tasks.base import Task
from fedpeft.data.tasks.choice import MultipleChoice
from fedpeft.data.tasks.instruction import InstructionTuning
from fedpeft.data.tasks.text import TextClassification
from tests.data.files import Rows, write
from tests.data.stand_ins import Refusing, tokenizer_of_words

ROWS: Rows = [
    {"text": "sun and rain", "two": "a", "label": "weather"},
    {"text": "a goal", "two": "b", "label": "sport"},
    {"text": "the snow", "two": "c", "label": "weather"},
]
WORDS = "sun and rain a goal the snow b c".split()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, empty."""
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(folder: Path) -> list[str]:
    """Return the names of the cache's entries, without the locks."""
    return sorted(f.name for f in (folder / "encoded").glob("*") if f.suffix != ".lock")


def is_built(task: Task, tokenizer: Any, split: str = "test") -> bool:
    """Tell whether the cache has a split; if not, the attempt leaves nothing there."""
    try:
        task.encode(split, Refusing(tokenizer))
    except AssertionError:
        return False
    return True


# --- keys ---------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> TextClassification:
    """A task whose test rows are in the cache."""
    path = write(tmp_path / "tables", train=ROWS, validation=ROWS, test=ROWS)
    task = TextClassification(path=path)
    assert not is_built(task, tokenizer_of_words(*WORDS))
    task.encode("test", tokenizer_of_words(*WORDS))
    return task


def test_the_same_rows_are_not_encoded_again(task: TextClassification, tmp_path: Path) -> None:
    tokenizer = tokenizer_of_words(*WORDS)
    first, again = task.encode("test", tokenizer), replace(task)
    assert is_built(again, tokenizer)
    assert is_built(again, tokenizer, "train")  # because its rows are equal
    other = write(tmp_path / "parquet", "parquet", train=ROWS, validation=ROWS, test=ROWS)
    assert is_built(TextClassification(path=other), tokenizer)
    assert is_built(TextClassification(path=other, metrics=["f1"], bad_rows="skip"), tokenizer)
    reused = TextClassification(path=other).encode("test", Refusing(tokenizer))
    assert reused.arrays.keys() == first.arrays.keys() == {"tokens", "offsets", "labels"}
    assert all((reused.arrays[n] == first.arrays[n]).all() for n in first.arrays)
    assert reused.labels.tolist() == [1, 0, 1] and reused.pad_id == 0


def test_a_tokenizer_that_was_used_is_the_same(task: TextClassification) -> None:
    """A call leaves truncation and padding set, which are no part of the key."""
    tokenizer = tokenizer_of_words(*WORDS)
    tokenizer(["a b c", "a"], truncation=True, max_length=2, padding=True)
    assert is_built(replace(task), tokenizer)


CHANGES: dict[str, dict[str, Any]] = {
    "length": {"max_length": 5},
    "second text": {"text_pair": "two"},
    "column": {"text": "two"},
    "order of labels": {"labels": ["weather", "sport"]},
    "more labels": {"labels": ["sport", "weather", "food"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_is_another_entry(task: TextClassification, change: str) -> None:
    assert not is_built(replace(task, **CHANGES[change]), tokenizer_of_words(*WORDS))


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_changed_cell_is_another_entry(
    task: TextClassification, tmp_path: Path, column: str
) -> None:
    values = {"text": "the rain", "label": "sport"}
    changed = [*ROWS[:2], ROWS[2] | {column: values[column]}]
    path = write(tmp_path / "changed", train=ROWS, validation=ROWS, test=changed)
    assert not is_built(TextClassification(path=path), tokenizer_of_words(*WORDS))
    unread = write(
        tmp_path / "b", train=ROWS, validation=ROWS, test=[r | {"two": ""} for r in ROWS]
    )
    assert is_built(TextClassification(path=unread), tokenizer_of_words(*WORDS))


def test_labels_that_train_numbers_otherwise(task: TextClassification, tmp_path: Path) -> None:
    """Equal test rows get other numbers where the train rows have one more class."""
    path = write(tmp_path / "c", train=[*ROWS, ROWS[0] | {"label": "art"}], test=ROWS)
    other = TextClassification(path=path, validation_split="test")
    assert other.encode("test", tokenizer_of_words(*WORDS)).labels.tolist() == [2, 1, 2]
    assert task.encode("test", tokenizer_of_words(*WORDS)).labels.tolist() == [1, 0, 1]


def test_names_and_positions_are_not_confused(tmp_path: Path) -> None:
    """Numbers that stand for names have another entry than equal numbers without names."""
    columns = {"text": ["a", "b"], "label": [0, 1]}
    named = Features({"text": Value("string"), "label": ClassLabel(names=["1", "0"])})
    numbers = []
    for i, features in enumerate((named, None)):
        for split in ("train", "validation", "test"):
            file = tmp_path / str(i) / f"{split}.parquet"
            file.parent.mkdir(exist_ok=True)
            Dataset.from_dict(columns, features).to_parquet(str(file))
        task = TextClassification(path=str(tmp_path / str(i)), labels=["1", "0"])
        numbers.append(task.encode("test", tokenizer_of_words(*WORDS)).labels.tolist())
    assert numbers == [[0, 1], [1, 0]]


def test_another_tokenizer_is_another_entry(task: TextClassification) -> None:
    assert is_built(task, tokenizer_of_words(*WORDS))
    tokenizers = [
        tokenizer_of_words(*WORDS[::-1]),
        tokenizer_of_words(*WORDS, single="<s> $A </s>"),
        tokenizer_of_words(*WORDS),
    ]
    tokenizers[2].eos_token = "<unk>"
    assert [is_built(task, tokenizer) for tokenizer in tokenizers] == [False, False, False]


def test_prompts_and_templates_are_part_of_the_key(tmp_path: Path) -> None:
    rows = [{"q": "sun", "a": "rain"}, {"q": "snow", "a": "goal"}]
    path = write(tmp_path / "q", train=rows, test=rows)
    tokenizer = tokenizer_of_words(*WORDS)
    tokenizer.chat_template = "{{ messages[0].content }}"
    task = InstructionTuning(
        path=path, prompt="{{ q }}", answer="a", label=None, validation_split="test"
    )
    task.encode("test", tokenizer)
    assert is_built(replace(task), tokenizer)
    assert not is_built(replace(task, prompt="the {{ q }}"), tokenizer)
    assert not is_built(replace(task, max_answer_length=3), tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }} a"
    assert not is_built(replace(task), tokenizer)
    choice = MultipleChoice(
        path=path, choices=["q", "a"], prompt="the {{ q }}", label=None, answers="a"
    )
    assert not is_built(replace(choice, validation_split="test"), tokenizer)


def test_arrays_stay_on_the_disk(task: TextClassification, folder: Path) -> None:
    arrays = task.encode("train", tokenizer_of_words(*WORDS)).arrays
    assert {type(array) for array in arrays.values()} == {np.memmap}
    assert arrays["labels"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        arrays["labels"][0] = 5
    assert len(entries(folder)) == 1  # because the rows of train and test are equal


# --- contents -----------------------------------------------------------------------------------

PAIRS: dict[str, tuple[list[Any], list[Any]]] = {
    "where a text ends": (["ab", "c"], ["a", "bc"]),
    "where an image ends": ([b"ab", b"c"], [b"a", b"bc"]),
    "order": (["a", "b"], ["b", "a"]),
    "null": ([None, "a"], ["None", "a"]),
    "number": ([1, 2], ["1", "2"]),
    "float": ([1.0, 2.0], [1.0, 2.5]),
    "in a list": ([["a", "b"]], [["a, b"]]),
    "in a struct": ([{"text": ["a"]}], [{"text": ["b"]}]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_contents_that_differ(case: str) -> None:
    one, two = (content_sha256(Dataset.from_dict({"x": v}), ["x"]) for v in PAIRS[case])
    assert one != two
    x, y = PAIRS[case]
    both = Dataset.from_dict({"y": y, "x": x})
    assert content_sha256(both, ["x"]) == one
    assert len({content_sha256(both, names) for names in (["x"], ["y"], ["x", "y"])}) == 3


def test_images_are_their_bytes_wherever_they_stand(tmp_path: Path) -> None:
    def digest(value: dict[str, Any]) -> str:
        return content_sha256(Dataset.from_list([{"x": value}]), ["x"])

    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    inside = [digest({"bytes": content, "path": "z.png"}) for content in (b"one", b"two")]
    outside = [digest({"bytes": None, "path": str(tmp_path / name)}) for name in "abc"]
    assert [inside[0], inside[0], inside[1]] == outside and inside[0] != inside[1]
    (tmp_path / "a").write_bytes(b"two")  # another image at the same path
    assert digest({"bytes": None, "path": str(tmp_path / "a")}) == inside[1]


# --- building -----------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    return {"a": np.arange(3), "b": np.ones((2, 2), np.float32)}


def test_the_folder_follows_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(["x"], arrays)
    assert cache_folder() == folder and len(entries(folder)) == 1
    monkeypatch.delenv("FEDPEFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fedpeft"


def test_a_folder_of_files_is_written_once_and_again_if_it_broke(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[Path] = []

    def write(draft: Path) -> None:
        assert list(draft.iterdir()) == []
        (draft / "a.txt").write_text("whole")
        written.append(draft)

    first = cached_folder(["x"], write)
    assert cached_folder(["x"], write) == first != cached_folder(["y"], write)
    assert len(written) == 2
    (first / "a.txt").write_text("whale")
    assert cached_folder(["x"], write) == first and len(written) == 3
    assert (first / "a.txt").read_text() == "whole"
    assert not any(draft.exists() for draft in written)
    broken = f"{first / 'a.txt'} of the cache has changed since it was written"
    assert [record.message for record in caplog.records] == [f"{broken}: the entry is built again"]


def test_a_folder_whose_writer_fails_is_not_there(folder: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "a.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(["x"], fail)
    assert [f.suffix for f in (folder / "folders").iterdir()] == [".lock"]
    folder.rename(folder.with_name("old"))
    folder.write_text("a file stands here")
    with pytest.raises(ValueError, match=f"cannot write the cache {folder}.*give FEDPEFT_CACHE"):
        cached_folder(["x"], fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", ["build", "write"])
def test_an_interrupted_build_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: str
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        if at == "write":  # the first array is written, the second fails
            patch.setattr(np, "save", lambda f, a: fail() if a.ndim == 2 else f.write(b"x"))
        cached(["x"], fail if at == "build" else arrays)
    assert entries(folder) == []
    assert cached(["x"], arrays)["a"].tolist() == [0, 1, 2]
    assert cached(["x"], fail)["b"].tolist() == [[1, 1], [1, 1]]


def test_a_folder_that_cannot_be_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on with what it built, warns once, and builds again next time."""
    folder.write_text("a file stands here")
    built = [cached(["x"], arrays) for _ in range(2)]
    assert [b["a"].tolist() for b in built] == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="read-only"):
        built[0]["a"][0] = 5
    assert remembered(["x"], lambda: 7) == 7
    assert [record.message for record in caplog.records] == [
        f"cannot write the cache {folder} (Not a directory): the run goes on without it and "
        "encodes rows in each process; give FEDPEFT_CACHE a folder that can be written and has room"
    ]


def test_an_error_of_the_rows_is_none_of_the_cache(folder: Path) -> None:
    def build() -> dict[str, np.ndarray]:
        raise FileNotFoundError(2, "No such file", "image.png")

    with pytest.raises(FileNotFoundError, match="image.png"):
        cached(["x"], build)


# --- broken entries -------------------------------------------------------------------------------


def change(file: Path, position: int) -> None:
    """Change one bit; the size and the time of change stay as they were."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


WAS_CUT = "was cut or changed since it was written"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": ("a.npy", lambda f: os.truncate(f, 140), "has 140 of 152 bytes"),
    "empty": ("b.npy", lambda f: os.truncate(f, 0), "has 0 of 144 bytes"),
    "longer": ("b.npy", lambda f: os.truncate(f, 145), "has 145 of 144 bytes"),
    "a changed number": ("a.npy", lambda f: change(f, -3), "has changed since it was written"),
    "a changed header": ("b.npy", lambda f: change(f, 30), "has changed since it was written"),
    "gone": ("a.npy", lambda f: f.unlink(), "cannot be read (No such file or directory)"),
    "sums cut": ("sums.json", lambda f: os.truncate(f, 20), WAS_CUT),
    "sums empty": ("sums.json", lambda f: os.truncate(f, 0), WAS_CUT),
    "sums changed": ("sums.json", lambda f: change(f, 12), WAS_CUT),
    "sums of other sums": ("sums.json", lambda f: change(f, 2), WAS_CUT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_entry_is_built_again(
    folder: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """One warning names the file, and what is built then stays."""
    cached(["x"], arrays)
    name, spoil, said = FAULTS[fault]
    (entry,) = (folder / "encoded").glob("*/")
    spoil(entry / name)
    calls: list[int] = []

    def build() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(3) + 10, "b": np.zeros(2)}

    for built in (cached(["x"], build), cached(["x"], build)):
        assert built["a"].tolist() == [10, 11, 12] and built["b"].tolist() == [0, 0]
        assert {type(array) for array in built.values()} == {np.memmap}
    assert calls == [1]
    assert [record.message for record in caplog.records] == [
        f"{entry / name} of the cache {said}: the entry is built again"
    ]
    assert sorted(file.name for file in entry.iterdir()) == ["a.npy", "b.npy", "sums.json"]


def test_an_entry_that_was_never_finished_is_no_fault(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was killed while it wrote leaves a draft beside the entry; it goes.

    Who has mapped what was there before keeps it.
    """
    mapped = cached(["x"], arrays)
    (entry,) = (folder / "encoded").glob("*/")
    (entry / "sums.json").unlink()
    draft = entry.with_name(f".{entry.name}.part")
    draft.mkdir()
    (draft / "b.npy").write_text("x")
    assert cached(["x"], lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
    assert mapped["a"].tolist() == [0, 1, 2] and mapped["b"].tolist() == [[1, 1], [1, 1]]
    assert caplog.records == [] and not draft.exists()
    assert sorted(file.name for file in entry.iterdir()) == ["a.npy", "sums.json"]


def test_an_entry_that_goes_while_it_is_read_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may begin to build it again between the check and the mapping."""
    cached(["x"], arrays)
    (entry,) = (folder / "encoded").glob("*/")
    looks: list[bool] = []

    def look(found: Path, tell: bool = True) -> bool:
        looks.append(tell)
        if len(looks) == 1:
            (entry / "b.npy").unlink()
            return True
        return False

    monkeypatch.setattr("fedpeft.cache._is_whole", look)
    built = cached(["x"], lambda: {"a": np.arange(2)})
    assert built["a"].tolist() == [0, 1] and looks == [False, True]


@pytest.mark.parametrize(
    "spoil", [lambda f: os.truncate(f, 13), lambda f: os.truncate(f, 0), lambda f: change(f, -2)]
)
def test_a_broken_file_of_facts_is_written_again(
    folder: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    assert remembered(["a", 1], lambda: {"x": 1}) == {"x": 1}
    (file,) = (folder / "remembered").glob("*.json")
    assert remembered(["a", 1], lambda: {"x": 2}) == {"x": 1}
    spoil(file)  # 1 becomes 5
    assert remembered(["a", 1], lambda: {"x": 3}) == {"x": 3}
    assert remembered(["a", 1], lambda: {"x": 4}) == {"x": 3}
    assert [record.message for record in caplog.records] == [
        f"{file} of the cache was cut or changed since it was written: it is built again"
    ]


# --- the tables of datasets -----------------------------------------------------------------------


def test_tables_lie_in_the_same_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HF_DATASETS_CACHE goes before FEDPEFT_CACHE, and the library's settings stay as they were."""
    from datasets import config

    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    before = [tmp_path / "library" / name for name in names]
    for name, path in zip(names, before, strict=True):
        monkeypatch.setattr(config, name, path)
    path = write(tmp_path / "tables", train=ROWS, validation=ROWS, test=ROWS)
    assert len(TextClassification(path=path).train_rows) == 3
    assert list((folder / "datasets").rglob("*.arrow")) and not (tmp_path / "library").exists()
    with datasets_cached():
        downloads = folder / "datasets" / "downloads"
        now = [folder / "datasets", downloads, downloads / "extracted"]
        assert [getattr(config, name) for name in names] == now
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "theirs"))
    with datasets_cached():
        assert [getattr(config, name) for name in names] == before
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.delenv("FEDPEFT_CACHE")
    with datasets_cached():
        assert [getattr(config, name) for name in names] == before


PLACE = Path("/caches/own")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "/caches/own (No space left on device)"),
        (PermissionError(13, "denied", "/caches"), "/caches (denied)"),
        (PermissionError(13, "denied", "/caches/own/x"), "/caches/own/x (denied)"),
        (OSError("Not enough disk space. Needed: 2 GB"), "/caches/own (Not enough disk space. N"),
    ],
)
def test_an_error_behind_an_error_names_the_cache(error: OSError, said: str) -> None:
    with pytest.raises(ValueError) as raised, naming_the_cache(PLACE):
        try:
            raise error
        except OSError as cause:
            raise ValueError("data.path cannot be read") from cause
    assert str(raised.value).startswith(f"cannot write the cache {said}")
    assert str(raised.value).endswith(
        "): give FEDPEFT_CACHE a folder that can be written and has room"
    )


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied", "/data/train.csv"), ValueError("no column text")]
)
def test_an_error_of_the_data_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, naming_the_cache(PLACE):
        raise error
    assert raised.value is error


# --- at once --------------------------------------------------------------------------------------


def test_threads_build_once(folder: Path) -> None:
    calls: list[int] = []
    results: list[dict[str, np.ndarray]] = []

    def build() -> dict[str, np.ndarray]:
        calls.append(1)
        time.sleep(0.1)
        return arrays()

    work: Callable[[], None] = lambda: results.append(cached(["x"], build))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(entries(folder)) == 1
    assert [result["a"].tolist() for result in results] == [[0, 1, 2]] * 4


PROCESS = """
import sys, time
from pathlib import Path
import numpy as np
from fedpeft.cache import cached

def build():
    Path(sys.argv[1], f"built-{time.monotonic_ns()}").touch()
    time.sleep(1)
    return {"a": np.arange(3)}

Path(sys.argv[1], f"ready-{sys.argv[2]}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    time.sleep(0.01)
print(cached(["x"], build)["a"].tolist())
"""


@pytest.mark.slow
def test_processes_build_once(folder: Path, tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", PROCESS, str(tmp_path), str(i)] for i in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    assert [p.communicate(timeout=120)[0] for p in processes] == ["[0, 1, 2]\n"] * 2
    assert len(list(tmp_path.glob("built-*"))) == 1 and len(entries(folder)) == 1


# --- facts of an earlier start -------------------------------------------------------------------


def test_tables_that_have_not_changed_are_not_read_again(
    task: TextClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of_words(*WORDS)

    def facts(task: TextClassification) -> tuple[Any, ...]:
        arrays = task.encode("train", tokenizer).arrays
        groups = task.group_numbers(None).tolist()
        return task.label_names, task.fingerprint(), groups, arrays["labels"].tolist()

    def read(*_: Any) -> None:
        raise AssertionError("tables were read")

    first = facts(replace(task))
    assert first[0] == ["sport", "weather"] and first[2] == [1, 0, 1]
    monkeypatch.setattr("fedpeft.data.rows.source.load_tables", read)
    assert facts(replace(task)) == first
    changed = Path(str(task.path)) / "train.jsonl"
    changed.write_text(changed.read_text().replace("the snow", "snow and snow"))
    with pytest.raises(AssertionError, match="tables were read"):
        facts(replace(task))
    monkeypatch.undo()
    again = facts(replace(task))
    assert again[1]["sha256"] != first[1]["sha256"] and again[2:] == first[2:]


def test_a_partition_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any) -> None:
        raise AssertionError("drawn again")

    labels = np.arange(60) % 3
    first = Dirichlet(alpha=0.5).once(labels, 4, 7)
    drawn = Dirichlet(alpha=0.5).indices(labels, 4, 7)
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in drawn]
    monkeypatch.setattr(Dirichlet, "indices", draw)
    again = Dirichlet(alpha=0.5).once(labels, 4, 7)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in first]
    other_draws = (
        (0.6, labels, 4, 7),
        (0.5, labels[::-1], 4, 7),
        (0.5, labels, 5, 7),
        (0.5, labels, 4, 8),
    )
    for alpha, numbers, clients, seed in other_draws:
        with pytest.raises(AssertionError, match="drawn again"):
            Dirichlet(alpha=alpha).once(numbers, clients, seed)
