"""Tables of texts: splits, labels, metrics, and errors that name what is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

from fedpeft.config import load
from fedpeft.data.language import LanguageModelling
from fedpeft.data.tables import subsample
from fedpeft.data.text import TextClassification
from fedpeft.session import Session

ROWS = [
    ("sun and rain", "weather"),
    ("a goal", "sport"),
    ("the snow", "weather"),
    ("race", "sport"),
]


def write(folder: Path, **splits: list[dict[str, Any]]) -> str:
    """JSON lines, a file a split."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rows(pairs: list[tuple[str, Any]] = ROWS) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in pairs]


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write(tmp_path / "small", train=rows(), validation=rows(ROWS[:2]), test=rows(ROWS[2:]))


def test_splits_and_labels(small: str) -> None:
    task = TextClassification(path=small)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 4,
        "validation": 2,
        "test": 2,
    }
    assert task.label_names == ["sport", "weather"] and task.num_labels == 2
    assert task.class_numbers(task.splits["train"]).tolist() == [1, 0, 1, 0]
    assert list(task.splits["test"]["text"]) == ["the snow", "race"]


def test_labels_in_the_given_order(small: str) -> None:
    task = TextClassification(path=small, labels=["weather", "sport", "food"])
    assert task.num_labels == 3
    assert task.class_numbers(task.splits["train"]).tolist() == [0, 1, 0, 1]


def test_numbers_as_labels(tmp_path: Path) -> None:
    pairs = [("a", 2), ("b", 0), ("c", 1)]
    path = write(tmp_path / "n", train=rows(pairs), validation=rows(pairs), test=rows(pairs))
    task = TextClassification(path=path)
    assert task.label_names == ["0", "1", "2"]
    assert task.class_numbers(task.splits["train"]).tolist() == [2, 0, 1]
    assert TextClassification(path=path, labels=["x", "y", "z"]).num_labels == 3


def test_numbers_that_are_names(tmp_path: Path) -> None:
    """Ratings from 1 to 3, and a gap: the numbers are names, not positions."""
    pairs = [("a", 3), ("b", 1), ("c", 7)]
    path = write(tmp_path / "r", train=rows(pairs), validation=rows(pairs), test=rows(pairs))
    task = TextClassification(path=path)
    assert task.label_names == ["1", "3", "7"]
    assert task.class_numbers(task.splits["train"]).tolist() == [1, 0, 2]
    given = TextClassification(path=path, labels=["7", "3", "1"])
    assert given.class_numbers(given.splits["train"]).tolist() == [1, 2, 0]


def test_a_class_label_column(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "0"])})
    for split in ("train", "validation", "test"):
        table = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features)
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    task = TextClassification(path=str(tmp_path))
    assert task.label_names == ["1", "0"]
    assert task.class_numbers(task.splits["test"]).tolist() == [0, 1, 1]
    renamed = TextClassification(path=str(tmp_path), labels=["no", "yes"])
    assert renamed.class_numbers(renamed.splits["test"]).tolist() == [0, 1, 1]


# datasets leaves CSV files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    for split in ("train", "validation", "test"):
        table = Dataset.from_list(rows())
        getattr(table, f"to_{name}")(str(tmp_path / f"{split}.{name}"))
    task = TextClassification(path=str(tmp_path))
    assert list(task.splits["train"]["text"]) == [text for text, _ in ROWS]


def test_other_columns_and_splits(tmp_path: Path) -> None:
    given = [{"said": "the sun", "more": "and rain", "about": "weather"}] * 3
    path = write(tmp_path / "o", test=given, validation=given[:2], train=given[:1])
    task = TextClassification(
        path=path,
        text="said",
        text_pair="more",
        label="about",
        train_split="test",
        validation_split="validation",
        test_split="train",
    )
    assert [len(task.splits[s]) for s in ("train", "validation", "test")] == [3, 2, 1]


# --- errors -------------------------------------------------------------------------------------


def test_no_path() -> None:
    with pytest.raises(ValueError, match="data.path is not set: give a folder of tables"):
        _ = TextClassification().splits


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.path=.*/nowhere is no folder"):
        _ = TextClassification(path=str(tmp_path / "nowhere")).splits


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data set {tmp_path} is neither a folder here nor"):
        _ = TextClassification(path=str(tmp_path)).splits


def test_no_hub() -> None:
    with pytest.raises(ValueError, match="data set nobody/nothing is neither a folder here nor"):
        _ = TextClassification(path="nobody/nothing").splits


def test_a_missing_split(tmp_path: Path) -> None:
    path = write(tmp_path / "m", train=rows(), test=rows())
    with pytest.raises(ValueError, match="has no split validation, only train, test"):
        _ = TextClassification(path=path).splits
    with pytest.raises(ValueError, match="has no split eval, only train, test"):
        _ = TextClassification(path=path, validation_split=None, test_split="eval").splits


@pytest.mark.parametrize(
    ("fields", "column"),
    [({"text": "body"}, "body"), ({"label": "class"}, "class"), ({"text_pair": "two"}, "two")],
)
def test_a_missing_column(small: str, fields: dict[str, str], column: str) -> None:
    with pytest.raises(ValueError, match=f"no column {column} in train, only text, label"):
        _ = TextClassification(path=small, **fields).splits  # type: ignore[arg-type]


def test_a_column_missing_in_one_split_alone(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        folder = tmp_path / split
        column = "text" if split != "test" else "texts"
        folder.mkdir()
        Dataset.from_list([{column: "a", "label": "x"}]).to_parquet(str(folder / "0.parquet"))
    with pytest.raises(ValueError):
        _ = TextClassification(path=str(tmp_path)).splits


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_text(tmp_path: Path, empty: str | None) -> None:
    bad = rows([ROWS[0], (empty, "sport")])  # type: ignore[list-item]
    path = write(tmp_path / "e", train=rows(), validation=rows(), test=bad)
    with pytest.raises(ValueError, match="row 1 of test has an empty text"):
        _ = TextClassification(path=path).splits


def test_an_unknown_label(tmp_path: Path) -> None:
    path = write(
        tmp_path / "u", train=rows(), validation=rows(), test=rows([ROWS[0], ("x", "art")])
    )
    task = TextClassification(path=path)
    with pytest.raises(
        ValueError, match="row 1 has label art, which is none of the 2 labels sport, weather"
    ):
        task.class_numbers(task.splits["test"])
    numbers = write(
        tmp_path / "v", **dict.fromkeys(("train", "validation", "test"), rows([("a", 3)]))
    )
    task = TextClassification(path=numbers, labels=["p", "q"])
    with pytest.raises(ValueError, match="row 0 has label 3, which is none of the 2 labels p, q"):
        task.class_numbers(task.splits["train"])


# --- validation and subsamples -------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 24), (0.25, 60), (0.001, 1)])
def test_validation_out_of_train(table: Path, fraction: float, expected: int) -> None:
    tasks = [
        TextClassification(path=str(table), validation_split=None, validation_fraction=fraction)
        for _ in range(2)
    ]
    whole = set(TextClassification(path=str(table)).splits["train"]["text"])
    assert len(whole) == 240  # texts are distinct, so they name rows
    train, validation = (set(tasks[0].splits[s]["text"]) for s in ("train", "validation"))
    assert len(validation) == expected and len(train) == 240 - expected
    assert not train & validation and train | validation == whole
    for split in ("train", "validation"):
        assert list(tasks[0].splits[split]["text"]) == list(tasks[1].splits[split]["text"])


def test_a_limited_validation_still_leaves_train(table: Path) -> None:
    task = TextClassification(
        path=str(table), validation_split=None, validation_fraction=0.5, max_validation_rows=10
    )
    validation = set(task.splits["validation"]["text"])
    assert len(validation) == 10 and len(task.splits["train"]) == 120
    assert not validation & set(task.splits["train"]["text"])


def test_splits_of_a_client_s_and_the_server_s_task_agree(opened: Callable[..., Session]) -> None:
    """Client seeds divide training rows alone: no validation row reaches a client."""
    given = ["data.validation_split=null", "data.validation_fraction=0.2"]
    a, b = opened(*given, "seed=0"), opened(*given, "seed=1")
    assert a.task.fingerprint() == b.task.fingerprint()
    assert sum(map(len, a.client_rows)) == 192 and len(a.examples("validation")) == 48


def test_subsample(table: Path) -> None:
    whole = Dataset.from_dict({"row": list(range(100))})
    part = list(subsample(whole, 10, "x")["row"])
    assert part == list(subsample(whole, 10, "x")["row"]) == sorted(part)
    assert len(set(part)) == 10 and part != list(range(10))
    assert part != list(subsample(whole, 10, "y")["row"])
    assert subsample(whole, None, "x") is whole and subsample(whole, 100, "x") is whole
    task = TextClassification(path=str(table), max_test_rows=7, max_validation_rows=3)
    assert len(task.splits["test"]) == 7 and len(task.splits["validation"]) == 3
    assert len(task.splits["train"]) == 240


def test_fingerprint_sees_every_text_and_label(tmp_path: Path) -> None:
    seen = set()
    for i, changed in enumerate([ROWS, ROWS[::-1], [("sun", "weather"), *ROWS[1:]], ROWS[:3]]):
        path = write(tmp_path / str(i), train=rows(changed), validation=rows(), test=rows())
        found = TextClassification(path=path).fingerprint()
        assert found["rows"] == {"train": len(changed), "validation": 4, "test": 4}
        seen.add(found["sha256"])
    assert len(seen) == 4


# --- encoding, loss and metrics -------------------------------------------------------------------


def test_encode_truncates(opened: Callable[..., Session]) -> None:
    session = opened("data.max_length=6")
    examples = session.examples("test")
    assert examples.lengths.max() == 6 and examples.lengths.min() >= 3
    first = session.task.splits["test"]["text"][0].split()[:4]
    ids = examples.tokens[examples.offsets[0] : examples.offsets[1]].tolist()
    assert session.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *first, "[SEP]"]
    assert examples.pad_id == session.tokenizer.pad_token_id == 0
    expected = session.task.class_numbers(session.task.splits["test"])
    assert examples.labels.tolist() == expected.tolist()


def test_encode_a_pair(base: list[str], tmp_path: Path) -> None:
    given = [{"text": "the goal", "two": "and rain", "label": "x"}] * 2
    path = write(tmp_path / "pair", train=given, validation=given, test=given)
    config = load([*base, f"data.path={path}", "data.text_pair=two"])
    tokenizer = config.model.tokenizer()
    examples = config.data.encode(config.data.splits["test"], tokenizer)
    ids = examples.tokens[: examples.offsets[1]].tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["[CLS]", "the", "goal", "[SEP]", "and", "rain", "[SEP]"]
    )


class Logits(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> "Logits":
        return self


def test_classification_metrics_by_hand() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    batch = {
        "input_ids": torch.zeros(4, 1, dtype=torch.long),
        "attention_mask": torch.ones(4, 1, dtype=torch.long),
        "labels": torch.tensor([0, 0, 1, 2]),
    }
    # predicts 0, 1, 1, 0 with probability 1/2 against 1/4 and 1/4
    logits = torch.log(torch.tensor([[2.0, 1, 1], [1, 2, 1], [1, 2, 1], [2, 1, 1]]))
    rows = task.evaluate_batch(Logits(logits), batch)
    assert rows["prediction"].tolist() == [0, 1, 1, 0]
    loss = (2 * np.log(2) + 2 * np.log(4)) / 4
    metrics = task.metrics(
        [{k: v[:3] for k, v in rows.items()}, {k: v[3:] for k, v in rows.items()}]
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["accuracy"] == 0.5
    # F1: a 1/2 (precision 1/2, recall 1/2), b 2/3 (1/2, 1), c 0
    assert metrics["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert float(task.loss(Logits(logits), batch)) == pytest.approx(loss, rel=1e-6)


def test_baseline_answers_the_commonest_training_label() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    train, own = np.array([1, 1, 2, 0, 1]), np.array([1, 2, 2, 2])
    assert task.baseline(train, own) == 0.25  # not 0.75: what is measured does not choose


def test_language_modelling_by_hand() -> None:
    """Next tokens of [3, 1, 2] and [3, 1, pad]: two targets and one."""
    task = LanguageModelling()
    assert task.num_labels is None and task.baseline(np.array([0]), np.array([0])) is None
    batch = {
        "input_ids": torch.tensor([[3, 1, 2], [3, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([0, 0]),
    }
    right, wrong = [0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]
    logits = torch.tensor([[right, wrong, wrong], [right, wrong, right]])
    rows = task.evaluate_batch(Logits(logits), batch)
    assert rows["count"].tolist() == [2, 1] and rows["correct"].tolist() == [1, 1]
    low, high = np.log(np.exp(9) + 3) - 9, np.log(np.exp(9) + 3)
    metrics = task.metrics([{k: v[i : i + 1] for k, v in rows.items()} for i in (0, 1)])
    assert metrics["loss"] == pytest.approx((2 * low + high) / 3, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(2 / 3)
    assert float(task.loss(Logits(logits), batch)) == pytest.approx(metrics["loss"], rel=1e-5)
